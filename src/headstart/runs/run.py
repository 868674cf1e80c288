"""A run: its recipe, folder, teacher and text, checked and prepared once for all stages.

A run folder holds:

    recipe.yaml               what the run is; another recipe is refused
    inputs.json               hashes of text, teachers and given student, which may not change, and
                              commits of what is on the hub
    orders.json               what the ranks of the search mean
    search.jsonl, search.json the journal of the search and its outcome
    search.html               a page about it
    student/                  the extracted sub-network
    compared.json             losses of the teacher and of the baselines
    arms/NAME/                checkpoints and TensorBoard logs; then model/ and arm.json; it has a
                              lock of its own
    result.json, report.html  the answer
    error.txt                 the traceback of the last failure that was not the user's mistake

A run over several bins holds one such folder for each, beside its own recipe.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import Recipe
from headstart.runs.correction import check_correction, trainings_of
from headstart.runs.exhibits import check_report
from headstart.runs.folder import REVISIONS, check_run_folder, locked, pin_inputs, pin_recipe
from headstart.runs.revisions import at_commits, find_revisions
from headstart.runs.shapes import arm_shapes
from headstart.runs.teachers import checked_teachers, trimmed_alike
from headstart.runs.vocabulary import check_trims, left_of, trimmed_teacher
from headstart.searching.run import space_of
from headstart.system.distributed import from_main, process_group
from headstart.system.errors import UserError
from headstart.system.settings import settings_from_tree, tree_of
from headstart.text.blocks import TokenBlocks
from headstart.text.needs import Needed
from headstart.text.prepare import check_vocabulary, prepare
from headstart.text.settings import DataSettings, SplitName
from headstart.training.arguments import (
    check_step,
    tokens_per_step,
    training_arguments,
)
from headstart.training.budgets import budgets_of
from headstart.training.cache import check_cache
from headstart.training.settings import PROPORTIONAL, PretrainSettings
from headstart.training.teacher import DistillationTeacher
from headstart.training.trials import check_arguments

LEAST_TRAINING_TOKENS = 1_000_000
"""Read in any case, so that a budget of less than one step finds a whole one."""
BYTES_MARGIN = 1.02
"""A budget in bytes becomes tokens by the validation split, whose tokens may be shorter."""


@dataclass(frozen=True)
class Run:
    """What every stage is given.

    Attributes:
        recipe: of a single bin, unless the run has several; with the budget in tokens, and the
            tokens of calibration that suit the teacher.
        folder: of the run.
        teacher: its checkpoint with the vocabulary that is left, already hashed; corrected if the
            recipe asks for it, once the stage has run.
        text: in tokens.
        student: one that was extracted before; None where a search finds it.
        revisions: commits of what is on the hub, by its name in the recipe.
        others: teachers that arms name themselves, by their names, with the same vocabulary left.
    """

    recipe: Recipe
    folder: Path
    teacher: Checkpoint
    text: TokenBlocks
    student: Checkpoint | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, DistillationTeacher] = field(default_factory=dict)

    @property
    def teachers(self) -> dict[str, DistillationTeacher]:
        """All that arms distil from, by `kd.teacher`."""
        return {"": DistillationTeacher(self.teacher), **self.others}

    @property
    def pinned(self) -> Recipe:
        """The recipe with commits in its names on the hub."""
        return at_commits(self.recipe, self.revisions)

    def bins(self) -> list[Run]:
        """A run for each bin, in a folder of its own; this one where there is a single bin."""
        recipes = bin_recipes(self.recipe)
        return [replace(self, recipe=recipe, folder=Path(recipe.output)) for recipe in recipes]


def bin_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of each bin's own run; the recipe itself where it has a single bin."""
    if not recipe.search.bins:
        return [recipe]
    return [
        replace(
            recipe,
            output=str(Path(recipe.output) / bin.label()),
            search=replace(recipe.search, bin=bin, bins=()),
        )
        for bin in recipe.search.bins
    ]


