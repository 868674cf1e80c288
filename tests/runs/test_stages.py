"""The whole chain on a small teacher: its answer, its resume after a kill."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tests.conftest import extract
from tests.runs.conftest import BLOCK_LENGTH, answer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from headstart.calibration.costs import propagation_flops
from headstart.cli import main
from headstart.evaluation.scoreboard import EvaluationSettings, run_evaluate
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import SubnetSpec
from headstart.recipe import recipe_from_dict
from headstart.runs import caches
from headstart.runs.ahead import run_cache_teacher
from headstart.runs.extraction import extract_found
from headstart.runs.plan import print_search_plans
from headstart.runs.run import open_run
from headstart.runs.stages import run_pretrain, run_recipe, run_search
from headstart.runs.trimming import trim
from headstart.system.errors import UserError
from headstart.system.files import scratch_prefix
from headstart.text.prepare import check_source, prepare
from headstart.text.settings import DataSettings, VocabularySettings
from headstart.training.cache import CACHE_FORMAT, WRITING, TeacherCache
from headstart.training.cache_writer import write_cache
from headstart.training.trainer import ReportStep

CLI = str(Path(__file__).parents[1] / "float32_cli.py")


def test_run_answers(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = run_recipe(recipe_from_dict(recipe))
    folder = Path(recipe["output"])
    student = folder / "student"

    written = sum(tensor.numel() for tensor in load_file(student / "model.safetensors").values())
    assert result["student"]["parameters"] == written
    assert 30_000 <= written <= 45_000
    assert result["student"]["bin"] == [30_000, 45_000]

    scratch, subnet, distilled = result["arms"]
    assert [arm["name"] for arm in result["arms"]] == ["scratch", "subnet", "subnet+kd"]
    assert {arm["tokens"] for arm in result["arms"]} == {1920}  # 1900 in whole steps of 4 x 32
    assert subnet["loss_before"] == distilled["loss_before"] != scratch["loss_before"]
    assert (result["reference"], result["compared_on"]) == ("scratch", "validation")
    assert result["target_loss"] == scratch["curve"][-1]["loss"] != scratch["loss_final"]

    # FLOPs: per token from the counts, and the search and calibration before the first token.
    teacher = Architecture.read(Path(recipe["teacher"]))
    student_flops = Architecture.read(student).count(BLOCK_LENGTH)
    teacher_flops = teacher.count(BLOCK_LENGTH)
    costs = result["costs"]
    candidates = result["search"]["candidates"]
    assert costs["search_tokens"] == sum(one["tokens"] for one in candidates)
    assert {one["tokens"] for one in candidates} <= {32, 64, 256}  # racing: of 1, 2, 8 blocks
    sizes = Architecture.read(student).sizes
    refit = propagation_flops(teacher, sizes, 512 // BLOCK_LENGTH, BLOCK_LENGTH)
    outputs = 2 * teacher.sizes["vocab"] * teacher.sizes["embed"]  # which importance needs not
    importance = 512 * (teacher_flops.inference_flops_per_token - outputs)
    assert costs["calibration_flops"] == importance + refit
    upfront = costs["calibration_flops"] + costs["search_flops"]
    per_token = student_flops.training_flops_per_token
    assert scratch["curve"][-1]["flops"] == 1920 * per_token
    assert subnet["curve"][-1]["flops"] == upfront + 1920 * per_token
    assert distilled["curve"][-1]["flops"] == upfront + 1920 * (
        per_token + teacher_flops.inference_flops_per_token
    )

    assert (folder / "report.html").stat().st_size < 200_000
    assert [len(entry["models"]) for entry in result["continuations"]] == [5, 5, 5]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["search"]["tokens"] == 256
    assert list((folder / "arms" / "scratch").rglob("events.out.tfevents*"))
    origin = json.loads((student / "subnet.json").read_text())
    assert (origin["parameters"], origin["bin"]) == (written, [30_000, 45_000])

    # The very same command again trains nothing and answers the same.
    before = answer(folder)
    start = time.perf_counter()
    run_recipe(recipe_from_dict(recipe))
    assert answer(folder) == before
    assert time.perf_counter() - start < 20

    # The trained model's loss on disk is the arm's.
    from headstart.text.settings import DataSettings

    settings = DataSettings(**recipe["data"])
    model = str(folder / "arms" / "subnet" / "model")
    (found,) = run_evaluate([model], EvaluationSettings(settings)).values()
    assert found["loss"] == pytest.approx(subnet["loss_final"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_several_budgets_against_several_random_shapes(recipe: dict[str, Any]) -> None:
    config = json.loads((Path(recipe["teacher"]) / "config.json").read_text())
    shape = Path(recipe["output"]).parent / "shape" / "config.json"
    shape.parent.mkdir()
    shape.write_text(json.dumps({**config, "num_hidden_layers": 1, "vocab_size": 999}))
    recipe["search"]["finalists"] = {"count": 2, "steps": 1}
    random = {"init": "random", "learning_rate": 1e-2}
    recipe["pretrain"] |= {
        "budgets": [640, 1280, "2560"],
        "test_tokens": 512,
        "arms": [
            {**random, "name": "alike"},
            {**random, "name": "in proportion", "shape": "proportional"},
            {**random, "name": "shallow", "shape": str(shape), "learning_rates": [1e-3, 1e-2]},
            {"name": "start", "learning_rate": 1e-3},
        ],
    }
    del recipe["pretrain"]["tokens"]
    (result,) = run_recipe(recipe_from_dict(recipe))
    alike, proportional, shallow, start = result["arms"]
    assert result["compared_on"] == "test"
    # Of the random arms, the one that ends lowest on the test split.
    random_arms = [alike, proportional, shallow]
    for place, match in enumerate(start["matches"]):
        best = min(random_arms, key=lambda arm: arm["budgets"][place]["loss"])
        assert match["reference"] == best["name"]
        assert match["target_loss"] == best["budgets"][place]["loss"]
    assert [budget["tokens"] for budget in start["budgets"]] == [640, 1280, 2560]
    # Each arm is what it says: the bin's proportional shape, and the other model with these tokens.
    assert 30_000 <= proportional["parameters"] <= 45_000
    assert (shallow["sizes"]["layers"], shallow["sizes"]["vocab"]) == (1, config["vocab_size"])
    arms = Path(recipe["output"]) / "arms"
    for arm in result["arms"]:
        model = arms / arm["name"] / arm["folder"] / "model" / "model.safetensors"
        written = sum(tensor.numel() for tensor in load_file(model).values())
        assert written == arm["parameters"]
        per_token = Architecture.read(model.parent).count(BLOCK_LENGTH).training_flops_per_token
        paid = arm["budgets"][1]["flops"] - arm["curve"][0]["flops"]
        assert paid == 1280 * per_token
    page = (Path(recipe["output"]) / "report.html").read_text()
    has_saved = any(match["tokens_factor"] for match in start["matches"])
    heading = "What it saves at every budget" if has_saved else "Every budget"
    assert f"<h2>{heading}</h2>" in page


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ({"init": "random", "shape": "/nowhere"}, "/nowhere"),
        ({"shape": "proportional"}, "set its init to random, or leave out shape"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_before_the_search(
    arm: dict[str, str], sentence: str, recipe: dict[str, Any]
) -> None:
    recipe["pretrain"]["arms"] = [{"name": "a", **arm}]
    with pytest.raises(UserError, match=sentence):
        run_recipe(recipe_from_dict(recipe))
    assert not (Path(recipe["output"]) / "search.jsonl").exists()


def test_pretrain_alone_takes_any_extracted_student(recipe: dict[str, Any], tmp_path: Path) -> None:
    from headstart.model.spec import SubnetSpec

    layers = (0, 2, 3)
    spec = SubnetSpec(layers, tuple(range(24)), ((0,),) * 3, (tuple(range(40)),) * 3)
    student = extract(recipe["teacher"], spec, tmp_path / "student")
    recipe["student"] = str(student)
    recipe["pretrain"]["arms"] = [{"name": "only", "learning_rate": 1e-3}]
    del recipe["search"]
    result = run_pretrain(recipe_from_dict(recipe))
    assert result["search"] is None
    assert result["target_loss"] is None
    assert result["student"]["kept_layers"] == [0, 2, 3]
    assert result["arms"][0]["tokens_to_match"] is None
    assert sizes_of_student(student) == {"layers": 3, "embed": 24, "kv_groups": 1, "mlp": 40}


def test_a_student_from_the_stages_is_charged_with_its_search(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    (outcome,) = run_search(recipe_from_dict(recipe))
    spec = Path(recipe["output"]) / "search.json"
    recipe |= {"student": str(tmp_path / "student"), "output": str(tmp_path / "trained")}
    teacher = Checkpoint.open(recipe["teacher"])
    extract_found(teacher, spec, Path(recipe["student"]), init="slice")
    result = run_pretrain(recipe_from_dict(recipe))
    upfront = outcome["calibration_flops"] + outcome["search_flops"]
    scratch, subnet, _ = result["arms"]
    assert [scratch["curve"][0]["flops"], subnet["curve"][0]["flops"]] == [0, upfront]
    assert result["student"]["bin"] == [30_000, 45_000]


def test_changed_text_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "corpus.jsonl"
    text.write_bytes(Path(recipe["data"]["source"]).read_bytes())
    recipe["data"]["source"] = str(text)
    run_search(recipe_from_dict(recipe))
    with text.open("a") as stream:
        stream.write('{"text": "one more document"}\n')
    with pytest.raises(ValueError, match="the data has changed since"):
        run_search(recipe_from_dict(recipe))


@pytest.mark.parametrize("name", ["choice of blocks", "order of blocks"])
def test_a_run_whose_text_had_another_order_is_refused(recipe: dict[str, Any], name: str) -> None:
    with open_run(recipe_from_dict(recipe)) as run:
        kept = run.folder / "inputs.json"
        begun = json.loads(kept.read_text())
    del begun[name]  # as an earlier version wrote it
    kept.write_text(json.dumps(begun))
    sentence = f"was begun by an earlier version of headstart, which had another {name}; choose"
    with pytest.raises(UserError, match=sentence), open_run(recipe_from_dict(recipe)):
        pass


def test_mistakes_about_the_student_come_before_training(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(recipe["teacher"], plain)
    recipe["student"] = str(plain)
    with pytest.raises(ValueError, match="holds no extracted student"):
        run_pretrain(recipe_from_dict(recipe))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "vocab_size": 130}))
    (plain / "subnet.json").write_text("{}")
    with pytest.raises(ValueError, match="128 vocabulary rows and the student 130"):
        run_pretrain(recipe_from_dict(recipe))
    assert not (Path(recipe["output"]) / "arms").exists()


def test_a_step_larger_than_the_text_comes_before_the_search(recipe: dict[str, Any]) -> None:
    recipe["train"]["gradient_accumulation_steps"] = 1000
    with pytest.raises(ValueError, match="a step takes 128,000 tokens but the training split has"):
        run_recipe(recipe_from_dict(recipe))
    assert not Path(recipe["output"]).exists()  # so the mended recipe may go there


def sizes_of_student(student: Path) -> dict[str, int]:
    from transformers import AutoConfig

    sizes = Architecture.of(AutoConfig.from_pretrained(student)).sizes
    return {axis: sizes[axis] for axis in ("layers", "embed", "kv_groups", "mlp")}


@pytest.mark.exhaustive
def test_killed_in_every_stage_goes_on_to_the_same_answer(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    whole = {**recipe, "output": str(tmp_path / "whole")}
    run_recipe(recipe_from_dict(whole))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    folder = Path(recipe["output"])

    def journal_lines() -> int:
        journal = folder / "search.jsonl"
        return len(journal.read_text().splitlines()) if journal.exists() else 0

    stages: list[Callable[[], bool]] = [
        lambda: (folder / "recipe.yaml").exists(),
        lambda: journal_lines() >= 4,
        lambda: bool([*folder.glob(".unfinished-student-*"), *folder.glob("student")]),
        lambda: bool(list((folder / "arms" / "scratch").glob("checkpoint-*"))),
        lambda: bool(list((folder / "arms" / "subnet+kd").glob("checkpoint-*"))),
    ]
    for reached in stages:
        process = subprocess.Popen(
            [sys.executable, CLI, "run", str(path)],
            env=os.environ,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not reached() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert reached()
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_recipe(recipe_from_dict(recipe))
    assert answer(folder) == answer(Path(whole["output"]))


def test_several_bins_have_a_run_each(recipe: dict[str, Any]) -> None:
    bins = [{"low": "30K", "high": "35K"}, {"low": "40K", "high": "45K", "name": "large"}]
    recipe["search"] = {**recipe["search"], "bins": bins}
    del recipe["search"]["bin"]
    outcomes = run_search(recipe_from_dict(recipe))
    folder = Path(recipe["output"])
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "recipe.yaml", "inputs.json"),
        *("30K-35K", "large"),
    }
    for outcome, (low, high) in zip(outcomes, ((30, 35), (40, 45)), strict=True):
        assert all(low * 1000 <= one["amount"] <= high * 1000 for one in outcome["candidates"])
        assert outcome["bin"] == [low * 1000, high * 1000]
    assert json.loads((folder / "large" / "search.json").read_text()) == outcomes[1]
    assert run_search(recipe_from_dict(recipe)) == outcomes
    recipe["search"]["tokens"] = 300
    with pytest.raises(ValueError, match="another recipe"):
        run_search(recipe_from_dict(recipe))


OPENED: list[str] | None = None
"""Files that Python opens while this is a list. Weights are read by safetensors, but for a hash."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(watch)


