"""The order in which a training reads its blocks: known before it begins.

A teacher cache holds its blocks in this order, so that training may begin on its first shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from headstart.losses.distillation import DistillationSettings
from headstart.training.arguments import tokens_per_step, training_arguments
from headstart.training.budgets import Budget, budgets_of
from headstart.training.settings import Arm, PretrainSettings


def training_order(num_blocks: int, num_reads: int, seed: int) -> Int64[np.ndarray, " reads"]:
    """The place in the training split of each block that a training reads.

    Every epoch is a permutation of the whole split, with a seed of its own, as accelerate shuffles.
    A shorter training reads the beginning of a longer one's order.

    Args:
        num_blocks: of the split.
        num_reads: blocks in all steps together.
        seed: of the first epoch; the next has the next.
    """
    epochs = range(max(1, -(-num_reads // num_blocks)))
    generators = [torch.Generator().manual_seed(seed + epoch) for epoch in epochs]
    orders = [torch.randperm(num_blocks, generator=generator) for generator in generators]
    return torch.cat(orders)[:num_reads].numpy()


def first_reads(orders: Sequence[Int64[np.ndarray, " reads"]]) -> Int64[np.ndarray, " blocks"]:
    """Every place in several orders once, as the first of them that has it comes to it.

    >>> first_reads([np.array([3, 1, 3]), np.array([1, 0])]).tolist()
    [3, 1, 0]
    """
    together = np.concatenate(orders)
    _, first = np.unique(together, return_index=True)
    return np.asarray(together[np.sort(first)])


def asked_reads(
    kd: DistillationSettings | None, num_steps: int, step_tokens: int, block_length: int
) -> range:
    """Of the reads of so many steps, those for which a teacher has a weight; all without one."""
    steps = kd.asked_steps(num_steps, step_tokens) if kd else range(num_steps)
    blocks_per_step = step_tokens // block_length
    return range(steps.start * blocks_per_step, steps.stop * blocks_per_step)


def order_seed(arguments: Any) -> int:
    """The seed of a training's order, by its TrainingArguments."""
    return int(arguments.seed if arguments.data_seed is None else arguments.data_seed)


def arm_budgets(
    arm: Arm, settings: PretrainSettings, train: dict[str, Any], block_length: int
) -> list[Budget]:
    """Every budget of an arm in its own steps, ascending; errors as `budgets_of`."""
    arguments = training_arguments(train, arm, Path())
    step_tokens = tokens_per_step(arguments, block_length)
    return budgets_of(settings, step_tokens, arguments.warmup_steps, {**train, **arm.train})


class Reads(NamedTuple):
    """A part of a training's order: the reads from `start` to before `stop`, with its `seed`."""

    seed: int
    start: int
    stop: int


def arm_reads(
    arm: Arm, settings: PretrainSettings, train: dict[str, Any], block_length: int
) -> Reads:
    """Those of an arm's largest budget in whose steps it learns from a teacher; all if it has none.

    Smaller budgets read the beginning of the same order.

    Args:
        train: the recipe's `train:` block.
        block_length: tokens of a block.
    """
    arguments = training_arguments(train, arm, Path())
    num_steps = arm_budgets(arm, settings, train, block_length)[-1].num_steps
    step_tokens = tokens_per_step(arguments, block_length)
    asked = asked_reads(arm.kd, num_steps, step_tokens, block_length)
    return Reads(order_seed(arguments), asked.start, asked.stop)


@dataclass(frozen=True)
class Wanted:
    """What of a text a teacher cache is to hold.

    Attributes:
        text: fingerprint of the blocks.
        reads: what arms read of its training split, the first first.
    """

    text: str
    reads: tuple[Reads, ...]

    def covers(self, other: Wanted) -> bool:
        """Whether all of another's blocks are among these."""
        return self.text == other.text and all(
            any(
                ours.seed == theirs.seed and ours.start <= theirs.start and theirs.stop <= ours.stop
                for ours in self.reads
            )
            for theirs in other.reads
        )

    def widened(self) -> Wanted:
        """The same and up to a thirty-second more of each, since another number of processes
        rounds a budget up to other steps.

        >>> Wanted("", (Reads(0, 0, 1001),)).widened().reads[0].stop
        1008
        """

        def wide(reads: Reads) -> Reads:
            grain = max(1, (1 << reads.stop.bit_length()) >> 6)
            return reads._replace(stop=-(-reads.stop // grain) * grain)

        return Wanted(self.text, tuple(map(wide, self.reads)))

    def order(self, num_blocks: int) -> Int64[np.ndarray, " blocks"]:
        """Its places in a split of so many blocks, each once, the first to be read first."""
        return first_reads(
            [
                training_order(num_blocks, reads.stop, reads.seed)[reads.start :]
                for reads in self.reads
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "reads": [list(reads) for reads in self.reads]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Wanted:
        """Read what `to_json` writes."""
        return Wanted(value["text"], tuple(Reads(*reads) for reads in value["reads"]))
