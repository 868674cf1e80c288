"""The stages in order: prepare, search, extract, pretrain, report. Each goes on where it stopped.

A run folder holds:

    recipe.yaml               what the run is; another recipe is refused
    inputs.json               hashes of text and teacher, which may not change
    search.jsonl, search.json the journal of the search, its outcome,
    search.html               and a page about it
    student/                  the extracted sub-network
    teacher.json              the teacher's own loss
    arms/NAME/                checkpoints and TensorBoard logs; then model/ and arm.json
    result.json, report.html  the answer

A run over several bins holds one such folder for each, beside its own recipe.yaml.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from headstart.assets import DEMO, demo_corpus
from headstart.data import DataSettings, TokenBlocks
from headstart.device import default_device, load_frozen
from headstart.distributed import is_main, main_first, process_group, world_size
from headstart.evaluation import validation_loss
from headstart.extraction import model_folder, run_extract
from headstart.files import write_json
from headstart.prepare import check_source, check_vocabulary, prepare, tokenizer_hash
from headstart.pretrain.arms import (
    ArmInputs,
    check_sharding,
    check_step,
    tokens_per_step,
    training_arguments,
)
from headstart.pretrain.cache import CacheIdentity, TeacherCache, write_cache
from headstart.pretrain.teacher import Teacher
from headstart.pretrain.variants import run_variants
from headstart.progress import progress
from headstart.recipe import Recipe, recipe_to_dict
from headstart.report import baseline_sentences, headline, load_result, result_table, write_html
from headstart.report_search import write_search_html
from headstart.result import result_of
from headstart.run_folder import check_run_folder, open_run
from headstart.search.fitness import fitting_batch_size
from headstart.search.run import search, space_of
from headstart.subnet.card import CARD, training_note, write_card
from headstart.subnet.extract import checkpoint_files, hash_checkpoint, resolve_teacher
from headstart.subnet.rules import match_tensor, read_config


def teacher_folder(recipe: Recipe) -> Path:
    """The local folder of a recipe's teacher, downloaded if need be.

    Raises:
        ValueError: it does not exist, has no safetensors, or has a tensor that no rule knows.
    """
    folder = model_folder(recipe.teacher)
    config = read_config(folder)
    for name in checkpoint_files(folder):
        match_tensor(name, config)
    return folder


def data_settings(settings: DataSettings) -> DataSettings:
    """A recipe's data settings with the demo corpus as a file."""
    if settings.source != DEMO and DEMO not in [part.source for part in settings.mixture]:
        return settings
    with main_first():
        corpus = str(demo_corpus())
    mixture = (replace(p, source=corpus) if p.source == DEMO else p for p in settings.mixture)
    source = corpus if settings.source == DEMO else settings.source
    return replace(settings, source=source, mixture=tuple(mixture))


def check_text(settings: DataSettings) -> None:
    """Find mistakes in what is said of the text; the demo's own is downloaded later."""
    if settings.mixture or settings.source != DEMO:
        check_source(data_settings(settings))


def check(recipe: Recipe, student: str = "") -> None:
    """Find a user's mistakes before any weights are loaded.

    Args:
        recipe: what is asked.
        student: folder of an extracted student, or empty where a search will find one.

    Raises:
        ValueError: the first mistake found, with its mend.
    """
    for arm in recipe.pretrain.arms:
        check_sharding(training_arguments(recipe.train, arm, Path(recipe.output)))
    if recipe.data.is_validation_only:
        raise ValueError(
            "data.validation_fraction is 1 and leaves nothing to search and train on; lower it"
        )
    check_text(recipe.data)
    with main_first():
        config = read_config(teacher_folder(recipe))
    if not student:
        for one in bin_recipes(recipe):
            space_of(config, one.search, recipe.data.block_length)
        return
    if not (Path(student) / "subnet.json").is_file():
        raise ValueError(
            f"{student} holds no extracted student; give --student a folder that has one"
        )
    student_rows, teacher_rows = read_config(Path(student)).vocab_size, config.vocab_size
    if student_rows != teacher_rows and any(arm.kd for arm in recipe.pretrain.arms):
        raise ValueError(
            f"the teacher has {teacher_rows} vocabulary rows and the student {student_rows}; use "
            "the teacher that the student was cut from, or arms without kd"
        )


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


