"""What a recipe would cost, printed before money is spent; reads configs only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.calibration.costs import refit_bytes
from headstart.calibration.start import cut_architecture
from headstart.model.architecture import Architecture
from headstart.recipe import Recipe
from headstart.runs.caches import cached_distillation
from headstart.runs.run import bin_recipes, in_tokens, needed_text
from headstart.runs.vocabulary import planned_architecture
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.plan import SearchPlan, plan_search, plan_table
from headstart.searching.run import space_of
from headstart.system.formats import bytes_text
from headstart.system.progress import output
from headstart.text.blocks import token_dtype
from headstart.text.needs import BYTES_PER_TOKEN, Needed
from headstart.text.prepare import parts_of
from headstart.training.arguments import tokens_per_step, training_arguments
from headstart.training.budgets import budgets_of
from headstart.training.cache import CacheIdentity, bytes_per_token
from headstart.training.memory import setup_of
from headstart.training.plan import ArmPlan, Hardware, arms_table, misfits, plan_arm
from headstart.training.settings import Arm
from headstart.training.variants import variants_of


def print_plans(recipe: Recipe, hardware: Hardware) -> list[list[ArmPlan]]:
    """Print what searching and training would cost, for each bin; reads configs only.

    The student is the shape in the bin that is nearest to the teacher's proportions. What is
    returned is the plan of each arm, for each bin.
    """
    teacher = planned_architecture(recipe)
    output.print(text_table(planned_text(recipe, teacher)))
    print_search_plans(recipe, teacher)
    plans = []
    for of_bin in bin_recipes(recipe):
        of_arms, nearest = plan_arms(of_bin, teacher, hardware)
        plans.append(of_arms)
        named = ", ".join(f"{axis} {size}" for axis, size in nearest.sizes().items())
        output.print(arms_table(of_arms, hardware, f"a student with {named}"))
        for sentence in misfits(of_arms, hardware):
            output.print(sentence)
    return plans


def plan_arms(
    recipe: Recipe, teacher: Architecture, hardware: Hardware
) -> tuple[list[ArmPlan], Candidate]:
    """The plan of each arm of a single bin, and the shape that they were planned for.

    Raises:
        UserError: the bin holds no shape.
    """
    space = space_of(teacher, recipe.search, recipe.data.block_length)
    (nearest,) = space.proportional(1)
    cut_teacher = cut_architecture(teacher, recipe.search.init)
    student = cut_teacher.student(nearest.spec(cut_teacher, Orders.of_teacher(teacher.sizes)))
    arms = recipe.pretrain.arms
    return [_plan_of(arm, recipe, cut_teacher, student, hardware) for arm in arms], nearest


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
    needed = needed_text(recipe)
    if data.max_tokens:
        needed = Needed({"train": len(parts_of(data)) * data.max_tokens})
    tokens = needed.first_tokens(data)
    cached_tokens = math.ceil(tokens * data.share("train"))
    caches = {kd.cache: kd for kd in cached_distillation(recipe.pretrain.arms)}
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
    table.add_row("read, about", f"{plan.tokens:.3g}", bytes_text(plan.disk_bytes), "")
    for path, size in plan.cache_bytes.items():
        flops = f"{plan.cache_flops:.2e}"
        table.add_row(f"cache {path}", f"{plan.cached_tokens:.3g}", bytes_text(size), flops)
    return table


def _plan_of(
    arm: Arm, recipe: Recipe, teacher: Architecture, student: Architecture, hardware: Hardware
) -> ArmPlan:
    """The plan of one arm, with its own batch, and all of its runs."""
    arguments = training_arguments(recipe.train, arm, Path(recipe.output))
    data, search = recipe.data, recipe.search
    refit = 0
    if arm.init == "subnet" and search.init != "slice":
        refit = refit_bytes(teacher, student, search.calibration_tokens, search.is_measured)
    train = {**recipe.train, **arm.train}
    setup = setup_of(arguments, train, data.block_length, data.separate_documents, refit)
    # It will run on a GPU, whatever this machine has.
    has_bf16 = bool(train.get("bf16", True) or train.get("fp16"))
    setup = replace(setup, batch=replace(setup.batch, has_bf16=has_bf16))
    step_tokens = tokens_per_step(arguments, data.block_length) * hardware.gpus
    settings = in_tokens(recipe.pretrain, BYTES_PER_TOKEN)
    *smaller, largest = budgets_of(settings, step_tokens, arguments.warmup_steps, train)
    tokens = step_tokens * (largest.num_steps + sum(budget.decay_steps for budget in smaller))
    runs = len(variants_of(arm, recipe.pretrain.seeds))
    return plan_arm(arm, tokens, teacher, student, setup, hardware, runs)


def print_search_plans(recipe: Recipe, teacher: Architecture) -> list[SearchPlan]:
    """Print what a search would do and cost, for each bin; reads configs only."""
    plans = []
    for of_bin in bin_recipes(recipe):
        plans.append(plan_search(teacher, of_bin.search, recipe.data.block_length))
        output.print(plan_table(plans[-1], of_bin.search.bin.label()))
    return plans
