"""Ranks and collectives; a search on two processes, and one whose process is killed."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headstart.cli import main
from headstart.system.device import default_device
from headstart.system.distributed import (
    from_main,
    gather,
    is_main,
    process_group,
    rank,
    world_size,
)
from headstart.training.arguments import training_arguments
from headstart.training.settings import Arm

CLI = str(Path(__file__).parents[1] / "float32_cli.py")
WORKER = Path(__file__).parent / "ranks_worker.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BLOCK_LENGTH = 32


def run_python(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_alone_nothing_is_joined_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), rank(), is_main()) == (1, 0, True)
    done = []
    with process_group():
        assert not torch.distributed.is_initialized()
        done.append(gather(from_main(lambda: "alone")))
    assert done == [["alone"]]


def test_torchrun_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (world_size(), rank(), is_main()) == (4, 3, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_two_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_python([*TORCHRUN, str(WORKER), str(log)])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    both = [{"rank": 0, "of": 2, "main": True}, {"rank": 1, "of": 2, "main": False}]
    assert [line for line in lines if "gathered" in line] == [{"gathered": both}] * 2
    assert [line for line in lines if "decided" in line] == [{"decided": [0, 0]}] * 2
    assert [line for line in lines if "called" in line] == [{"called": [[0], []]}] * 2
    failures = [line["failed"] for line in lines if "failed" in line]
    assert sorted(failures[::2]) == sorted(failures[1::2])  # both processes saw the same
    assert {json.dumps(failed) for failed in failures} == {
        json.dumps([["UserError", "the user's mistake"]] * 2),
        json.dumps([["OSError", "no space left"], ["RuntimeError", "no space left"]]),
        json.dumps([["KeyError", ""], ["RuntimeError", "KeyError"]]),
    }
    assert [line for line in lines if "joined" in line] == [{"joined": False}] * 2


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        ({"data": "/nowhere/corpus.jsonl"}, 2, "/nowhere/corpus.jsonl does not exist"),
        ({"search.bin": "{low: 1T, high: 2T}"}, 2, "no sub-network has between"),
    ],
)
def test_the_main_process_mistake_ends_all(
    keys: dict[str, str], code: int, message: str, arguments: list[str], tmp_path: Path
) -> None:
    """Each process ends with the main one's message and exit code; none runs on or hangs."""
    log = tmp_path / "log"
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    command = [*arguments, *flags, "--output", str(tmp_path / "run")]
    program = (
        "import os, subprocess, sys\n"
        "done = subprocess.run([sys.executable, *sys.argv[2:]], capture_output=True, text=True)\n"
        "line = [os.environ['RANK'], done.returncode, done.stderr.splitlines()[-1]]\n"
        "open(sys.argv[1], 'a').write(repr(line) + '\\n')\n"
    )
    (tmp_path / "program.py").write_text(program)
    run_python([*TORCHRUN, str(tmp_path / "program.py"), str(log), CLI, *command])
    ended = sorted(map(ast.literal_eval, log.read_text().splitlines()))
    assert [(rank, returned) for rank, returned, _ in ended] == [("0", code), ("1", code)]
    assert all(line.startswith("headstart: ") and message in line for _, _, line in ended)
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def arguments(teacher_folder: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """Of a search with everything: racing, layers that differ, and finals."""
    keys = {
        "teacher": teacher_folder,
        "data": corpus,
        "data.block_length": BLOCK_LENGTH,
        "search.bin": "{low: 25K, high: 35K}",
        "search.space": "fine-layerwise",
        "search.tokens": 256,
        "search.calibration_tokens": 256,
        "search.evolution": "{population: 6, generations: 3, elites: 2}",
        "search.racing": "{rungs: 3}",
        "search.finalists": "{count: 3, steps: 8, batch_size: 2}",
        "train.per_device_train_batch_size": 2,
    }
    return ["search", *(part for key, value in keys.items() for part in (f"--{key}", str(value)))]


def outcome(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """search.json and search.jsonl without what a clock says, the scores in one order."""
    result = json.loads((folder / "search.json").read_text())
    del result["search_seconds"]
    first, *lines = map(json.loads, (folder / "search.jsonl").read_text().splitlines())
    assert all(line.pop("seconds") > 0 for line in lines)
    return result, [first, *sorted(lines, key=json.dumps)]


@pytest.fixture
def whole(arguments: list[str], tmp_path: Path) -> Path:
    """The same search on one process that nobody disturbed."""
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    tokens = [line.get("tokens") for line in outcome(tmp_path / "whole")[1]]
    assert {32, 64, 256} <= set(tokens)
    return tmp_path / "whole"


@pytest.mark.exhaustive
def test_two_processes_search_like_one(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    command = [*TORCHRUN, CLI, *arguments, "--output", str(folder)]
    run_python(command)
    assert outcome(folder) == outcome(whole)
    assert (folder / "search.html").is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_lines", [9, 23])
def test_two_processes_go_on_with_what_one_has_begun(
    num_lines: int, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    """In the middle of a generation, and of the finals; the last line is cut short."""
    resumed, journal = tmp_path / "resumed", tmp_path / "resumed" / "search.jsonl"
    shutil.copytree(whole, resumed)
    (resumed / "search.json").unlink()
    recipe = (resumed / "recipe.yaml").read_text().replace(str(whole), str(resumed))
    (resumed / "recipe.yaml").write_text(recipe)
    lines = journal.read_text().splitlines(keepends=True)
    kept = "".join(lines[:num_lines])
    journal.write_text(kept + lines[num_lines][:50])
    run_python([*TORCHRUN, CLI, "search", "--resume", str(resumed)])
    assert journal.read_text().startswith(kept)
    assert outcome(resumed) == outcome(whole)


@pytest.mark.exhaustive
def test_a_killed_process_goes_on_to_the_same_winner(
    arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    """Killed four times: when the folder appears, twice between two scores, and in the finals."""
    folder = tmp_path / "killed"
    arguments = [*arguments, "--output", str(folder)]
    num_scores = len(outcome(whole)[1]) - 1
    rng = random.Random()
    moments = sorted(rng.sample(range(1, num_scores - 4), 2))
    print("killed after", moments)  # shown if the test fails
    for moment in (0, *moments, num_scores - 2):
        process = subprocess.Popen(
            [sys.executable, CLI, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        journal, deadline = folder / "search.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if moment == 0 and (folder / "recipe.yaml").exists():
                break
            if journal.exists() and journal.read_bytes().count(b"\n") > moment > 0:
                break
            time.sleep(0.001)
        assert process.poll() is None, "the search ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "search.json").exists()
    held = journal.read_bytes()
    assert main(arguments) == 0
    assert journal.read_bytes().startswith(held[: held.rindex(b"\n") + 1])
    assert outcome(folder) == outcome(whole)


@pytest.mark.exhaustive
def test_two_processes_run_like_one_with_twice_the_batch(
    teacher_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """All stages, with a student that is refitted, an arm that distils from the teacher and one
    from a cache of it."""

    def recipe(batch_size: int, cache: str) -> dict[str, Any]:
        cached = {"top_k": 128, "cache": str(tmp_path / cache), "cache_dtype": "float32"}
        return {
            "teacher": str(teacher_folder),
            "data": {"source": str(corpus), "block_length": BLOCK_LENGTH},
            "search": {
                "bin": {"low": "25K", "high": "35K"},
                "init": "least_squares",
                "tokens": 256,
                "calibration_tokens": 256,
                "evolution": {"population": 4, "generations": 2, "elites": 2},
            },
            "pretrain": {
                "tokens": 1024,
                "validation_tokens": 256,
                "evaluations": 2,
                "arms": [
                    {"name": "scratch", "init": "random"},
                    {"name": "subnet+kd", "kd": {"temperature": 1.0}},
                    {"name": "cached", "kd": cached},
                ],
            },
            "train": {"per_device_train_batch_size": batch_size, "use_cpu": True},
        }

    results = []
    for name, launcher, batch_size in (("one", [], 4), ("two", TORCHRUN, 2)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(recipe(batch_size, f"outputs-{name}")))
        start = [*launcher, CLI]
        run_python([*start, "cache-teacher", str(path), "--output", str(tmp_path / name)])
        run_python([*start, "run", str(path), "--output", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
        assert (tmp_path / name / "report.html").is_file()
    one, two = results
    assert one["budget"] == two["budget"]
    assert one["student"] == two["student"]
    for ours, theirs in zip(one["arms"], two["arms"], strict=True):
        assert [point["tokens"] for point in ours["curve"]] == [
            point["tokens"] for point in theirs["curve"]
        ]
        losses = [[point["loss"] for point in arm["curve"]] for arm in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    shards = [tmp_path / f"outputs-{name}" / "shard-00000.safetensors" for name in ("one", "two")]
    assert shards[0].read_bytes() == shards[1].read_bytes()


@pytest.mark.parametrize(("processes", "use_cpu"), [("1", False), ("2", True)])
def test_processes_train_together_on_cpus_that_are_slow_at_bfloat16(
    processes: str, use_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate takes ranks on CPUs for processes of one run only where it is told of the CPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"WORLD_SIZE": processes, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda arguments: None)
    assert training_arguments({}, Arm("subnet"), tmp_path).use_cpu is use_cpu