def run_search(recipe: Recipe, extracts: bool = False) -> list[dict[str, Any]]:
    """Prepare the text and search each bin; the outcome is in its `search.json`.

    Args:
        recipe: what is asked.
        extracts: whether what is found will be cut out and trained.

    Returns:
        The outcome of each bin, in the recipe's order.
    """
    with process_group():
        check(recipe, recipe.student)
        if recipe.search.bins:
            check_run_folder(recipe)
        outcomes = []
        for one in bin_recipes(recipe):
            folder, teacher, blocks = _prepared(one)
            if recipe.search.bins and is_main():
                open_run(recipe)
            if extracts:
                check_caches(one, blocks)
            teacher_hash = _hash_in(folder)
            outcomes.append(search(teacher, blocks, one.search, folder, teacher_hash))
            if is_main():
                write_search_html(outcomes[-1], folder / "search.html")
        return outcomes


def run_pretrain(recipe: Recipe) -> dict[str, Any]:
    """Train every arm and write `result.json` and `report.html`.

    The student is the recipe's own folder, or the one that a search in this run folder found.
    """
    with process_group():
        student = Path(recipe.student or Path(recipe.output) / "student")
        check(recipe, str(student))
        folder, teacher, blocks = _prepared(recipe)
        check_caches(recipe, blocks)
        inputs = ArmInputs(
            student, teacher, blocks, recipe.pretrain, recipe.train, _hash_in(folder)
        )
        _check_baselines(recipe, blocks)
        trained = [
            run_variants(arm, inputs, folder / "arms" / arm.name) for arm in recipe.pretrain.arms
        ]
        with main_first():
            if is_main():
                kept = folder / "compared.json"
                if not kept.is_file():
                    compared = (("teacher", teacher), *_baselines(recipe))
                    losses = [
                        {
                            "name": name,
                            **validation_loss(one, blocks, recipe.pretrain.validation_tokens),
                        }
                        for name, one in compared
                    ]
                    write_json(kept, losses)
                of_teacher, *of_baselines = json.loads(kept.read_text())
                result = result_of(
                    recipe, folder, inputs, of_teacher["loss"], of_baselines, trained
                )
                write_json(folder / "result.json", result)
                for entry in result["arms"]:
                    trained_model = folder / "arms" / entry["name"] / entry["folder"] / "model"
                    if entry["init"] == "subnet" and trained_model.is_dir():
                        describe(trained_model, student, entry, result)
                run_report(folder)
        return load_result(folder)


def describe(model: Path, student: Path, arm: dict[str, Any], result: dict[str, Any]) -> None:
    """Say beside a trained model what it was cut from and how it was trained."""
    if not (model / CARD).is_file():  # one that is there may have been edited
        shutil.copyfile(student / "subnet.json", model / "subnet.json")
        write_card(model, {"Training": training_note(arm, result)})


def _baselines(recipe: Recipe) -> list[tuple[str, Path]]:
    return [(name, resolve_teacher(name)) for name in recipe.pretrain.baselines]


def _check_baselines(recipe: Recipe, blocks: TokenBlocks) -> None:
    """Find out whether losses of the baselines can be compared with those of the arms.

    Raises:
        ValueError: one is of a family that cannot be read, or has another tokenizer.
    """
    with main_first():
        for name, folder in _baselines(recipe):
            read_config(folder)
            if tokenizer_hash(folder) != blocks.manifest["tokenizer"]:
                raise ValueError(
                    f"the baseline {name} has another tokenizer than the teacher, so their losses "
                    "per token do not compare; choose one with the teacher's, or compare bits per "
                    "byte with `headstart evaluate`"
                )


def check_caches(recipe: Recipe, blocks: TokenBlocks) -> None:
    """Find out whether every arm's teacher cache is the one that it needs.

    Raises:
        ValueError: one is missing, unfinished, or of another teacher, text or setting.
    """
    teacher_hash = _hash_in(Path(recipe.output))
    for arm in recipe.pretrain.arms:
        if arm.kd and arm.kd.cache:
            TeacherCache(arm.kd.cache, CacheIdentity.of(arm.kd, teacher_hash, blocks.fingerprint))