def bin_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one bin's own run, in the folder that it has in the run of them all.

    Raises:
        UserError: the recipe has no several bins, or none of that name.
    """
    recipes = {of_bin.search.bin.label(): of_bin for of_bin in bin_recipes(recipe)}
    if not recipe.search.bins or name not in recipes:
        found = ", ".join(recipes) if recipe.search.bins else "the recipe has no search.bins"
        raise UserError(f"--bin is {name!r}; choose one of these: {found}")
    return recipes[name]


@contextmanager
def open_run(recipe: Recipe, student: str = "", waits: bool = False) -> Iterator[Run]:
    """Check a recipe, prepare its text, hash its inputs, and lock its folder for the body.

    Under torchrun every process calls it, and the main one decides.

    Args:
        recipe: what is asked.
        student: folder of an extracted student; the recipe's own, or none, if empty.
        waits: for another process that works in the folder, instead of refusing.

    Raises:
        UserError: the first mistake found, with its mend. Nothing costly has run by then, and
            nothing on disk has changed.
    """
    with ExitStack() as stack:
        stack.enter_context(process_group())
        recipes = [recipe, *bin_recipes(recipe)] if recipe.search.bins else [recipe]

        def check_and_lock() -> _Checked:
            folders = [Path(folder_recipe.output) for folder_recipe in recipes]
            if waits:  # first, since what is there may be another's by the end
                for folder_recipe in recipes:
                    check_run_folder(folder_recipe)
                for folder in folders:
                    stack.enter_context(locked(folder, waits))
            found = _checked(recipe, student or recipe.student)
            for folder_recipe in recipes:
                check_run_folder(folder_recipe)
            for folder in folders if not waits else ():
                stack.enter_context(locked(folder))
            return found

        whole, others, given, revisions = from_main(check_and_lock)
        data = at_commits(recipe, revisions).data
        teacher = from_main(lambda: trimmed_teacher(whole, recipe.vocabulary, data))
        others = from_main(lambda: trimmed_alike(others, whole, teacher))
        recipe = replace(recipe, search=recipe.search.for_teacher(teacher.architecture))
        text = prepare(data, teacher.folder, needed=needed_text(recipe, teacher.architecture))

        def check_and_pin() -> tuple[Checkpoint, dict[str, DistillationTeacher]]:
            inputs = _inputs(recipe, teacher, given, text) | {REVISIONS: revisions}
            inputs |= {f"kd.teacher {name}": of.checkpoint.hash for name, of in others.items()}
            for folder_recipe in recipes:
                pin_inputs(pin_recipe(folder_recipe), inputs)
            return teacher, others  # which have their hashes by now

        teacher, others = from_main(check_and_pin)
        # Of the training split, `max_tokens` may have cut the tokens and not the bytes.
        bytes_per_token = text.bytes_per_token("validation")
        recipe = replace(recipe, pretrain=in_tokens(recipe.pretrain, bytes_per_token))
        yield Run(recipe, Path(recipe.output), teacher, text, given, revisions, others)


def refuse_test_alone(data: DataSettings) -> None:
    """Raise a UserError if a text has nothing to train on."""
    if data.is_test_only:
        raise UserError(
            "data.test_fraction is 1 and leaves nothing to search and train on; lower it"
        )


def needed_text(recipe: Recipe, teacher: Architecture) -> Needed:
    """How much text a run needs, whatever it runs on: its largest budget, what is measured, and
    what is held out.

    Raises:
        UserError: the text is for the test alone.
    """
    refuse_test_alone(recipe.data)
    search, pretrain = recipe.search.for_teacher(teacher), recipe.pretrain
    finals = search.finalists
    train = [
        LEAST_TRAINING_TOKENS,
        search.calibration_tokens,
        search.refit_tokens,
        recipe.teacher_correction.tokens,
        finals.calibration_tokens,
        finals.steps * finals.batch_size * recipe.data.block_length,
        *(() if pretrain.bytes else pretrain.budget_tokens),
    ]
    tokens: dict[SplitName, int] = {
        "train": max(train),
        "search": search.tokens,
        "validation": pretrain.validation_tokens,
        "test": pretrain.test_tokens,
    }
    return Needed(tokens, math.ceil(BYTES_MARGIN * pretrain.bytes))


def in_tokens(settings: PretrainSettings, bytes_per_token: float) -> PretrainSettings:
    """The settings with the largest budget in tokens, however it is given."""
    if settings.bytes:
        return replace(settings, tokens=math.ceil(settings.bytes / bytes_per_token))
    return replace(settings, tokens=settings.budget_tokens[-1])


class _Checked(NamedTuple):
    """The teacher that is cut and the others, a student that is given, and the commits of what is
    on the hub."""

    teacher: Checkpoint
    others: dict[str, DistillationTeacher]
    student: Checkpoint | None
    revisions: dict[str, str]


def _checked(recipe: Recipe, student_folder: str) -> _Checked:
    """Find a user's mistakes before anything costly."""
    settings_from_tree(tree_of(recipe), Recipe)  # one made in Python may hold NaN or infinity
    for of_arms in trainings_of(recipe):
        for arm in of_arms.pretrain.arms:
            check_arguments(arm, training_arguments(of_arms.train, arm, Path(recipe.output)))
    check_correction(recipe)
    refuse_test_alone(recipe.data)
    revisions = find_revisions(recipe)
    pinned = at_commits(recipe, revisions)
    teacher = checked_teacher(pinned)
    for name in pinned.pretrain.baselines:
        Checkpoint.open_whole(name)
    check_trims(teacher, recipe.vocabulary)
    check_report(recipe.report, teacher)
    architecture = left_of(teacher.architecture, recipe.vocabulary)
    others = checked_teachers(recipe, pinned, teacher)
    shapes = {arm.shape for arm in recipe.pretrain.arms}
    for arm in recipe.pretrain.arms:
        shared = others[arm.kd.teacher].shared_rows if arm.kd and arm.kd.teacher else 0
        num_tokens = min(shared or architecture.config.vocab_size, architecture.config.vocab_size)
        if arm.kd and arm.kd.top_k > num_tokens:
            raise UserError(
                f"kd.top_k is {arm.kd.top_k} and the teacher has {num_tokens:,} tokens; use fewer, "
                "or 0 for all"
            )
        if arm.kd and arm.kd.cache:
            check_cache(arm.kd.cache)
    if student_folder:
        student = _given_student(Path(student_folder), recipe, architecture)
        arm_shapes(shapes - {PROPORTIONAL}, architecture, recipe.search, recipe.data.block_length)
        return _Checked(teacher, others, student, revisions)
    for of_bin in bin_recipes(pinned):
        space_of(architecture, of_bin.search, recipe.data.block_length)
        arm_shapes(shapes, architecture, of_bin.search, recipe.data.block_length)
    return _Checked(teacher, others, None, revisions)


