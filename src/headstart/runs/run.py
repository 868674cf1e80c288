"""A run: its recipe, folder, teacher and text, checked and prepared once for all stages.

A run folder holds:

    recipe.yaml               what the run is; another recipe is refused
    inputs.json               hashes of text, teacher and given student, which may not change
    orders.json               what the ranks of the search mean
    search.jsonl, search.json the journal of the search and its outcome
    search.html               a page about it
    student/                  the extracted sub-network
    compared.json             losses of the teacher and of the baselines
    arms/NAME/                checkpoints and TensorBoard logs; then model/ and arm.json
    result.json, report.html  the answer
    error.txt                 the traceback of the last failure that was not the user's mistake

A run over several bins holds one such folder for each, beside its own recipe.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headstart.demo import DEMO
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint, commit_of
from headstart.recipe import Recipe
from headstart.runs.folder import check_run_folder, locked, pin_inputs, pin_recipe
from headstart.searching.run import space_of
from headstart.system.distributed import from_main, process_group
from headstart.system.errors import UserError
from headstart.system.files import read_json
from headstart.system.hub import HubName
from headstart.system.settings import settings_from_tree, tree_of
from headstart.text.blocks import TokenBlocks
from headstart.text.corpus import find_corpus
from headstart.text.prepare import check_source, check_vocabulary, prepare
from headstart.text.settings import DataSettings
from headstart.training.arguments import (
    check_sharding,
    check_step,
    tokens_per_step,
    training_arguments,
)
from headstart.training.cache import check_begun


@dataclass(frozen=True)
class Run:
    """What every stage is given.

    Attributes:
        recipe: of a single bin, unless the run has several.
        folder: of the run, to which this process has the lock.
        teacher: its checkpoint, already hashed.
        text: in tokens.
        student: one that was extracted before; None where a search finds it.
        baselines: models that arms are measured against, by their names in the recipe.
    """

    recipe: Recipe
    folder: Path
    teacher: Checkpoint
    text: TokenBlocks
    student: Checkpoint | None = None
    baselines: Mapping[str, Checkpoint] = field(default_factory=dict)

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


@contextmanager
def open_run(recipe: Recipe, student: str = "") -> Iterator[Run]:
    """Check a recipe, prepare its text, hash its inputs, and lock its folder for the body.

    Under torchrun every process calls it, and the main one decides.

    Args:
        recipe: what is asked.
        student: folder of an extracted student; the recipe's own, or none, if empty.

    Raises:
        UserError: the first mistake found, with its mend. Nothing costly has run by then, and
            nothing on disk has changed.
    """
    with ExitStack() as stack:
        stack.enter_context(process_group())
        recipes = [recipe, *bin_recipes(recipe)] if recipe.search.bins else [recipe]

        def check_and_lock() -> Models:
            models = _checked(recipe, student or recipe.student)
            for folder_recipe in recipes:
                check_run_folder(folder_recipe)
            for folder_recipe in recipes:
                stack.enter_context(locked(Path(folder_recipe.output)))
            return models

        models = from_main(check_and_lock)
        text = prepare(models.data, models.teacher.folder)

        def check_and_pin() -> Checkpoint:
            inputs = _inputs(recipe, models, text)
            for folder_recipe in recipes:
                pin_inputs(pin_recipe(folder_recipe), inputs)
            return models.teacher  # which has its hash by now

        teacher = from_main(check_and_pin)
        yield Run(recipe, Path(recipe.output), teacher, text, models.student, models.baselines)


@dataclass(frozen=True)
class Models:
    """What a recipe names, found.

    Attributes:
        teacher: of the recipe.
        student: one that was extracted before, or None.
        baselines: by their names in the recipe.
        data: the recipe's, with datasets on the hub at commits.
        revisions: what is on the hub, by its name in the recipe -> its commit.
    """

    teacher: Checkpoint
    student: Checkpoint | None
    baselines: dict[str, Checkpoint]
    data: DataSettings
    revisions: dict[str, str]


def _checked(recipe: Recipe, student_folder: str) -> Models:
    """Find a user's mistakes before any weights are read, and the models that a recipe names.

    What is on the hub is taken at the commits that the run was begun with, if it was.
    """
    settings_from_tree(tree_of(recipe), Recipe)  # one made in Python may hold NaN or infinity
    for arm in recipe.pretrain.arms:
        check_sharding(training_arguments(recipe.train, arm, Path(recipe.output)))
    if recipe.data.is_validation_only:
        raise UserError(
            "data.validation_fraction is 1 and leaves nothing to search and train on; lower it"
        )
    kept, revisions = kept_revisions(recipe), dict[str, str]()
    data = pinned_data(recipe.data, kept, revisions)
    teacher = checked_teacher(replace(recipe, data=data), kept, revisions)
    baselines = {name: _open_pinned(name, kept, revisions) for name in recipe.pretrain.baselines}
    for arm in recipe.pretrain.arms:
        if arm.kd and arm.kd.cache:
            check_begun(arm.kd.cache)
    student = None
    if student_folder:
        student = _given_student(Path(student_folder), recipe, teacher.architecture)
    else:
        for of_bin in bin_recipes(recipe):
            space_of(teacher.architecture, of_bin.search, recipe.data.block_length)
    return Models(teacher, student, baselines, data, revisions)


def kept_revisions(recipe: Recipe) -> dict[str, str]:
    """The commits that a run was begun with, by the names in its recipe; empty for a new run."""
    inputs = read_json(Path(recipe.output) / "inputs.json") or {}
    revisions: dict[str, str] = inputs.get("revisions", {})
    return revisions


def pinned_data(
    data: DataSettings, kept: Mapping[str, str], revisions: dict[str, str]
) -> DataSettings:
    """The text's settings with datasets on the hub at commits, which are added to `revisions`."""

    def at_commit(source: str) -> str:
        name = HubName.parse(source)
        corpus = find_corpus(str(name.at(kept[source])) if source in kept else source)
        if corpus.hub is None:
            return source
        revisions[source] = corpus.hub.revision
        return str(corpus.hub)

    if data.mixture:
        parts = [replace(part, source=at_commit(part.source)) for part in data.mixture]
        return replace(data, mixture=tuple(parts))
    return data if data.source in ("", DEMO) else replace(data, source=at_commit(data.source))


