"""The teacher that a student learns from while it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.system.device import load_frozen
from headstart.system.distributed import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DistillationTeacher:
    """A model that arms learn from.

    Attributes:
        checkpoint: its own, with the vocabulary that is left.
        shared_rows: how many tokens, the first ones, it is compared with a student on; 0 for all.
    """

    checkpoint: Checkpoint
    shared_rows: int = 0


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose logits are asked for one chunk of tokens at a time."""

    model: PreTrainedModel

    def compile(self, backend: str = "inductor", mode: str | None = None) -> None:
        """Compile its layers by torch.compile."""
        self.model.base_model.compile(backend=backend, mode=mode)

    @torch.no_grad()
    def hidden(
        self,
        blocks: Int[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens embed"]:
        """Final hidden states of a batch; positions that begin anew begin a new document."""
        with self._precision():
            outputs = self.model.base_model(blocks, position_ids=positions, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "chunk embed"]) -> Float[Tensor, "chunk vocab"]:
        """Logits of some of those hidden states."""
        with self._precision():
            logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def _precision(self) -> AbstractContextManager[Any]:
        """Half-precision weights compute as they are; float32 ones as the training around them."""
        kind = self.model.device.type
        if self.model.dtype == torch.float32 or not torch.amp.is_autocast_available(kind):
            return nullcontext()
        return torch.autocast(kind, enabled=False)


def load_teacher(folder: Path, device: torch.device, sharded: bool = False) -> Teacher:
    """Load a teacher, whole or spread over all processes.

    A sharded one keeps only this process' share of the weights on its device, and gathers each
    layer while it runs (FSDP2). The output matrix stays whole. Every process must then ask at the
    same time.
    """
    if not sharded or world_size() == 1:
        return Teacher(load_frozen(folder, device))
    # Sharded layer by layer from the CPU's memory, so that no device ever holds all of it.
    model = load_frozen(folder, device, stays=True)
    mesh = init_device_mesh(device.type, (world_size(),))
    layers = Architecture.of(model.config).family.layer.removesuffix(".{i}")
    for layer in model.get_submodule(layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True)
    return Teacher(model.to(device))