def opened_in(call: Callable[[], Any], path: Path) -> int:
    """How often a call opens a file."""
    global OPENED
    OPENED = []
    try:
        call()
        return OPENED.count(str(path))
    finally:
        OPENED = None


def test_weights_and_text_are_read_once_in_a_whole_run(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two bins, through all stages: weights for their hash, text to prepare it."""
    bins = [{"low": "30K", "high": "35K"}, {"low": "40K", "high": "45K"}]
    recipe["search"] = {**recipe["search"], "bins": bins}
    del recipe["search"]["bin"]
    recipe["pretrain"] |= {"tokens": 256, "arms": recipe["pretrain"]["arms"][:2]}
    loaded = recipe_from_dict(recipe)
    weights, text = Path(recipe["teacher"]) / "model.safetensors", Path(recipe["data"]["source"])
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "nothing is known"))
    assert opened_in(lambda: Checkpoint.open(weights.parent).hash, weights) == 1
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "nothing is known either"))
    assert opened_in(lambda: run_recipe(loaded), weights) == 1
    # Once more than `prepare`: to find a mistake in the text before anything else.
    first_look = opened_in(lambda: check_source(loaded.data), text)
    alone = opened_in(lambda: prepare(loaded.data, weights.parent, tmp_path / "prepared"), text)
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "empty"))
    loaded = replace(loaded, output=str(tmp_path / "again"))
    assert opened_in(lambda: run_recipe(loaded), text) == first_look + alone


def test_layerwise_spaces_can_be_searched_and_run(recipe: dict[str, Any]) -> None:
    recipe["search"]["space"] = "fine-layerwise"
    (result,) = run_recipe(recipe_from_dict(recipe))
    student = Path(recipe["output"]) / "student"
    outcome = json.loads((student.parent / "search.json").read_text())
    winner = outcome["candidates"][outcome["winner"]]
    assert len(outcome["spec"]["mlp"]) == winner["sizes"]["layers"]
    assert result["student"]["sizes"]["mlp"] == winner["sizes"]["mlp"]
    assert result["student"]["parameters"] == winner["parameters"]
    for arm in ("scratch", "subnet"):
        model = AutoModelForCausalLM.from_pretrained(student.parent / "arms" / arm / "model")
        assert model.num_parameters() == winner["parameters"]


def test_a_plan_needs_no_weights_and_bounds_the_tokens(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["search"]["init"] = "slice"  # whose student costs nothing more to cut out
    (outcome,) = run_search(recipe_from_dict(recipe))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(recipe["teacher"]) / "config.json", bare)
    bare_recipe = recipe_from_dict({**recipe, "teacher": str(bare)})
    (plan,) = print_search_plans(bare_recipe, Architecture.read(bare))
    assert plan.bin == (30_000, 45_000)
    assert plan.num_candidates == len(outcome["candidates"])
    assert plan.tokens[0] <= outcome["search_tokens"] <= plan.tokens[1]
    upfront = outcome["calibration_flops"] + outcome["search_flops"]
    assert 0.8 * plan.flops[0] <= upfront <= 1.2 * plan.flops[1]


def with_cache(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with an arm that distils from a cache, and two passes over the text."""
    kd = {"top_k": 8, "cache": str(folder)}
    arms = [{"name": "scratch", "init": "random"}, {"name": "cached", "kd": kd}]
    return {**recipe, "pretrain": {**recipe["pretrain"], "arms": arms}}


def test_text_is_prepared_ahead(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["prepare", str(path)]) == 0
    told = capsys.readouterr().out
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *_, **__: pytest.fail("again"))
    run_search(recipe_from_dict(recipe))
    folder = Path(told.splitlines()[-1].removeprefix("text: "))
    manifest = json.loads((folder / "manifest.json").read_text())
    inputs = json.loads((Path(recipe["output"]) / "inputs.json").read_text())
    assert inputs["data"] == manifest["fingerprint"]
    assert f"train: {manifest['splits']['train']['packed_tokens']:,} tokens" in told


