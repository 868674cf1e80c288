"""A run: its recipe, folder, teacher and text, checked and prepared once for all stages.

A run folder holds:

    recipe.yaml               what the run is; another recipe is refused
    inputs.json               hashes of text, teacher and given student, which may not change, and
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

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import Recipe
from headstart.runs.exhibits import check_report
from headstart.runs.folder import REVISIONS, check_run_folder, locked, pin_inputs, pin_recipe
from headstart.runs.revisions import at_commits, find_revisions
from headstart.runs.shapes import arm_shapes
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
from headstart.training.trials import check_arguments

LEAST_TRAINING_TOKENS = 1_000_000
"""Read in any case, so that a budget of less than one step finds a whole one."""
BYTES_MARGIN = 1.02
"""A budget in bytes becomes tokens by the validation split, whose tokens may be shorter."""


@dataclass(frozen=True)
class Run:
    """What every stage is given.

    Attributes:
        recipe: of a single bin, unless the run has several; with the budget in tokens.
        folder: of the run.
        teacher: its checkpoint with the vocabulary that is left, already hashed.
        text: in tokens.
        student: one that was extracted before; None where a search finds it.
        revisions: commits of what is on the hub, by its name in the recipe.
    """

    recipe: Recipe
    folder: Path
    teacher: Checkpoint
    text: TokenBlocks
    student: Checkpoint | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)

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

        def check_and_lock() -> tuple[Checkpoint, Checkpoint | None, dict[str, str]]:
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

        teacher, given, revisions = from_main(check_and_lock)
        data = at_commits(recipe, revisions).data
        teacher = from_main(lambda: trimmed_teacher(teacher, recipe.vocabulary, data))
        text = prepare(data, teacher.folder, needed=needed_text(recipe))

        def check_and_pin() -> Checkpoint:
            inputs = _inputs(recipe, teacher, given, text) | {REVISIONS: revisions}
            for folder_recipe in recipes:
                pin_inputs(pin_recipe(folder_recipe), inputs)
            return teacher  # which has its hash by now

        teacher = from_main(check_and_pin)
        # Of the training split, `max_tokens` may have cut the tokens and not the bytes.
        bytes_per_token = text.bytes_per_token("validation")
        recipe = replace(recipe, pretrain=in_tokens(recipe.pretrain, bytes_per_token))
        yield Run(recipe, Path(recipe.output), teacher, text, given, revisions)


def refuse_test_alone(data: DataSettings) -> None:
    """Raise a UserError if a text has nothing to train on."""
    if data.is_test_only:
        raise UserError(
            "data.test_fraction is 1 and leaves nothing to search and train on; lower it"
        )


def needed_text(recipe: Recipe) -> Needed:
    """How much text a run needs, whatever it runs on: its largest budget, what is measured, and
    what is held out.

    Raises:
        UserError: the text is for the test alone.
    """
    refuse_test_alone(recipe.data)
    search, pretrain = recipe.search, recipe.pretrain
    finals = search.finalists
    train = [
        LEAST_TRAINING_TOKENS,
        search.calibration_tokens,
        search.refit_tokens,
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


def _checked(
    recipe: Recipe, student_folder: str
) -> tuple[Checkpoint, Checkpoint | None, dict[str, str]]:
    """Find a user's mistakes before any weights are read.

    Returns:
        The teacher, a student that is given, and the commits of what is on the hub.
    """
    settings_from_tree(tree_of(recipe), Recipe)  # one made in Python may hold NaN or infinity
    for arm in recipe.pretrain.arms:
        check_arguments(arm, training_arguments(recipe.train, arm, Path(recipe.output)))
    refuse_test_alone(recipe.data)
    revisions = find_revisions(recipe)
    pinned = at_commits(recipe, revisions)
    teacher = checked_teacher(pinned)
    for name in pinned.pretrain.baselines:
        Checkpoint.open_whole(name)
    check_trims(teacher, recipe.vocabulary)
    check_report(recipe.report, teacher)
    architecture = left_of(teacher.architecture, recipe.vocabulary)
    vocab_size = architecture.config.vocab_size
    shapes = {arm.shape for arm in recipe.pretrain.arms}
    for arm in recipe.pretrain.arms:
        if arm.kd and arm.kd.top_k > vocab_size:
            raise UserError(
                f"kd.top_k is {arm.kd.top_k} and the teacher has {vocab_size:,} tokens; use fewer, "
                "or 0 for all"
            )
        if arm.kd and arm.kd.cache:
            check_cache(arm.kd.cache)
    if student_folder:
        student = _given_student(Path(student_folder), recipe, architecture)
        arm_shapes(shapes - {PROPORTIONAL}, architecture, recipe.search, recipe.data.block_length)
        return teacher, student, revisions
    for of_bin in bin_recipes(pinned):
        space_of(architecture, of_bin.search, recipe.data.block_length)
        arm_shapes(shapes, architecture, of_bin.search, recipe.data.block_length)
    return teacher, None, revisions


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
    for arm in recipe.pretrain.arms:
        arguments = training_arguments(recipe.train, arm, Path(recipe.output))
        step_tokens = tokens_per_step(arguments, recipe.data.block_length)
        check_step(step_tokens, text)
        train = {**recipe.train, **arm.train}
        budgets_of(recipe.pretrain, step_tokens, arguments.warmup_steps, train)
    inputs = {"data": text.fingerprint, "teacher": teacher.hash, "choice of blocks": "spread"}
    if recipe.student and student is not None:
        inputs["student"] = student.hash
    return inputs
