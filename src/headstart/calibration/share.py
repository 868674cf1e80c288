"""The work of a refit, shared by the processes that torchrun has started.

All of them refit the same student. Each reads a part of the text, and the sums over it are added
up; each solves for a part of a matrix' rows, or for some layers, and all get the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, distributed

from headstart.system.distributed import rank, world_size


@dataclass(frozen=True)
class Share:
    """One process' part; all of it by default.

    Attributes:
        rank: of the process.
        size: how many processes there are.
        counts: whether it has blocks of its own; where there are fewer blocks than processes, the
            others read the first one and add nothing.
    """

    rank: int = 0
    size: int = 1
    counts: bool = True

    @staticmethod
    def of_this_process(num_blocks: int, together: bool = True) -> Share:
        """This process' part of some blocks, and of all else; all of it if it works alone."""
        if not together:
            return ALONE
        return Share(rank(), world_size(), counts=rank() < num_blocks)

    def blocks(self, blocks: Int[Tensor, "blocks tokens"]) -> Int[Tensor, "part tokens"]:
        """Those of this process: of any beginning it has as many as the others."""
        return blocks[self.rank :: self.size] if self.counts else blocks[:1]

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all blocks, from those over every process' own, which are overwritten."""
        if self.size > 1:
            if not self.counts:
                sums.zero_()
            distributed.all_reduce(sums)
        return sums

    def count(self, number: int, device: torch.device) -> int:
        """The total of a number, such as of tokens."""
        if self.size == 1:
            return number
        return int(self.total(torch.tensor(number, device=device)).item())

    def rows(self, number: int) -> Int[Tensor, " rows"]:
        """Those of a matrix that this process solves for."""
        return torch.arange(number).tensor_split(self.size)[self.rank]

    def join(self, matrix: Tensor, device: torch.device) -> None:
        """Give all rows of a matrix to every process, of which each has its own.

        Args:
            matrix: anywhere; it is overwritten.
            device: on which processes exchange.
        """
        if self.size == 1:
            return
        rows = self.rows(len(matrix))
        joined = torch.zeros_like(matrix, device=device)
        joined[rows.to(device)] = matrix[rows.to(matrix.device)].to(device)
        distributed.all_reduce(joined)  # one number and zeros, so it is exact
        matrix.copy_(joined)

    def has(self, layer: int) -> bool:
        """Whether this process solves for a layer of the student."""
        return layer % self.size == self.rank

    def of_layer(self, tensor: Tensor, layer: int, device: torch.device) -> Tensor:
        """A layer's tensor as the process has it that solves for the layer.

        Args:
            tensor: of the same shape on every process, on the CPU; returned where this process has
                all layers.
            layer: of the student.
            device: on which processes exchange.
        """
        if self.size == 1:
            return tensor
        sent = tensor.to(device, copy=True).contiguous()
        distributed.broadcast(sent, src=layer % self.size)
        return sent.to(tensor.device)


ALONE = Share()
"""All of the work, for a process that does it by itself."""
