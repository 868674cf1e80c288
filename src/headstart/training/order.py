"""The order in which a training reads its blocks: known before it begins.

A teacher cache holds its blocks in this order, so that training may begin on its first shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

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
    epochs = range(-(-num_reads // num_blocks))
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


def arm_order(
    arm: Arm,
    settings: PretrainSettings,
    train: dict[str, Any],
    num_blocks: int,
    block_length: int,
) -> Int64[np.ndarray, " reads"]:
    """`training_order` of an arm's largest budget; its smaller ones read the beginning of it.

    Args:
        train: the recipe's `train:` block.
        num_blocks: of the training split.
        block_length: their tokens.
    """
    arguments = training_arguments(train, arm, Path())
    largest = arm_budgets(arm, settings, train, block_length)[-1]
    blocks_per_step = tokens_per_step(arguments, block_length) // block_length
    return training_order(num_blocks, largest.num_steps * blocks_per_step, order_seed(arguments))
