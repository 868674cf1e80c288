"""What makes a candidate a good place to begin: its loss, or its distance from the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics
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
        state: the teacher's state dict.
        teacher: its architecture.
        orders: the axis orders in which candidates are read.
        blocks: the tokens on which every candidate is scored.
        batch_size: blocks per forward pass.
        statistics: of the teacher's activations, by which candidates are refitted; None cuts them
            out as they are.
    """

    state: Mapping[str, Tensor]
    teacher: Architecture
    orders: Orders
    blocks: Int[Tensor, "blocks tokens"]
    batch_size: int = 8
    statistics: Statistics | None = None

    @property
    def num_blocks(self) -> int:
        return int(self.blocks.shape[0])

    @property
    def block_length(self) -> int:
        return int(self.blocks.shape[1])

    def student(self, candidate: Candidate) -> PreTrainedModel:
        """The candidate as a model."""
        spec = candidate.spec(self.teacher, self.orders)
        tensors: Iterable[tuple[str, Tensor]] = self.state.items()
        if self.statistics is not None:
            tensors = refitted(tensors, self.teacher, spec, self.statistics)
        return build_student(tensors, self.teacher, spec)

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        """Nats of all targets in the blocks from `start` to before `stop`."""
        return summed_loss(self.student(candidate), self.blocks[start:stop], self.batch_size)


@dataclass(frozen=True)
class DivergenceFromTeacher(HeldOutLoss):
    """Scores candidates by KL(teacher || candidate), in nats; lower is better.

    The teacher reads the tokens once. What is kept of it are its final hidden states, since its
    logits would take as many numbers a token as there are words; they come back chunk by chunk at
    the cost of one product.

    Attributes:
        model: the whole teacher.
    """

    model: PreTrainedModel = field(kw_only=True)

    @cached_property
    def _teacher_hidden(self) -> Float[Tensor, "blocks tokens embed"]:
        batches = self.blocks.split(self.batch_size)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return torch.cat([_hidden(self.model, batch) for batch in batches])

    @torch.no_grad()
    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        student = self.student(candidate)
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