@pytest.mark.exhaustive
def test_processes_prepare_what_one_does(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    start, folders = [sys.executable, "-m", "headstart.cli", "prepare", str(path)], []
    for count in ("1", "2"):
        environment = {**os.environ, "HEADSTART_CACHE": str(tmp_path / count)}
        told = subprocess.run(
            [*start, "--processes", count],
            env=environment, check=True, capture_output=True, text=True, timeout=300,
        ).stdout  # fmt: skip
        folders.append(Path(told.splitlines()[-1].removeprefix("text: ")))
    alone, shared = folders
    assert {file.name for file in alone.iterdir()} == {file.name for file in shared.iterdir()}
    for file in alone.iterdir():
        assert file.read_bytes() == (shared / file.name).read_bytes()


@pytest.mark.exhaustive
def test_a_mistake_is_the_users_in_processes_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = ["prepare", str(path), "--processes", "2", "--teacher", str(tmp_path / "nowhere")]
    found = subprocess.run(
        [sys.executable, "-m", "headstart.cli", *command],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 2
    assert "nowhere' is neither a folder nor a model" in found.stderr


def test_processes_are_one_or_more(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["prepare", str(path), "--processes", "0"]) == 2
    assert "--processes is 0; use at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_run_from_a_cached_teacher(
    recipe: dict[str, Any], tmp_path: Path, is_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_cache(recipe, tmp_path / "outputs")
    if is_ahead:
        run_cache_teacher(recipe_from_dict(recipe))
        monkeypatch.setattr(caches, "load_frozen", lambda *_: pytest.fail("asked twice"))
    (result,) = run_recipe(recipe_from_dict(recipe))
    shards = map(load_file, (tmp_path / "outputs").glob("*.safetensors"))
    arm = result["arms"][1]
    num_tokens = sum(len(shard["blocks"]) for shard in shards) * BLOCK_LENGTH
    point = arm["curve"][-1]
    teacher_flops = result["costs"]["teacher_flops_per_token"] * min(point["tokens"], num_tokens)
    student_flops = result["student"]["training_flops_per_token"] * point["tokens"]
    upfront = result["costs"]["calibration_flops"] + result["costs"]["search_flops"]
    assert point["flops"] == upfront + student_flops + teacher_flops


def test_a_run_begins_on_a_cache_that_is_still_written(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It asks no teacher of its own, waits for each shard, and ends with the same weights."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    monkeypatch.setattr(caches, "write_cache", partial(write_cache, shard_bytes=20_000))
    run_recipe(recipe_from_dict(with_cache(recipe, whole)))
    shards = sorted(whole.glob("*.npy"))
    assert len(shards) > 3
    part.mkdir()
    shutil.copy(whole / "cache.json", part)
    alive = part / f"{scratch_prefix(WRITING)}1"
    (record,) = whole.glob("whole-*.json")
    wanted = json.loads(record.read_text())["wanted"]
    alive.write_text(json.dumps({"time": time.time(), "wanted": wanted}))
    steps: list[int] = []

    def write_the_rest() -> None:
        for hashes in shards:
            while not steps and hashes != shards[0]:  # training has begun on the first
                time.sleep(0.01)
            for file in (hashes.with_suffix(".safetensors"), hashes):
                shutil.copy(file, part / f".{file.name}")
                (part / f".{file.name}").rename(part / file.name)
        alive.unlink()

    on_step_end = ReportStep.on_step_end

    def counted(self: Any, args: Any, state: Any, *more: Any, **options: Any) -> Any:
        steps.append(state.global_step)
        return on_step_end(self, args, state, *more, **options)

    monkeypatch.setattr(ReportStep, "on_step_end", counted)
    monkeypatch.setattr(caches, "write_cache", lambda *_, **__: pytest.fail("written twice"))
    monkeypatch.setattr(TeacherCache.__init__, "__defaults__", (0.01,))
    again = {**with_cache(recipe, part), "output": str(tmp_path / "again")}
    again["pretrain"]["arms"] = again["pretrain"]["arms"][1:]
    writer = threading.Thread(target=write_the_rest, daemon=True)
    writer.start()
    run_recipe(recipe_from_dict(again))
    writer.join()
    told = " ".join(capsys.readouterr().err.split())
    assert "is being written; training begins on what is there" in told
    models = [
        (folder / "arms" / "cached" / "model" / "model.safetensors").read_bytes()
        for folder in (Path(recipe["output"]), tmp_path / "again")
    ]
    assert models[0] == models[1]


def test_a_cache_of_another_teacher_is_refused_before_the_search(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = with_cache(recipe, tmp_path / "outputs")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "cache.json").write_text(json.dumps({"format": CACHE_FORMAT}))
    with pytest.raises(ValueError, match="was written for another teacher"):
        run_recipe(recipe_from_dict(recipe))
    assert not (tmp_path / "run" / "search.json").exists()


def test_two_arms_cannot_make_one_cache_of_two(recipe: dict[str, Any], tmp_path: Path) -> None:
    arms = [
        {"name": str(top_k), "kd": {"top_k": top_k, "cache": str(tmp_path / "outputs")}}
        for top_k in (4, 8)
    ]
    recipe = {**recipe, "pretrain": {**recipe["pretrain"], "arms": arms}}
    with pytest.raises(UserError, match=r"two arms have the same kd.cache .* a cache of its own"):
        run_recipe(recipe_from_dict(recipe))
    assert not (tmp_path / "run" / "search.json").exists()


@pytest.mark.parametrize("command", ["prepare", "plan"])
def test_text_for_the_test_alone_is_refused(
    command: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"validation_fraction": 0.0, "search_fraction": 0.0, "test_fraction": 1.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], **data}}))
    assert main([command, str(path)]) == 2
    assert "leaves nothing to search and train on" in capsys.readouterr().err