def _open_pinned(model: str, kept: Mapping[str, str], revisions: dict[str, str]) -> Checkpoint:
    """A model, if it is on the hub at its commit, which is added to `revisions`."""
    name = HubName.parse(model)
    checkpoint = Checkpoint.open(str(name.at(kept[model])) if model in kept else model)
    if commit := commit_of(checkpoint.folder):
        revisions[model] = commit
    return checkpoint


def checked_teacher(
    recipe: Recipe,
    kept: Mapping[str, str] = MappingProxyType({}),
    revisions: dict[str, str] | None = None,
) -> Checkpoint:
    """The teacher, once text and teacher are known to be readable.

    Args:
        recipe: that names both.
        kept: commits that a run was begun with, by the names in its recipe.
        revisions: receives the teacher's commit, if it is on the hub.

    Raises:
        UserError: the text or the teacher does not read, or weights do not fit the config.
    """
    check_source(recipe.data)
    teacher = _open_pinned(recipe.teacher, kept, {} if revisions is None else revisions)
    teacher.architecture.check_context(recipe.data.block_length)
    teacher.check()
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
    return student


def _inputs(recipe: Recipe, models: Models, text: TokenBlocks) -> dict[str, Any]:
    """Check the text against the models, and hash all that the run reads."""
    teacher, student = models.teacher, models.student
    check_vocabulary(text, teacher.architecture.config.vocab_size)
    for arm in recipe.pretrain.arms:
        arguments = training_arguments(recipe.train, arm, Path(recipe.output))
        check_step(tokens_per_step(arguments, recipe.data.block_length), text)
    inputs: dict[str, Any] = {
        "data": text.fingerprint,
        "teacher": teacher.hash,
        "choice of blocks": "spread",
        "revisions": models.revisions,
    }
    if recipe.student and student is not None:
        inputs["student"] = student.hash
    return inputs
