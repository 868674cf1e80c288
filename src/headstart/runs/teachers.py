"""The models that arms distil from, where they name others than the one that is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import CORRECTION, Checkpoint, copy_files, read_architecture
from headstart.model.trim import KEPT, trimmed_architecture, write_trimmed_model
from headstart.recipe import Recipe
from headstart.runs.vocabulary import planned_architecture
from headstart.system.errors import UserError
from headstart.system.memo import remembered
from headstart.text.prepare import load_tokenizer
from headstart.training.teacher import DistillationTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Of what the memo keeps; raise it when an equal key would give other files."""


def planned_teachers(recipe: Recipe) -> dict[str, Architecture]:
    """The architectures of all that arms distil from, by `kd.teacher`, with the vocabulary that is
    left; reads configs only.

    Raises:
        UserError: there is no such model, or no table knows its family.
    """
    found = {name: read_architecture(name) for name in recipe.pretrain.teachers}
    if size := recipe.vocabulary.size:
        for name, whole in found.items():
            found[name] = trimmed_architecture(whole, min(size, whole.config.vocab_size))
    return {"": planned_architecture(recipe), **found}


def checked_teachers(
    recipe: Recipe, pinned: Recipe, cut: Checkpoint
) -> dict[str, DistillationTeacher]:
    """The teachers that arms name, once it is known that students of a model can learn from them.

    Args:
        recipe: in whose words they are named.
        pinned: the same with commits in its names.
        cut: the model that students are cut out of, with its whole vocabulary.

    Raises:
        UserError: one does not read, its context is too short, its tokenizer is another, or its
            vocabulary has other rows, beyond what the tokenizer leaves empty.
    """
    arms, found = zip(recipe.pretrain.arms, pinned.pretrain.arms, strict=True), {}
    models = {arm.kd.teacher: at.kd.teacher for arm, at in arms if arm.kd and at.kd}
    for name in recipe.pretrain.teachers:
        teacher = Checkpoint.open_whole(models[name])
        teacher.architecture.check_context(recipe.data.block_length)
        found[name] = DistillationTeacher(teacher, _shared_rows(name, teacher, cut))
    return found


def trimmed_alike(
    teachers: Mapping[str, DistillationTeacher], whole: Checkpoint, cut: Checkpoint
) -> dict[str, DistillationTeacher]:
    """The same teachers with those tokens that are left of the model that is cut; made now or
    found in the cache.

    Args:
        teachers: from `checked_teachers`; they are returned as they are if all tokens are left.
        whole: the model that is cut as it was.
        cut: the same with the tokens that are left.
    """
    if cut.folder == whole.folder:
        return dict(teachers)
    kept: list[int] = json.loads((cut.folder / KEPT).read_text())
    return {name: _trimmed(teacher, kept) for name, teacher in teachers.items()}


def _trimmed(teacher: DistillationTeacher, kept: Sequence[int]) -> DistillationTeacher:
    """Rows that no token has, which may be among those kept, come last."""
    whole = teacher.checkpoint
    rows = [id for id in kept if id < whole.architecture.config.vocab_size]

    def make(folder: Path) -> None:
        (folder / "teacher").mkdir()
        write_trimmed_model(whole, rows, folder / "teacher")
        copy_files(whole.folder, folder / "teacher", [CORRECTION])

    def read(folder: Path) -> Checkpoint:
        return Checkpoint.open(folder / "teacher")

    key = {"teacher": whole.hash, "kept": rows}
    checkpoint = remembered("trimmed-alike", VERSION, key, make, read)
    shared = sum(id < teacher.shared_rows for id in kept)
    return DistillationTeacher(checkpoint, shared)


def _shared_rows(name: str, teacher: Checkpoint, cut: Checkpoint) -> int:
    """How many tokens a teacher is compared with a student on; 0 for all.

    Raises:
        UserError: as `checked_teachers`.
    """
    ours, theirs = (load_tokenizer(checkpoint.folder) for checkpoint in (cut, teacher))
    tokens = ours.get_vocab()
    if _rules(ours) != _rules(theirs) or not tokens.items() <= theirs.get_vocab().items():
        raise UserError(
            f"kd.teacher {name} has another tokenizer than {cut.folder}, which is cut; distil from "
            "a model of the same tokenizer, such as a larger one of its family"
        )
    rows, wanted = (checkpoint.architecture.config.vocab_size for checkpoint in (teacher, cut))
    num_tokens: int = max(tokens.values()) + 1
    if rows == wanted:
        return 0
    if min(rows, wanted) < num_tokens:
        raise UserError(
            f"kd.teacher {name} has {rows:,} vocabulary rows and the model that is cut {wanted:,}, "
            f"and their tokenizer has {num_tokens:,} tokens, which both need a row for; distil "
            "from another model"
        )
    return num_tokens


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that decides how plain text becomes tokens, besides the tokens' ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if isinstance(model.get("vocab"), dict):  # of others it holds scores too
        del model["vocab"]
    return [parts["normalizer"], parts["pre_tokenizer"], model]