def test_a_cache_that_no_arm_asks_for_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no arm .* set kd.cache"):
        run_cache_teacher(recipe_from_dict(recipe))


def test_a_baseline_is_measured_and_matched(recipe, tmp_path):
    """The teacher, as a baseline, has the teacher's loss."""
    copy = tmp_path / "copy"
    shutil.copytree(recipe["teacher"], copy)
    recipe["pretrain"] |= {"baselines": [str(copy)], "seeds": [0, 1], "tokens": 600}
    (result,) = run_recipe(recipe_from_dict(recipe))
    (baseline,) = result["baselines"]
    assert baseline["name"] == str(copy)
    assert baseline["loss"] == pytest.approx(result["teacher"]["loss"])
    assert baseline["parameters"] == result["teacher"]["parameters"]
    for arm in result["arms"]:
        assert len(arm["seeds"]) == 2 and arm["loss_spread"] > 0
        below = [point for point in arm["curve"] if point["loss"] <= baseline["loss"]]
        assert (arm["baseline_tokens"][0] is not None) == bool(below)
        ledger = arm["flops"]
        paid = sum(ledger[part] for part in ("calibration", "search", "training", "teacher"))
        assert paid == pytest.approx(arm["curve"][-1]["flops"])
        assert ledger["evaluation"] > 0
    page = (Path(recipe["output"]) / "report.html").read_text()
    assert "which is reached by" in page and "±" in page and "In bits per byte of text" in page


