"""The whole search on a small teacher: what it writes, that it goes on, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headstart.data import DataSettings, TokenBlocks, prepare
from headstart.evaluate import mean_loss
from headstart.search import run as module
from headstart.search.bins import BinSettings
from headstart.search.evolution import EvolutionSettings
from headstart.search.finalists import FinalistSettings
from headstart.search.grid import GridSettings
from headstart.search.importance import activation_importance
from headstart.search.racing import RacingSettings
from headstart.search.run import SearchSettings, load_spec, search
from headstart.subnet.extract import build_student, extract
from headstart.subnet.spec import SubnetSpec

SETTINGS = SearchSettings(
    bin=BinSettings(low="25K", high="35K"),
    evolution=EvolutionSettings(population=5, generations=3, elites=2),
    tokens=300,
    calibration_tokens=600,
    batch_size=4,
)
BLOCK_LENGTH = 32


@pytest.fixture(scope="module")
def blocks(
    corpus: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TokenBlocks:
    settings = DataSettings(str(corpus), block_length=BLOCK_LENGTH, search_fraction=0.2)
    return prepare(settings, teacher_folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


def timeless(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """search.json and the sorted search.jsonl without what a clock or a place says."""
    result = json.loads((folder / "search.json").read_text())
    del result["search_seconds"]
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return result, sorted(map(json.dumps, lines))


@pytest.mark.parametrize("order", ["activation", "magnitude", "taylor", "teacher"])
@pytest.mark.parametrize(
    "space", ["coarse-uniform", "fine-uniform", "coarse-layerwise", "fine-layerwise"]
)
def test_the_winner_is_the_best_and_is_what_it_says(
    space: Any, order: Any, teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    depth = {"activation": "block_influence"}.get(order, order)
    settings = replace(SETTINGS, space=space, order=order, layer_order=depth)
    result = search(teacher_folder, blocks, settings, folder)
    assert result == json.loads((folder / "search.json").read_text())
    candidates = result["candidates"]
    assert len(candidates) == 15
    assert all(25_000 <= one["parameters"] == one["amount"] <= 35_000 for one in candidates)
    winner, whole = candidates[result["winner"]], 10 * BLOCK_LENGTH  # 300 tokens round up
    raced = [one["loss"] for one in candidates if one["tokens"] == whole]
    assert result["loss"] == winner["loss"] == min(raced)
    assert (winner["tokens"], result["parameters"]) == (whole, winner["parameters"])
    assert result["search_tokens"] == sum(one["tokens"] for one in candidates) < 15 * whole

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    state = {name: one for name, one in teacher.state_dict().items() if name != "lm_head.weight"}
    spec = load_spec(folder / "search.json")
    student = build_student(state, teacher.config, spec)
    assert student.num_parameters() == result["parameters"]
    assert mean_loss(student, blocks.first("search", 300), 4) == pytest.approx(result["loss"], 1e-5)
    if space.endswith("uniform"):
        extract(teacher_folder, spec, tmp_path / "student")
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
        tokens = blocks.first("search", 300)
        with torch.no_grad():
            loss = float(student(input_ids=tokens, labels=tokens).loss)
        assert result["loss"] == pytest.approx(loss, abs=1e-5)
    if space.startswith("coarse") and order in ("teacher", "activation"):
        batches = blocks.first("train", 600).split(4)
        scores = activation_importance(teacher, batches)
        for layer, kept in zip(spec.layers, spec.mlp, strict=True):
            first = range(len(kept))
            ranks = first if order == "teacher" else scores.orders().mlp[layer][: len(kept)]
            assert set(kept) == set(ranks)


@pytest.mark.parametrize("measure", ["flops_per_token", "kv_cache_bytes_per_token", "weight_bytes"])
def test_bins_of_every_measure(
    measure: Any, teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    bins = {"flops_per_token": ("50K", "70K"), "weight_bytes": ("100K", "140K")}
    low, high = bins.get(measure, (512, 768))
    settings = replace(SETTINGS, bin=BinSettings(low, high, measure=measure))
    result = search(teacher_folder, blocks, settings, tmp_path)
    low, high = result["bin"]
    assert all(low <= one["amount"] <= high for one in result["candidates"])


def test_narrower_heads_and_divergence_and_finals(
    teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    settings = replace(
        SETTINGS,
        fitness="kl",
        grid=GridSettings(head_dim_min=4, head_dim_step=4),
        racing=RacingSettings(rungs=1),
        finalists=FinalistSettings(count=3, steps=4, batch_size=2),
    )
    result = search(teacher_folder, blocks, settings, tmp_path)
    assert len({one["sizes"]["head_dim"] for one in result["candidates"]}) > 1
    finals = [one for one in result["candidates"] if "trained_loss" in one]
    assert len(finals) == 3
    winner = result["candidates"][result["winner"]]
    assert winner["trained_loss"] == min(one["trained_loss"] for one in finals)
    shapes = {(one["sizes"]["layers"], one["sizes"]["embed"]) for one in finals}
    assert len(shapes) == 3
    (tmp_path / "search.json").unlink()
    lines = (tmp_path / "search.jsonl").read_text()
    again = search(teacher_folder, blocks, settings, tmp_path)
    assert (tmp_path / "search.jsonl").read_text() == lines
    assert again == result
    extract(teacher_folder, load_spec(tmp_path / "search.json"), tmp_path / "student")


def test_a_tradeoff_ends_with_its_front(
    teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    evolution = replace(SETTINGS.evolution, tradeoff="parameters")
    settings = replace(SETTINGS, evolution=evolution, racing=RacingSettings(rungs=1))
    result = search(teacher_folder, blocks, settings, tmp_path)
    points = [(one["loss"], one["parameters"]) for one in result["candidates"]]
    front = [
        place
        for place, (loss, size) in enumerate(points)
        if not any(a <= loss and b <= size and (a, b) != (loss, size) for a, b in points)
    ]
    assert sorted(result["front"]) == front and result["winner"] in front


def test_importance_is_measured_once_for_a_teacher_and_its_text(
    teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = module.measure_importance

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(module, "measure_importance", counted)
    for place, settings in enumerate(
        (SETTINGS, replace(SETTINGS, space="fine-uniform"), replace(SETTINGS, order="magnitude"))
    ):
        search(teacher_folder, blocks, settings, tmp_path / str(place))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 0}, "search.tokens is 0"),
        ({"calibration_tokens": -1}, "search.calibration_tokens is -1"),
        ({"batch_size": -1}, "search.batch_size is -1"),
        ({"unit_noise": 1.5}, "search.unit_noise is 1.5"),
        ({"bins": (BinSettings(around="1M"),)}, "search.bin and search.bins are both set"),
        ({"bin": BinSettings(), "bins": (BinSettings(around="1M"),) * 2}, "holds '1M' twice"),
        ({"evolution": EvolutionSettings(tradeoff="parameters")}, "racing.rungs to 1"),
    ],
)
def test_settings_errors_name_the_setting(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changed)


def command(teacher_folder: Path, corpus: Path, output: Path) -> list[str]:
    keys = {
        "teacher": teacher_folder,
        "data": corpus,
        "data.block_length": BLOCK_LENGTH,
        "output": output,
        "search.bin": "{low: 25K, high: 35K}",
        "search.space": "fine-layerwise",
        "search.tokens": 256,
        "search.calibration_tokens": 256,
        "search.evolution": "{population: 6, generations: 3, elites: 2}",
        "search.finalists": "{count: 3, steps: 2, batch_size: 2}",
        "train.per_device_train_batch_size": 2,
    }
    given = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return ["-m", "headstart.cli", "search", *given]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_command(arguments: list[str]) -> None:
    environment = {**ONE_THREAD, "HEADSTART_CACHE": os.environ["HEADSTART_CACHE"]}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_search_like_one(teacher_folder: Path, corpus: Path, tmp_path: Path) -> None:
    one, two = command(teacher_folder, corpus, tmp_path / "one"), tmp_path / "two"
    run_command(one)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run_command([*torchrun, *command(teacher_folder, corpus, two)])
    assert timeless(two) == timeless(tmp_path / "one")

    # Two processes go on with what one has begun.
    resumed = tmp_path / "resumed"
    run_command(command(teacher_folder, corpus, resumed))
    (resumed / "search.json").unlink()
    journal = resumed / "search.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:8]))
    run_command([*torchrun, *command(teacher_folder, corpus, resumed)])
    assert timeless(resumed) == timeless(two)


def test_killed_it_goes_on_to_the_same_winner(
    teacher_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    run_command(command(teacher_folder, corpus, tmp_path / "whole"))
    killed = tmp_path / "killed"
    arguments = command(teacher_folder, corpus, killed)
    environment = {**ONE_THREAD, "HEADSTART_CACHE": os.environ["HEADSTART_CACHE"]}
    journal = killed / "search.jsonl"
    for lines in (2, 9, 16):
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.is_file() and journal.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        assert process.poll() is None, "the search ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_command(arguments)
    assert timeless(killed) == timeless(tmp_path / "whole")


SPEC = SubnetSpec((0, 2), (1, 2, 3), ((0,), (1,)), ((4, 5), (5, 6)))


def test_a_spec_is_read_with_or_without_its_surroundings(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    for content in (SPEC.to_json(), {"loss": 3.0, "spec": SPEC.to_json()}):
        path.write_text(json.dumps(content))
        assert load_spec(path) == SPEC


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", "holds no spec"),
        ('{"spec": 3}', "holds no spec"),
        ('{"spec": null}', "holds no spec"),
        ('{"loss": 3.0}', "lacks embed, kv_groups, layers, mlp"),
        (json.dumps({**SPEC.to_json(), "embed": "1-"}), "'1-' is not a list of indices"),
    ],
)
def test_spec_errors_tell_the_mistake(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_spec(path)


def test_spec_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        load_spec(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="is a folder"):
        load_spec(tmp_path)
