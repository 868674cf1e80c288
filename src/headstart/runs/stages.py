"""The stages of a run, in order: search, extract, pretrain, report. Each goes on where it stopped.

A stage is a function of a `Run` and returns what the next one needs. The commands below them open a
run and call its stages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from headstart.calibration.start import Calibration, calibrate
from headstart.demo import teacher_name
from headstart.evaluation.scores import bits_per_byte, text_loss
from headstart.model.architecture import Architecture
from headstart.model.card import CARD, training_note, write_card
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import SubnetSpec
from headstart.recipe import Recipe, recipe_to_dict
from headstart.reports.page import write_html
from headstart.reports.search import write_search_html
from headstart.reports.several import caution_sentences, runs_table, write_comparison
from headstart.reports.table import (
    baseline_sentences,
    bits_sentences,
    budget_rows,
    budget_table,
    error_sentences,
    forecast_sentences,
    headline,
    load_result,
    missing_sentences,
    result_table,
)
from headstart.runs.caches import check_caches, write_caches
from headstart.runs.correction import corrected_teacher
from headstart.runs.exhibits import Exhibit, continuations, zero_shot_scores
from headstart.runs.extraction import extract_found
from headstart.runs.folder import locked_by_main, pin_corrected
from headstart.runs.result import Compared, result_of
from headstart.runs.run import Run, needed_text, open_run
from headstart.runs.shapes import arm_shapes
from headstart.runs.trimming import vocabulary_sizes
from headstart.searching.bins import BinSettings
from headstart.searching.run import search_bins
from headstart.system.distributed import from_main, is_main, process_group, world_size
from headstart.system.errors import UserError
from headstart.system.files import write_json
from headstart.system.progress import console, output
from headstart.system.settings import with_defaults
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import check_vocabulary, prepare
from headstart.text.settings import SplitName
from headstart.training.arms import ArmInputs
from headstart.training.cache import CacheIncomplete
from headstart.training.settings import Arm
from headstart.training.variants import are_trained, run_variants

Baselines = Sequence[tuple[str, Checkpoint, TokenBlocks]]
"""Models that arms are compared with: name in the recipe, checkpoint, and text in its tokens."""


def correct_stage(run: Run) -> Run:
    """The run with its teacher tuned on its text, if its recipe asks for that."""
    teacher = corrected_teacher(run.recipe, run.teacher, run.text)
    if run.recipe.teacher_correction.tokens:
        folders = sorted({run.folder, *(of_bin.folder for of_bin in run.bins())})
        from_main(lambda: pin_corrected(folders, teacher.hash))
    return replace(run, teacher=teacher)


def search_stage(run: Run) -> list[dict[str, Any]]:
    """Search each of the run's bins; the outcome is in the `search.json` of its folder."""
    searches = {of_bin.folder: of_bin.pinned.search for of_bin in run.bins()}
    outcomes = []
    for folder, outcome in zip(searches, search_bins(run.teacher, run.text, searches), strict=True):
        if is_main():
            write_search_html(outcome, folder / "search.html")
        outcomes.append(outcome)
    return outcomes


def _calibration_blocks(run: Run) -> Int[Tensor, "blocks tokens"] | None:
    """The text that a run's student is calibrated on; None for a plain slice."""
    settings = run.recipe.search
    if settings.init == "slice":
        return None
    return run.text.sample("train", settings.calibration_tokens)


def calibration_of(run: Run, spec: SubnetSpec) -> Calibration:
    """What a run's student is cut out of, and how; found in the cache if the search made it."""
    blocks = _calibration_blocks(run)
    if blocks is None:
        return Calibration(run.teacher)
    return calibrate(run.teacher, run.recipe.search.init, blocks, spec=spec)