def checked_teacher(recipe: Recipe) -> Checkpoint:
    """The teacher, once it is known to be readable.

    Raises:
        UserError: the teacher does not read, or weights do not fit the config.
    """
    teacher = Checkpoint.open_whole(recipe.teacher)
    teacher.architecture.check_context(recipe.data.block_length)
    return teacher


def _given_student(folder: Path, recipe: Recipe, teacher: Architecture) -> Checkpoint:
    if not (folder / "subnet.json").is_file():
        raise UserError(
            f"{folder} holds no extracted student; give --student a folder that has one"
        )
    student = Checkpoint.open(folder)
    student_rows = student.architecture.config.vocab_size
    teacher_rows = teacher.config.vocab_size
    if student_rows != teacher_rows and any(arm.kd for arm in recipe.pretrain.arms):
        raise UserError(
            f"the teacher has {teacher_rows} vocabulary rows and the student {student_rows}; use "
            "the teacher that the student was cut from, or arms without kd"
        )
    student.check()
    return student


def _inputs(
    recipe: Recipe, teacher: Checkpoint, student: Checkpoint | None, text: TokenBlocks
) -> dict[str, str]:
    """Check the text against the models, and hash all that the run reads."""
    check_vocabulary(text, teacher.architecture.config.vocab_size)
    for of_arms in trainings_of(recipe):
        for arm in of_arms.pretrain.arms:
            arguments = training_arguments(of_arms.train, arm, Path(recipe.output))
            step_tokens = tokens_per_step(arguments, recipe.data.block_length)
            check_step(step_tokens, text)
            train = {**of_arms.train, **arm.train}
            budgets_of(of_arms.pretrain, step_tokens, arguments.warmup_steps, train)
    inputs = {
        "data": text.fingerprint,
        "teacher": teacher.hash,
        "choice of blocks": "spread",
        "order of blocks": "of the whole split",
    }
    if recipe.student and student is not None:
        inputs["student"] = student.hash
    return inputs
