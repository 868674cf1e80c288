"""What a recipe would cost, printed before money is spent; reads configs only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.calibration.start import cut_architecture
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.recipe import Recipe
from headstart.runs.run import bin_recipes, in_tokens, needed_text
from headstart.runs.vocabulary import planned_architecture
from headstart.searching.plan import SearchPlan, plan_search, plan_table
from headstart.searching.run import space_of
from headstart.system.formats import bytes_text
from headstart.system.progress import output
from headstart.text.blocks import token_dtype
from headstart.text.needs import Needed
from headstart.training.arguments import tokens_per_step, training_arguments
from headstart.training.budgets import budgets_of
from headstart.training.cache import CacheIdentity, bytes_per_token
from headstart.training.plan import ArmPlan, Batch, Hardware, arms_table, plan_arm
from headstart.training.settings import Arm
from headstart.training.variants import variants_of

BYTES_PER_TOKEN = 4.0
"""Of a text that no plan reads, for a budget in bytes; English has about so many."""


def print_plans(recipe: Recipe, hardware: Hardware) -> list[list[ArmPlan]]:
    """Print what searching and training would cost, for each bin; reads configs only.

    The student is the shape in the bin that is nearest to the teacher's proportions. What is
    returned is the plan of each arm, for each bin.
    """
    teacher, block_length = planned_architecture(recipe), recipe.data.block_length
    output.print(text_table(planned_text(recipe, teacher)))
    print_search_plans(recipe, teacher)
    plans = []
    for of_bin in bin_recipes(recipe):
        (nearest,) = space_of(teacher, of_bin.search, block_length).proportional(1)
        sizes = {**teacher.sizes, **nearest.sizes()}
        cut_teacher = cut_architecture(teacher, of_bin.search.init)
        plans.append(
            [_plan_of(arm, of_bin, cut_teacher, sizes, hardware) for arm in of_bin.pretrain.arms]
        )
        named = ", ".join(f"{axis} {size}" for axis, size in nearest.sizes().items())
        output.print(arms_table(plans[-1], hardware, f"a student with {named}"))
    return plans


@dataclass(frozen=True)
class TextPlan:
    """What is read and written before the first step of training.

    Attributes:
        tokens: that are read of the text, in all splits; fewer if it holds fewer.
        disk_bytes: that they take, by files and joined.
        cached_tokens: of the training split, of which each teacher cache knows the outputs.
        cache_bytes: of each cache, by its path.
        cache_flops: of the teacher's, to write one.
    """

    tokens: int
    disk_bytes: int
    cached_tokens: int
    cache_bytes: dict[str, int]
    cache_flops: int


def planned_text(recipe: Recipe, teacher: Architecture) -> TextPlan:
    """Plan the text of a recipe and its teacher caches."""
    data, vocab = recipe.data, teacher.sizes["vocab"]
    needed = Needed({"train": data.max_tokens}) if data.max_tokens else needed_text(recipe)
    tokens = needed.first_tokens(data)
    cached_tokens = math.ceil(tokens * data.share("train"))
    caches = {arm.kd.cache: arm.kd for arm in recipe.pretrain.arms if arm.kd and arm.kd.cache}
    return TextPlan(
        tokens=tokens,
        disk_bytes=2 * tokens * token_dtype(vocab).itemsize,
        cached_tokens=cached_tokens,
        cache_bytes={
            path: cached_tokens * bytes_per_token(CacheIdentity.of(kd, "", ""), vocab)
            for path, kd in caches.items()
        },
        cache_flops=int(cached_tokens * teacher.count(data.block_length).inference_flops_per_token),
    )


def text_table(plan: TextPlan) -> Table:
    """A plan of text and caches for the terminal."""
    table = Table(title="text", box=SIMPLE_HEAD)
    for heading in ("", "tokens", "on disk", "teacher's FLOPs"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("read at most", f"{plan.tokens:.3g}", bytes_text(plan.disk_bytes), "")
    for path, size in plan.cache_bytes.items():
        flops = f"{plan.cache_flops:.2e}"
        table.add_row(f"cache {path}", f"{plan.cached_tokens:.3g}", bytes_text(size), flops)
    return table


def _plan_of(
    arm: Arm, recipe: Recipe, teacher: Architecture, sizes: Sizes, hardware: Hardware
) -> ArmPlan:
    """The plan of one arm, with its own batch, and all of its runs."""
    arguments = training_arguments(recipe.train, arm, Path(recipe.output))
    block_length = recipe.data.block_length
    # Later versions call it activation_checkpointing, and let the older name mirror it.
    batch = Batch(arguments.train_batch_size, block_length, arguments.gradient_checkpointing)
    step_tokens = tokens_per_step(arguments, block_length) * hardware.gpus
    settings = in_tokens(recipe.pretrain, BYTES_PER_TOKEN)
    train = {**recipe.train, **arm.train}
    *smaller, largest = budgets_of(settings, step_tokens, arguments.warmup_steps, train)
    tokens = step_tokens * (largest.num_steps + sum(budget.decay_steps for budget in smaller))
    runs = len(variants_of(arm, recipe.pretrain.seeds))
    return plan_arm(arm, tokens, teacher, sizes, batch, hardware, runs)


def print_search_plans(recipe: Recipe, teacher: Architecture) -> list[SearchPlan]:
    """Print what a search would do and cost, for each bin; reads configs only."""
    plans = []
    for of_bin in bin_recipes(recipe):
        plans.append(plan_search(teacher, of_bin.search, recipe.data.block_length))
        output.print(plan_table(plans[-1], of_bin.search.bin.label()))
    return plans