def extract_stage(run: Run) -> Checkpoint:
    """Cut out what the search has found, unless that is done."""
    folder = run.folder / "student"
    # A slice is cut by the main process, a refit by all.
    together = run.recipe.search.init != "slice"

    def extract() -> None:
        extract_found(
            run.teacher,
            run.folder / "search.json",
            folder,
            init=run.recipe.search.init,
            calibration_blocks=_calibration_blocks(run),
            provenance={
                "teacher_name": teacher_name(run.recipe.teacher),
                "teacher_commit": run.revisions.get(run.recipe.teacher, ""),
                "recipe": recipe_to_dict(run.recipe),
            },
            together=together,
        )

    if not from_main(folder.exists):
        extract() if together else from_main(extract)
    return from_main(lambda: Checkpoint.open(folder))


def pretrain_stage(run: Run, student: Checkpoint, baselines: Baselines) -> dict[str, Any]:
    """Train every arm, compare, and write `result.json` and `report.html`."""
    inputs = arm_inputs(run, student)
    for arm in run.recipe.pretrain.arms:
        train_stage(run, arm, inputs)
    return report_stage(run, inputs, baselines)


def arm_inputs(run: Run, student: Checkpoint) -> ArmInputs:
    """What every arm of a run needs."""
    shapes = from_main(lambda: _shapes(run, student))
    recipe = run.recipe
    return ArmInputs(
        student, run.teacher, run.text, recipe.pretrain, recipe.train, shapes, run.others
    )


def train_stage(run: Run, arm: Arm, inputs: ArmInputs) -> None:
    """Train an arm, or go on with it, unless that is done; other processes are kept out of its
    folder. What is missing of its teacher cache is written first, or by whoever is writing it."""
    folder, pretrain = run.folder / "arms" / arm.name, run.recipe.pretrain
    others = [
        other
        for other in pretrain.arms
        if other != arm and other.kd and arm.kd and other.kd.cache == arm.kd.cache
    ]

    def write_missing() -> None:
        arms = [arm, *others]
        write_caches(run.teachers, run.text, pretrain, run.recipe.train, arms, reads_along=True)

    with locked_by_main(folder):
        if from_main(lambda: are_trained(arm, pretrain, folder)):
            return
        write_missing()
        try:
            run_variants(arm, inputs, folder)
            return
        except CacheIncomplete as error:
            assert arm.kd is not None
            if world_size() > 1:  # the other processes wait for this one's gradients
                # Without a loader's traceback.
                raise CacheIncomplete.at(arm.kd.cache) from error
            console.print(f"nobody writes kd.cache {arm.kd.cache} any more; adding the rest")
        write_missing()
        run_variants(arm, inputs, folder)


def report_stage(run: Run, inputs: ArmInputs, baselines: Baselines) -> dict[str, Any]:
    """Compare the arms that are trained, and write `result.json` and `report.html`."""
    recipe, arms = run.recipe, run.folder / "arms"
    done = from_main(
        lambda: [
            arm
            for arm in recipe.pretrain.arms
            if are_trained(arm, recipe.pretrain, arms / arm.name)
        ]
    )
    trained = {arm.name: run_variants(arm, inputs, arms / arm.name) for arm in done}

    def report() -> dict[str, Any]:
        compared = _compared(run, baselines)
        result = result_of(recipe, run.folder, inputs, compared, trained)
        result |= {"revisions": dict(run.revisions), "vocabulary_sizes": _vocabulary_sizes(run)}
        # What took long is safe before models are asked to write.
        write_json(run.folder / "result.json", {**result, "continuations": [], "zero_shot": []})
        result |= _exhibits(run, inputs, baselines, result)
        write_json(run.folder / "result.json", result)
        for entry in result["arms"]:
            model = arms / entry["name"] / entry["folder"] / "model"
            if entry["init"] == "subnet" and model.is_dir():
                _describe(model, inputs.student.folder, entry, result)
        return run_report(run.folder)

    return from_main(report)


