"""What makes a candidate a good place to begin: its held-out loss before any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from headstart.evaluate import mean_loss
from headstart.search.space import Candidate, Orders
from headstart.subnet.extract import build_student


@dataclass(frozen=True)
class HeldOutLoss:
    """Scores candidates cut out of a resident teacher, in nats per token; lower is better.

    Attributes:
        state: the teacher's state dict.
        config: the teacher's config.
        orders: the axis orders in which candidates are read.
        blocks: the tokens of which every candidate's loss is taken.
        batch_size: blocks per forward pass.
    """

    state: Mapping[str, Tensor]
    config: PreTrainedConfig
    orders: Orders
    blocks: Int[Tensor, "blocks tokens"]
    batch_size: int = 8

    def __call__(self, candidate: Candidate) -> float:
        student = build_student(self.state, self.config, candidate.spec(self.orders))
        return mean_loss(student, self.blocks, self.batch_size)
