"""What makes a candidate a good place to begin: its loss, or its distance from the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headstart.calibration.activations import TeacherActivations
from headstart.calibration.layer_by_layer import batches_of
from headstart.calibration.propagate import refitted_student
from headstart.losses.chunked import chunked_sum
from headstart.losses.distillation import forward_kl
from headstart.losses.next_token import summed_loss
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.cut import build_student, slice_tensors
from headstart.model.spec import SubnetSpec
from headstart.searching.candidate import Candidate, Orders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_TOKENS_PER_BATCH = 2048
"""Beyond this many a CPU is slower, as activations outgrow its caches."""
MAX_TOKENS_PER_BATCH = 1 << 18
ACTIVATIONS_PER_TOKEN = 12
"""Residual-sized tensors that are alive at once in a layer's forward pass, with slack."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Scores candidates cut out of a resident teacher by their loss, in nats; lower is better.

    Attributes:
        model: the whole teacher, in eval mode.
        teacher: its architecture.
        orders: the axis orders in which candidates are read.
        blocks: the tokens on which every candidate is scored.
        batch_size: blocks per forward pass.
        refit_blocks: training tokens on which every candidate is refitted layer by layer before;
            None scores plain slices.
    """

    model: PreTrainedModel
    teacher: Architecture
    orders: Orders
    blocks: Int[Tensor, "blocks tokens"]
    batch_size: int = 8
    refit_blocks: Int[Tensor, "blocks tokens"] | None = None

    @property
    def num_blocks(self) -> int:
        return int(self.blocks.shape[0])

    @property
    def block_length(self) -> int:
        return int(self.blocks.shape[1])

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """The teacher's tensors, without an output matrix that is the embedding."""
        return state_of(self.model)

    @cached_property
    def _activations(self) -> TeacherActivations:
        """The teacher's on `refit_blocks`; made for the first candidate, and kept for all."""
        assert self.refit_blocks is not None
        return TeacherActivations.record(self.model, batches_of(self.refit_blocks))

    def sliced(self, candidate: Candidate) -> PreTrainedModel:
        """The candidate as a model, with the teacher's own weights."""
        spec = candidate.spec(self.teacher, self.orders)
        return build_student(self.state.items(), self.teacher, spec)

    def student(self, candidate: Candidate) -> PreTrainedModel:
        """The candidate as the model that is scored."""
        if self.refit_blocks is None:
            return self.sliced(candidate)
        spec = candidate.spec(self.teacher, self.orders)
        return refitted_student(self._activations, self.state.items(), spec)

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        """Nats of all targets in the blocks from `start` to before `stop`.

        NaN if the candidate cannot be refitted, since what it computes is no number.
        """
        try:
            student = self.student(candidate)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return math.nan
        return self.nats(student, start, stop)

    def nats(self, student: PreTrainedModel, start: int, stop: int) -> float:
        """The same of a model."""
        return summed_loss(student, self.blocks[start:stop], self.batch_size)


@dataclass(frozen=True)
class DivergenceFromTeacher(HeldOutLoss):
    """Scores candidates by KL(teacher || candidate), in nats; lower is better.

    The teacher reads the tokens once. What is kept of it are its final hidden states, since its
    logits would take as many numbers a token as there are words; they come back chunk by chunk at
    the cost of one product.
    """

    @cached_property
    def _teacher_hidden(self) -> Float[Tensor, "blocks tokens embed"]:
        batches = self.blocks.split(self.batch_size)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return torch.cat([_hidden(self.model, batch) for batch in batches])

    @torch.no_grad()
    def nats(self, student: PreTrainedModel, start: int, stop: int) -> float:
        matrix = student.get_output_embeddings().weight
        teacher_matrix = self.model.get_output_embeddings().weight
        total = torch.zeros((), dtype=torch.float64, device=matrix.device)
        for first in range(start, stop, self.batch_size):
            batch = slice(first, min(first + self.batch_size, stop))
            wanted = self._teacher_hidden[batch, :-1].flatten(0, 1)
            hidden = _hidden(student, self.blocks[batch])[:, :-1].flatten(0, 1)

            def divergence(logits: Tensor, chunk: slice, wanted: Tensor = wanted) -> Tensor:
                return forward_kl(logits, functional.linear(wanted[chunk], teacher_matrix))

            total += chunked_sum(hidden, matrix, divergence)
        return total.item()


def _hidden(
    model: PreTrainedModel, blocks: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens embed"]:
    hidden: Tensor = model.base_model(blocks.to(model.device), use_cache=False).last_hidden_state
    return hidden


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors, without an output matrix that is its embedding."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@torch.no_grad()
def put_in_order(state: Mapping[str, Tensor], teacher: Architecture, orders: Orders) -> Orders:
    """Move a teacher's channels, groups and neurons to the places of their ranks.

    The model computes what it did before, and a candidate that keeps the first ranks of an axis is
    then a view of it, which costs nothing to cut out.

    Args:
        state: the teacher's state dict, whose tensors are overwritten one at a time.
        orders: what comes first; layers stay where they are.

    Returns:
        The orders in which to read it from now on.
    """
    in_place = Orders.of_teacher(teacher.sizes)
    everything = SubnetSpec(in_place.layers, orders.embed, orders.kv_groups, orders.mlp)
    for name, ordered in slice_tensors(state.items(), teacher, everything):
        state[name].copy_(ordered)
    return replace(in_place, layers=orders.layers)


def fitting_batch_size(
    sizes: Sizes, block_length: int, device: torch.device, bytes_per_number: int
) -> int:
    """Blocks per forward pass that fit the device: half of a GPU's free memory, at most.

    Args:
        sizes: of the teacher's axes, which bound every candidate's.
        bytes_per_number: of an activation.
    """
    if device.type != "cuda":
        return max(1, CPU_TOKENS_PER_BATCH // block_length)
    numbers_per_token: int = ACTIVATIONS_PER_TOKEN * sizes["embed"] + 4 * sizes["mlp"]
    free_bytes, _ = torch.cuda.mem_get_info(device)
    num_tokens = free_bytes // 2 // (numbers_per_token * bytes_per_number)
    return max(1, min(num_tokens, MAX_TOKENS_PER_BATCH) // block_length)
