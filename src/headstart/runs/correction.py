"""Tunes a run's teacher on the run's own text, before it is searched, cut and learnt from.

What comes of it is an ordinary checkpoint in the cache, which other runs with the same teacher,
text and settings find. Until it is whole, its training lies beside it and goes on after a kill.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from headstart.model.card import CARD
from headstart.model.checkpoint import CORRECTION, Checkpoint, copy_files, write_checkpoint
from headstart.recipe import Recipe
from headstart.system.distributed import entered_by_main, from_main, world_size
from headstart.system.errors import UserError
from headstart.system.files import cache_root, finished_folder, write_json
from headstart.system.hashing import hash_json
from headstart.system.locks import locked
from headstart.system.memo import LOCKS
from headstart.system.progress import console
from headstart.text.blocks import TokenBlocks
from headstart.training.arguments import tokens_per_step, training_arguments
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.budgets import SCHEDULE_KEYS, budgets_of
from headstart.training.settings import BEST, Arm

VERSION = 1
"""Of what is kept; raise it when an equal key would give other weights."""
NAME = "teacher correction"
EVALUATIONS = 4
"""Besides the one before training."""


def trainings_of(recipe: Recipe) -> list[Recipe]:
    """A recipe for its arms, and one for the correction of its teacher if it asks for that."""
    return [recipe, *([correction_recipe(recipe)] if recipe.teacher_correction.tokens else ())]


def correction_recipe(recipe: Recipe) -> Recipe:
    """The training of the teacher as a recipe with one arm, which begins from the teacher itself.

    The recipe's `train` holds for it too, but for its schedule: the rate is constant between
    warm-up and decay.
    """
    settings = recipe.teacher_correction
    shared = {key: value for key, value in recipe.train.items() if key not in SCHEDULE_KEYS}
    train = {"warmup_steps": settings.warmup, **settings.train}
    arm = Arm(NAME, learning_rate=settings.learning_rate, train=train)
    pretrain = replace(
        recipe.pretrain,
        tokens=settings.tokens,
        bytes=0,
        budgets=(settings.tokens,),
        decay=settings.decay,
        evaluations=EVALUATIONS,
        seeds=(),
        target=BEST,
        arms=(arm,),
    )
    return replace(
        recipe, pretrain=pretrain, train=shared, search=replace(recipe.search, init="slice")
    )


def check_correction(recipe: Recipe, processes: int = 1) -> None:
    """Find a user's mistakes in `teacher_correction` before the text is read.

    Args:
        recipe: with it, or without.
        processes: for each one here, how many will train; `headstart plan` runs elsewhere.

    Raises:
        UserError: it sets a schedule, or its budget is too short for warm-up and decay.
    """
    settings = recipe.teacher_correction
    if not settings.tokens:
        return
    for key in SCHEDULE_KEYS:
        if key in settings.train:
            raise UserError(
                f"teacher_correction.train sets {key}, and the rate is constant until it falls; "
                "leave it out, and set teacher_correction.warmup and decay"
            )
    asked = correction_recipe(recipe)
    (arm,) = asked.pretrain.arms
    arguments = training_arguments(asked.train, arm, Path(recipe.output))
    step_tokens = tokens_per_step(arguments, recipe.data.block_length) * processes
    try:
        budgets_of(asked.pretrain, step_tokens, arguments.warmup_steps, arm.train)
    except UserError as error:
        steps = math.ceil(settings.tokens / step_tokens)
        raise UserError(
            f"teacher_correction.tokens is {settings.tokens:,}, {steps} steps of {step_tokens:,} "
            "tokens, which leaves none between warm-up and decay; use more"
        ) from error


def corrected_teacher(recipe: Recipe, teacher: Checkpoint, text: TokenBlocks) -> Checkpoint:
    """A teacher tuned as the recipe says, now or earlier; as it is if the recipe does not ask.

    Every process that torchrun has started must call it, inside `process_group`.

    Args:
        recipe: with `teacher_correction`.
        teacher: with the vocabulary that is left.
        text: in its tokens.

    Raises:
        UserError: the loss is no number in the end, or as `run_arm`.
    """
    if not recipe.teacher_correction.tokens:
        return teacher
    asked = correction_recipe(recipe)
    key = from_main(lambda: _key(asked, teacher, text))
    folder = cache_root() / "corrected" / hash_json([VERSION, key])
    # Checkpoints go on with as many processes as before; with another number it begins anew.
    training = cache_root() / "correcting" / f"{folder.name}-{world_size()}"

    def found() -> Checkpoint | None:
        if not folder.is_dir():
            return None
        for begun in training.parent.glob(f"{folder.name}-*"):
            shutil.rmtree(begun, ignore_errors=True)
        kept = Checkpoint.open(folder)
        assert kept.hash and kept.correction  # which travel to the other processes
        return kept

    def wait(owner: str) -> None:
        console.print(f"{owner} corrects the same teacher; waiting for it")

    def write(result: dict[str, Any]) -> Checkpoint | None:
        _refuse_diverged(result, recipe)
        with finished_folder(folder) as unfinished:
            _write_corrected(teacher, training / "model", unfinished)
            write_json(unfinished / CORRECTION, _record(result, asked, teacher))
            write_json(unfinished / "key.json", {"version": VERSION, "key": key})
        return found()

    with entered_by_main(lambda: locked(cache_root() / LOCKS / f"corrected-{folder.name}", wait)):
        corrected = from_main(found)
        if corrected is None:
            (arm,) = asked.pretrain.arms
            inputs = ArmInputs(teacher, teacher, text, asked.pretrain, asked.train)
            result = run_arm(arm, inputs, training)
            corrected = from_main(lambda: write(result))
    assert corrected is not None
    return corrected


def _key(asked: Recipe, teacher: Checkpoint, text: TokenBlocks) -> dict[str, Any]:
    """All that the corrected weights depend on, but for the number of processes."""
    return {
        "teacher": teacher.hash,
        "text": text.fingerprint,
        "separate_documents": text.separate_documents,
        "settings": asdict(asked.teacher_correction),
        "train": asked.train,
    }


def _refuse_diverged(result: dict[str, Any], recipe: Recipe) -> None:
    if not math.isfinite(result["budgets"][-1]["loss"]):
        raise UserError(
            f"the teacher has no finite loss after its correction; lower "
            f"teacher_correction.learning_rate, which is {recipe.teacher_correction.learning_rate}"
        )


def _write_corrected(teacher: Checkpoint, trained: Path, folder: Path) -> None:
    """Write the trained weights, each in the precision that the teacher has it in, with the
    teacher's config, tokenizer and card."""
    match = teacher.architecture.match
    precisions = {match(name): tensor.dtype for name, tensor in teacher.tensors()}
    tensors = {
        name: tensor.to(precisions.get(match(name), tensor.dtype))
        for name, tensor in Checkpoint.open(trained).tensors()
    }
    write_checkpoint(folder, tensors, teacher.architecture.config)
    copy_files(teacher.folder, folder)
    copy_files(teacher.folder, folder, [CARD])


def _record(result: dict[str, Any], asked: Recipe, teacher: Checkpoint) -> dict[str, Any]:
    """What `correction.json` holds; a teacher that was corrected before has cost that too."""
    count = teacher.architecture.count(asked.data.block_length)
    (budget,) = result["budgets"]
    return {
        "flops": teacher.correction_flops + result["tokens"] * count.training_flops_per_token,
        "tokens": result["tokens"],
        "tokens_per_step": result["tokens_per_step"],
        "learning_rate": asked.teacher_correction.learning_rate,
        "seconds": result["seconds"],
        "loss_before": result["before"]["loss"],
        "loss_after": budget["loss"],
        "curve": result["curve"],
        "teacher": str(teacher.folder),
        "teacher_hash": teacher.hash,
    }