def test_a_baseline_with_another_tokenizer_is_compared_by_bytes(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Against the scoreboard, which reads the text in the baseline's own tokens."""
    source, block_length = recipe["data"]["source"], recipe["data"]["block_length"]
    data = DataSettings(source=source, block_length=block_length)
    other = trim(recipe["teacher"], VocabularySettings(90), data, tmp_path / "other")
    recipe["pretrain"] |= {"baselines": [str(other)], "validation_tokens": 10**6, "tokens": 200}
    (result,) = run_recipe(recipe_from_dict(recipe))
    (baseline,) = result["baselines"]
    scores = run_evaluate([str(other)], EvaluationSettings(data, 10**6))[str(other)]
    assert baseline["bits_per_byte"] == pytest.approx(scores["bits_per_byte"])
    assert baseline["loss"] > scores["loss"]  # its tokens are shorter
    teacher, scratch = result["teacher"], result["arms"][0]
    for model, loss in ((baseline, "loss"), (teacher, "loss"), (scratch, "loss_final")):
        bits = model["bits_per_byte" if loss == "loss" else "bits_per_byte_final"]
        nats = bits * math.log(2) * result["budget"]["bytes_per_token"]
        assert model[loss] == pytest.approx(nats)
    assert result["target_bits_per_byte"] == scratch["curve"][-1]["bits_per_byte"]


def test_a_budget_in_bytes_is_as_many_tokens_of_the_text(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["pretrain"] |= {"bytes": 3000, "arms": [{"name": "scratch", "init": "random"}]}
    read = recipe_from_dict(recipe)
    counts = prepare(read.data, recipe["teacher"]).manifest["splits"]["validation"]
    (result,) = run_recipe(read)
    exact = 3000 * counts["tokens"] / counts["text_bytes"]
    assert exact <= result["budget"]["tokens"] < exact + result["budget"]["tokens_per_step"]
    first = answer(Path(recipe["output"]))  # without the time of writing
    run_recipe(read)  # which goes on, as the recipe is the same
    assert answer(Path(recipe["output"])) == first


def test_tokens_beyond_the_teachers_rows_are_named_before_it_runs(
    recipe: dict[str, Any],
    teacher_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tokenizer with added tokens that its model was never resized for: fine until used."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<added>"])
    larger.save_pretrained(folder)
    recipe["teacher"] = str(folder)
    run_search(recipe_from_dict(recipe))
    text = Path(recipe["data"]["source"]).read_text()
    (tmp_path / "added.jsonl").write_text(text.replace('{"text": "', '{"text": "<added>'))
    recipe["data"]["source"], recipe["output"] = str(tmp_path / "added.jsonl"), str(tmp_path / "b")
    message = "the text has the token 128, and the model embeds 128: its tokenizer has 129 entries"
    with pytest.raises(UserError, match=message):
        run_search(recipe_from_dict(recipe))
    with pytest.raises(UserError, match=message):
        run_cache_teacher(recipe_from_dict(with_cache(recipe, tmp_path / "outputs")))
    assert not (tmp_path / "outputs").exists()
    identity = SubnetSpec.identity(Checkpoint.open(folder).architecture.sizes)
    (tmp_path / "spec.json").write_text(json.dumps(identity.to_json()))
    of = ["--teacher", str(folder), "--spec", str(tmp_path / "spec.json")]
    cut = ["extract", *of, "--out", str(tmp_path / "out"), "--data", str(tmp_path / "added.jsonl")]
    assert main([*cut, "--init", "least_squares", "--block-length", "32"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
