"""The demo's teacher and text, as the benchmarks of the search use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import load_recipe
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.fitness import HeldOutLoss
from headstart.searching.importance import measure_importance
from headstart.system.device import default_device, load_frozen
from headstart.system.files import shipped
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import prepare

CALIBRATION_TOKENS = 8_192
BIN = Bin(22_000_000, 24_000_000)


@dataclass(frozen=True)
class RealTeacher:
    """A teacher in memory with its importance orders and its text."""

    model: Any
    architecture: Architecture
    blocks: TokenBlocks
    orders: Orders

    def fitness(self, num_tokens: int) -> HeldOutLoss:
        """The loss of slices on so many held-out tokens of the search split."""
        held_out = self.blocks.sample("search", num_tokens)
        batch_size = max(1, 2048 // held_out.shape[1])
        return HeldOutLoss(self.model, self.architecture, self.orders, held_out, batch_size)

    def parameters(self, candidate: Candidate) -> int:
        sizes = {**self.architecture.sizes, **candidate.sizes()}
        return int(self.architecture.amount(sizes, "parameters", 1))


def load() -> RealTeacher:
    """The demo's teacher, its text, and the importance of its units."""
    recipe = load_recipe(shipped("demo.yaml"))
    teacher = Checkpoint.open(recipe.teacher)
    blocks = prepare(recipe.data, teacher.folder)
    model = load_frozen(teacher.folder, default_device())
    calibration = blocks.sample("train", CALIBRATION_TOKENS)
    importance = measure_importance(model, calibration.split(8))
    return RealTeacher(model, teacher.architecture, blocks, importance.orders())
