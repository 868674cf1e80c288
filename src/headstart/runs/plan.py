"""What a recipe would cost, printed before money is spent; reads configs only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.calibration.costs import refit_bytes
from headstart.calibration.start import cut_architecture
from headstart.model.architecture import Architecture
from headstart.recipe import Recipe
from headstart.runs.caches import cached_distillation
from headstart.runs.correction import check_correction, correction_recipe
from headstart.runs.run import bin_recipes, in_tokens, needed_text
from headstart.runs.teachers import planned_teachers
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
    teachers = planned_teachers(recipe)
    teacher = teachers[""]
    output.print(text_table(planned_text(recipe, teachers)))
    if correction := plan_correction(recipe, teacher, hardware):
        title = "the teacher, tuned on the text"
        output.print(arms_table([correction], hardware, title, is_of_teacher=True))
        for sentence in misfits([correction], hardware, "a smaller teacher"):
            output.print(sentence)
    print_search_plans(recipe, teacher)
    plans = []
    for of_bin in bin_recipes(recipe):
        of_arms, nearest = plan_arms(of_bin, teachers, hardware)
        plans.append(of_arms)
        named = ", ".join(f"{axis} {size}" for axis, size in nearest.sizes().items())
        output.print(arms_table(of_arms, hardware, f"a student with {named}"))
        for sentence in misfits(of_arms, hardware):
            output.print(sentence)
    return plans


def misfit_sentences(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Which arms of a recipe do not fit the hardware, and what would; reads configs only."""
    teachers = planned_teachers(recipe)
    return [
        sentence
        for of_bin in bin_recipes(recipe)
        for sentence in misfits(plan_arms(of_bin, teachers, hardware)[0], hardware)
    ]


def plan_arms(
    recipe: Recipe, teachers: Mapping[str, Architecture], hardware: Hardware
) -> tuple[list[ArmPlan], Candidate]:
    """The plan of each arm of a single bin, and the shape that they were planned for.

    Args:
        teachers: by `kd.teacher`.

    Raises:
        UserError: the bin holds no shape.
    """
    teacher = teachers[""]
    space = space_of(teacher, recipe.search, recipe.data.block_length)
    (nearest,) = space.proportional(1)
    cut_teacher = cut_architecture(teacher, recipe.search.init)
    student = cut_teacher.student(nearest.spec(cut_teacher, Orders.of_teacher(teacher.sizes)))
    arms = recipe.pretrain.arms
    plans = [_plan_of(arm, recipe, cut_teacher, student, teachers, hardware) for arm in arms]
    return plans, nearest


@dataclass(frozen=True)
class TextPlan:
    """What is read and written before the first step of training.

    Attributes:
        tokens: that are read of the text, in all splits; fewer if it holds fewer.
        disk_bytes: that they take, by files and joined.
        cached_tokens: that arms read of the training split, of which their teacher cache knows the
            outputs, by its path.
        cache_bytes: of each cache, by its path.
        cache_flops: of the teacher's, to write each.
    """

    tokens: int
    disk_bytes: int
    cached_tokens: dict[str, int]
    cache_bytes: dict[str, int]
    cache_flops: dict[str, int]


def planned_text(recipe: Recipe, teachers: Mapping[str, Architecture]) -> TextPlan:
    """Plan the text of a recipe and its teacher caches; teachers are by `kd.teacher`."""
    data, vocab = recipe.data, teachers[""].sizes["vocab"]
    needed = needed_text(recipe, teachers[""])
    if data.max_tokens:
        needed = Needed({"train": len(parts_of(data)) * data.max_tokens})
    tokens = needed.first_tokens(data)
    split_tokens = math.ceil(tokens * data.share("train"))
    caches = {kd.cache: kd for kd in cached_distillation(recipe.pretrain.arms)}
    cached_tokens = {
        path: distinct_reads(
            split_tokens,
            in_tokens(recipe.pretrain, BYTES_PER_TOKEN).budget_tokens[-1],
            max(1, len(recipe.pretrain.seeds)),
        )
        for path in caches
    }
    return TextPlan(
        tokens=tokens,
        disk_bytes=2 * tokens * token_dtype(vocab).itemsize,
        cached_tokens=cached_tokens,
        cache_bytes={
            path: cached_tokens[path]
            * bytes_per_token(CacheIdentity.of(kd, ""), teachers[kd.teacher].sizes["vocab"])
            for path, kd in caches.items()
        },
        cache_flops={
            path: cached_tokens[path]
            * teachers[kd.teacher].count(data.block_length).inference_flops_per_token
            for path, kd in caches.items()
        },
    )


