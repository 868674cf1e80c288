"""What a recipe would cost, printed before money is spent; reads configs only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from headstart.assets import DEMO, demo_teacher
from headstart.pipeline import bin_recipes
from headstart.pretrain.arms import Arm, tokens_per_step, training_arguments
from headstart.pretrain.plan import ArmPlan, Batch, Hardware, arms_table, plan_arm
from headstart.pretrain.variants import variants_of
from headstart.recipe import Recipe
from headstart.search.plan import SearchPlan, plan_search, plan_table
from headstart.search.run import space_of
from headstart.subnet.axes import Sizes
from headstart.subnet.calibrate import cut_config
from headstart.subnet.rules import family_of, read_config, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def print_plans(recipe: Recipe, hardware: Hardware) -> list[list[ArmPlan]]:
    """Print what searching and training would cost, for each bin; reads configs only.

    The student is the shape in the bin that is nearest to the teacher's proportions.

    Returns:
        The plan of each arm, for each bin.
    """
    config, block_length = teacher_config(recipe), recipe.data.block_length
    print_search_plans(recipe)
    plans = []
    for one in bin_recipes(recipe):
        (nearest,) = space_of(config, one.search, block_length).proportional(1)
        shape = nearest.sizes()
        per_layer = {k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()}
        sizes = sizes_of(config) | per_layer
        cut = cut_config(config, one.search.init)
        plans.append([_plan_of(arm, one, cut, sizes, hardware) for arm in one.pretrain.arms])
        named = ", ".join(f"{axis} {size}" for axis, size in shape.items())
        Console().print(arms_table(plans[-1], hardware, f"a student with {named}"))
    return plans


def _plan_of(
    arm: Arm, recipe: Recipe, teacher: PreTrainedConfig, sizes: Sizes, hardware: Hardware
) -> ArmPlan:
    """The plan of one arm, with its own batch, and all of its runs."""
    arguments = training_arguments(recipe.train, arm, Path(recipe.output))
    block_length = recipe.data.block_length
    batch = Batch(arguments.train_batch_size, block_length, arguments.gradient_checkpointing)
    step_tokens = tokens_per_step(arguments, block_length) * hardware.gpus
    tokens = math.ceil(recipe.pretrain.tokens / step_tokens) * step_tokens
    runs = len(variants_of(arm, recipe.pretrain.seeds))
    return plan_arm(arm, tokens, teacher, sizes, batch, hardware, runs)


def print_search_plans(recipe: Recipe) -> list[SearchPlan]:
    """Print what a search would do and cost, for each bin; reads configs only."""
    config = teacher_config(recipe)
    plans = []
    for one in bin_recipes(recipe):
        plans.append(plan_search(config, one.search, recipe.data.block_length))
        Console().print(plan_table(plans[-1], one.search.bin.label()))
    return plans


def teacher_config(recipe: Recipe) -> PreTrainedConfig:
    """The config of a recipe's teacher, without its weights.

    Raises:
        ValueError: there is no such folder or model, or no table knows its family.
    """
    if recipe.teacher == DEMO or Path(recipe.teacher).is_dir():
        return read_config(demo_teacher() if recipe.teacher == DEMO else Path(recipe.teacher))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(recipe.teacher)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {recipe.teacher!r} is neither a folder nor a model whose config can be "
            f"fetched from the hub ({str(error).splitlines()[0]})"
        ) from error
    family_of(config)
    return config