def _exhibits(
    run: Run, inputs: ArmInputs, baselines: Baselines, result: dict[str, Any]
) -> dict[str, Any]:
    """What `result.json` shows of the models beside losses."""
    settings = run.recipe.report
    teacher, student = (
        Exhibit("teacher", "teacher", run.teacher),
        Exhibit("student", "student", inputs.student),
    )
    models = {
        arm["name"]: run.folder / "arms" / arm["name"] / arm["folder"] / "model"
        for arm in result["arms"]
    }
    arms = [
        Exhibit("arm", name, Checkpoint.open(model))
        for name, model in models.items()
        if model.is_dir()
    ]
    others = [Exhibit("baseline", name, model) for name, model, _ in baselines]
    return {
        "continuations": continuations([teacher, student, *arms], run.text, settings),
        "zero_shot": zero_shot_scores([teacher, *others, student, *arms], settings),
    }


def _shapes(run: Run, student: Checkpoint) -> dict[str, Architecture]:
    """The architectures of arms that are not shaped like the student."""
    recipe, search_settings = run.recipe, run.recipe.search
    if not (run.folder / "search.json").is_file():  # a given student, of which no bin is known
        size = student.architecture.count(recipe.data.block_length).parameters
        search_settings = replace(search_settings, bin=BinSettings(around=size), bins=())
    names = [arm.shape for arm in recipe.pretrain.arms]
    return arm_shapes(names, run.teacher.architecture, search_settings, recipe.data.block_length)


def _vocabulary_sizes(run: Run) -> list[dict[str, Any]] | None:
    """What the teacher is with smaller vocabularies; None for a run with the whole one."""
    settings = run.pinned.vocabulary
    if not settings.size:
        return None
    return vocabulary_sizes(Checkpoint.open(run.pinned.teacher), settings, run.pinned.data)


def _compared(run: Run, baselines: Baselines) -> Compared:
    """Losses of the teacher, of the baselines, and of other teachers, measured once.

    A baseline may have another tokenizer: its losses are turned into nats for each of the teacher's
    tokens by the bits per byte of text, which is the same.
    """
    kept = run.folder / "compared.json"
    if not kept.is_file():
        others = [(name, other.checkpoint, run.text) for name, other in run.others.items()]
        compared = [("teacher", run.teacher, run.text), *baselines, *others]
        write_json(kept, [_losses(name, model, text, run) for name, model, text in compared])
    teacher, *rest = json.loads(kept.read_text())
    return Compared(teacher, rest[: len(baselines)], rest[len(baselines) :])


def _losses(name: str, model: Checkpoint, text: TokenBlocks, run: Run) -> dict[str, Any]:
    """A model's losses on the run's text, which is given in the model's own tokens."""
    settings = run.recipe.pretrain
    num_tokens: dict[SplitName, int] = {
        "validation": settings.validation_tokens, "test": settings.test_tokens,
    }  # fmt: skip
    losses, found = {}, {}
    for split, wanted in num_tokens.items():
        ours, theirs = run.text.bytes_per_token(split), text.bytes_per_token(split)
        found = text_loss(model, text, round(wanted * ours / theirs), split)
        losses[split] = found["loss"] * ours / theirs
    return {
        "name": name,
        "parameters": found["parameters"],
        "tokens": found["tokens"],
        "bits_per_byte": bits_per_byte(found["loss"], text.bytes_per_token("test")),
        "loss": losses["test"],
        "losses": losses,
    }


def _describe(model: Path, student: Path, arm: dict[str, Any], result: dict[str, Any]) -> None:
    """Say beside a trained model what it was cut from and how it was trained."""
    if not (model / CARD).is_file():  # one that is there may have been edited
        shutil.copyfile(student / "subnet.json", model / "subnet.json")
        write_card(model, {"Training": training_note(arm, result)})


def baselines_of(run: Run) -> Baselines:
    """The baselines, each with the run's text in its own tokens; every process must call it.

    Raises:
        UserError: a baseline is of a family that cannot be read, has no tokenizer, no row for a
            token, or too short a context.
    """
    names, pinned = run.recipe.pretrain.baselines, run.pinned
    needed = needed_text(run.recipe, run.teacher.architecture)
    found = []
    for name, model in zip(names, pinned.pretrain.baselines, strict=True):
        baseline = Checkpoint.open(model)
        baseline.architecture.check_context(pinned.data.block_length)
        text = prepare(pinned.data, baseline.folder, needed=needed)
        check_vocabulary(text, baseline.architecture.config.vocab_size)
        found.append((name, baseline, text))
    return found