def distinct_reads(num_tokens: int, num_read: int, num_seeds: int) -> int:
    """Of a split's tokens, those that trainings in several orders read, as far as chance tells."""
    unread = 1 - min(1.0, num_read / num_tokens)
    return math.ceil(num_tokens * (1 - unread**num_seeds))


def text_table(plan: TextPlan) -> Table:
    """A plan of text and caches for the terminal."""
    table = Table(title="text", box=SIMPLE_HEAD)
    for heading in ("", "tokens", "on disk", "teacher's FLOPs"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("read, about", f"{plan.tokens:.3g}", bytes_text(plan.disk_bytes), "")
    for path, size in plan.cache_bytes.items():
        flops = f"{plan.cache_flops[path]:.2e}"
        table.add_row(f"cache {path}", f"{plan.cached_tokens[path]:.3g}", bytes_text(size), flops)
    return table


def _plan_of(
    arm: Arm,
    recipe: Recipe,
    cut_teacher: Architecture,
    student: Architecture,
    teachers: Mapping[str, Architecture],
    hardware: Hardware,
) -> ArmPlan:
    """The plan of one arm, with its own batch, and all of its runs.

    Args:
        cut_teacher: what the student is cut out of.
        teachers: that arms distil from, by `kd.teacher`.
    """
    arguments = training_arguments(recipe.train, arm, Path(recipe.output))
    data, search = recipe.data, recipe.search.for_teacher(cut_teacher)
    refit = 0
    if arm.init == "subnet" and search.init != "slice":
        blocks = math.ceil(search.calibration_tokens / data.block_length)
        tokens = math.ceil(blocks / hardware.gpus) * data.block_length  # of each process
        refit = refit_bytes(cut_teacher, student, tokens, search.is_measured)
    train = {**recipe.train, **arm.train}
    setup = setup_of(arguments, train, data.block_length, data.separate_documents, refit)
    # It will run on a GPU, whatever this machine has.
    has_bf16 = bool(train.get("bf16", True) or train.get("fp16"))
    setup = replace(setup, batch=replace(setup.batch, has_bf16=has_bf16))
    step_tokens = tokens_per_step(arguments, data.block_length) * hardware.gpus
    settings = in_tokens(recipe.pretrain, BYTES_PER_TOKEN)
    *smaller, largest = budgets_of(settings, step_tokens, arguments.warmup_steps, train)
    tokens = step_tokens * (largest.num_steps + sum(budget.decay_steps for budget in smaller))
    teacher = teachers[arm.kd.teacher if arm.kd else ""]
    runs = len(variants_of(arm, recipe.pretrain.seeds))
    return plan_arm(arm, tokens, teacher, student, setup, hardware, runs)


def plan_correction(recipe: Recipe, teacher: Architecture, hardware: Hardware) -> ArmPlan | None:
    """The plan of tuning the teacher; None if the recipe does not ask for it."""
    if not recipe.teacher_correction.tokens:
        return None
    check_correction(recipe, hardware.gpus)
    asked = correction_recipe(recipe)
    (arm,) = asked.pretrain.arms
    return _plan_of(arm, asked, teacher, teacher, {"": teacher}, hardware)


def print_search_plans(recipe: Recipe, teacher: Architecture) -> list[SearchPlan]:
    """Print what a search would do and cost, for each bin; reads configs only."""
    plans = []
    for of_bin in bin_recipes(recipe):
        plans.append(plan_search(teacher, of_bin.search, recipe.data.block_length))
        output.print(plan_table(plans[-1], of_bin.search.bin.label()))
    return plans
