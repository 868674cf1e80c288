"""The demo's teacher and text, as the benchmarks of the search use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.cli import demo_recipe
from headstart.data import TokenBlocks
from headstart.device import default_device, load_frozen
from headstart.pipeline import data_settings, teacher_folder
from headstart.prepare import prepare
from headstart.recipe import load_recipe
from headstart.search.bins import Bin
from headstart.search.candidate import Candidate, Orders
from headstart.search.fitness import HeldOutLoss
from headstart.search.importance import activation_importance
from headstart.subnet.count import amount
from headstart.subnet.rules import read_config, sizes_of

CALIBRATION_TOKENS = 8_192
BIN = Bin(22_000_000, 24_000_000)


@dataclass(frozen=True)
class RealTeacher:
    """A teacher in memory with its importance orders and its text."""

    model: Any
    config: Any
    blocks: TokenBlocks
    orders: Orders

    def fitness(self, num_tokens: int) -> HeldOutLoss:
        """The loss on so many held-out tokens of the search split."""
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        state = {name: one for name, one in self.model.state_dict().items() if name not in tied}
        held_out = self.blocks.first("search", num_tokens)
        batch_size = max(1, 2048 // held_out.shape[1])
        return HeldOutLoss(state, self.config, self.orders, held_out, batch_size)

    def parameters(self, candidate: Candidate) -> int:
        sizes = {
            axis: tuple(size) if isinstance(size, list) else size
            for axis, size in candidate.sizes().items()
        }
        return int(amount(self.config, {**sizes_of(self.config), **sizes}, "parameters", 1))


def load() -> RealTeacher:
    """The demo's teacher, its text, and the importance of its units."""
    recipe = load_recipe(Path(demo_recipe()))
    folder = teacher_folder(recipe)
    blocks = prepare(data_settings(recipe.data), folder)
    model = load_frozen(folder, default_device())
    calibration = blocks.first("train", CALIBRATION_TOKENS)
    importance = activation_importance(model, calibration.split(8))
    return RealTeacher(model, read_config(folder), blocks, importance.orders())