def run_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """All stages: search, extract, pretrain, report; for each bin, if there are several.

    Under torchrun the processes share the search, and train each arm together.

    Returns:
        The result of each bin, in the recipe's order.
    """
    with open_run(recipe) as run:
        baselines = baselines_of(run)
        run = correct_stage(run)
        from_main(lambda: check_caches(run.teachers, run.text, recipe.pretrain.arms))
        if run.student is None:
            search_stage(run)
        return [
            pretrain_stage(of_bin, run.student or extract_stage(of_bin), baselines)
            for of_bin in run.bins()
        ]


def run_arm_alone(recipe: Recipe, name: str) -> dict[str, Any]:
    """All stages for one arm of a single bin, beside other processes with other arms.

    Search and extraction are done by whichever process comes first, while the others wait; each
    reports what is trained by then.

    Raises:
        UserError: the recipe has no such arm, or several bins; or another process trains the arm.
    """
    arms = {arm.name: arm for arm in recipe.pretrain.arms}
    if name not in arms:
        raise UserError(f"--arm is {name!r}; choose one of {', '.join(arms)}")
    if recipe.search.bins:
        raise UserError(f"--arm {name} needs --bin, since the recipe has several bins")
    with process_group():
        with open_run(recipe, waits=True) as run:
            baselines = baselines_of(run)
            run = correct_stage(run)
            from_main(lambda: check_caches(run.teachers, run.text, [arms[name]]))
            if run.student is None:
                search_stage(run)
            inputs = arm_inputs(run, run.student or extract_stage(run))
        train_stage(run, arms[name], inputs)
        with locked_by_main(run.folder, waits=True):
            return report_stage(run, inputs, baselines)


def run_search(recipe: Recipe) -> list[dict[str, Any]]:
    """Prepare the text and search each bin.

    Returns:
        The outcome of each bin, in the recipe's order.
    """
    with open_run(recipe) as run:
        return search_stage(correct_stage(run))


def run_pretrain(recipe: Recipe) -> dict[str, Any]:
    """Train every arm and report.

    The student is the recipe's own folder, or the one that was extracted in this run folder.
    """
    student = recipe.student or str(Path(recipe.output) / "student")
    with open_run(recipe, student) as run:
        baselines = baselines_of(run)
        run = correct_stage(run)
        from_main(lambda: check_caches(run.teachers, run.text, recipe.pretrain.arms))
        assert run.student is not None
        return pretrain_stage(run, run.student, baselines)


def run_report(folder: Path) -> dict[str, Any]:
    """Print the result table of a run folder and write its `report.html`."""
    result = load_result(folder)
    write_html(result, folder / "report.html")
    output.print(result_table(result))
    if budget_rows(result):
        output.print(budget_table(result))
    output.print(headline(result))
    for sentences in (
        error_sentences,
        forecast_sentences,
        bits_sentences,
        baseline_sentences,
        missing_sentences,
    ):
        for sentence in sentences(result):
            output.print(sentence)
    output.print(f"report: {folder / 'report.html'}")
    return result


def run_comparison(folders: Sequence[Path], out: Path) -> None:
    """Print the table of several run folders, and write a page that sets them side by side.

    Raises:
        UserError: a folder stands twice, or as `load_result`.
    """
    names = [str(folder) for folder in folders]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{duplicates.pop()} is given twice; name each run once")
    results = {name: load_result(Path(name)) for name in names}
    runs = {  # keys that are newer than a run stand at their defaults
        name: {**result, "recipe": with_defaults(result["recipe"], Recipe)}
        for name, result in results.items()
    }
    output.print(runs_table(runs))
    for sentence in caution_sentences(runs):
        output.print(sentence)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(runs, out)
    output.print(f"report: {out}")