def run_cache_teacher(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Write the teacher cache of every arm that distils from one.

    Returns:
        The manifest of each cache, by its path.

    Raises:
        ValueError: no arm has a cache, or a folder holds another one.
    """
    settings = [arm.kd for arm in recipe.pretrain.arms if arm.kd and arm.kd.cache]
    if not settings:
        raise ValueError(
            "no arm of the recipe distils from a cache; set kd.cache, and kd.top_k or kd.samples, "
            "in pretrain.arms"
        )
    with process_group():
        check_text(recipe.data)
        with main_first():
            folder = teacher_folder(recipe)
        blocks = prepare(data_settings(recipe.data), folder)
        split, teacher_hash = blocks.split("train"), hash_checkpoint(folder)
        device = default_device()
        teacher = Teacher(load_frozen(folder, device))
        bytes_per_number = teacher.model.dtype.itemsize
        batch_size = fitting_batch_size(
            teacher.model.config, split.shape[1], device, bytes_per_number
        )
        written = {}
        for kd in settings:
            identity = CacheIdentity.of(kd, teacher_hash, blocks.fingerprint)
            mine = split.size // world_size()
            with progress(f"cache {kd.cache}", mine, "tokens") as advance:
                written[kd.cache] = write_cache(
                    kd.cache,
                    identity,
                    teacher,
                    split,
                    batch_size,
                    separator=blocks.separator,
                    on_blocks=lambda count: advance(count * split.shape[1]),
                )
        return written


def run(recipe: Recipe) -> list[dict[str, Any]]:
    """All stages: search, extract, pretrain, report; for each bin, if there are several.

    Under torchrun the processes share the search, and train each arm together.

    Returns:
        The result of each bin, in the recipe's order.
    """
    with process_group():
        if not recipe.student:
            run_search(recipe, extracts=True)
        results = []
        for one in bin_recipes(recipe):
            folder, calibration = Path(one.output), None
            if one.search.init != "slice" and not one.student:
                _, _, blocks = _prepared(one)
                calibration = blocks.spread("train", one.search.calibration_tokens)
            with main_first():
                if is_main() and not one.student and not (folder / "student").exists():
                    provenance = {"recipe": recipe_to_dict(one)}
                    parts = (one.teacher, folder / "search.json", folder / "student", provenance)
                    run_extract(*parts, one.search.init, calibration)
            results.append(run_pretrain(one))
        return results


def calibration_blocks(
    teacher: str | Path, settings: DataSettings, num_tokens: int
) -> Int[Tensor, "blocks tokens"]:
    """Tokens of a corpus' training split, as a teacher reads them, for `run_extract`."""
    check_text(settings)
    return prepare(data_settings(settings), model_folder(teacher)).spread("train", num_tokens)


def run_report(folder: Path) -> dict[str, Any]:
    """Print the result table of a run folder and write its `report.html`."""
    result = load_result(folder)
    write_html(result, folder / "report.html")
    output = Console()
    output.print(result_table(result))
    output.print(headline(result))
    for sentence in baseline_sentences(result):
        output.print(sentence)
    output.print(f"report: {folder / 'report.html'}")
    return result


def _prepared(recipe: Recipe) -> tuple[Path, Path, TokenBlocks]:
    """The run folder, the teacher's folder and the tokens, the same as when the run began.

    Raises:
        ValueError: the folder holds another run, or text or teacher have changed since it began.
    """
    check_run_folder(recipe)
    teacher = teacher_folder(recipe)
    blocks = prepare(data_settings(recipe.data), teacher)
    check_vocabulary(blocks, read_config(teacher).vocab_size)
    for arm in recipe.pretrain.arms:
        arguments = training_arguments(recipe.train, arm, Path(recipe.output))
        check_step(tokens_per_step(arguments, recipe.data.block_length), blocks)
    inputs = {"data": blocks.fingerprint, "teacher": hash_checkpoint(teacher)}
    if recipe.student:
        inputs["student"] = hash_checkpoint(Path(recipe.student))
    folder = Path(recipe.output)
    kept = folder / "inputs.json"
    with main_first():
        if kept.is_file():
            for name, before in json.loads(kept.read_text()).items():
                if inputs[name] != before:
                    raise ValueError(
                        f"the {name} has changed since {folder} was begun; restore it or choose "
                        "another --output"
                    )
        if is_main():
            open_run(recipe)
            write_json(kept, inputs)
    return folder, teacher, blocks


def _hash_in(folder: Path) -> str:
    """The teacher's hash, from a run folder."""
    return str(json.loads((folder / "inputs.json").read_text())["teacher"])
