"""The script for machines with a GPU, at toy size: killed by its own clock, it goes on."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "at_scale.py"
TOY = {
    "data": {"block_length": 32},
    "vocabulary": {},
    "search": {
        "bin": {"tolerance": 0.2},
        "grid": {"embed_step": 12, "mlp_step": 16},
        "tokens": 256,
        "calibration_tokens": 512,
        "evolution": {"population": 4, "generations": 2, "elites": 2},
    },
    "pretrain": {"validation_tokens": 512, "test_tokens": 512, "evaluations": 3},
    "train": {"per_device_train_batch_size": 4, "save_steps": 3, "use_cpu": True, "bf16": False},
}
THROUGHPUT = ["--batch=2", "--block=16", "--untimed=1", "--steps=2", "--layers=1", "--no-compile"]
RATES = (1e-3, 3e-3)


@pytest.fixture
def files(teacher_folder: Path, corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "teacher").symlink_to(teacher_folder)
    for part in range(2):
        lines = corpus.read_text().splitlines(keepends=True)[part::2]
        with gzip.open(folder / f"text-{part}.jsonl.gz", "wt") as stream:
            stream.writelines(lines)
    return folder


@pytest.mark.exhaustive
def test_killed_by_its_clock_it_goes_on_to_the_end(files: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    case = script["Case"]
    cases = [case("40k", (2000,)), case("40k", (2000, 4000), rates_of="40k-0.002M-tokens")]

    def work(seconds: float) -> Any:
        output = tmp_path / "output"
        return script["work"](files, output, seconds, cases, TOY, RATES, THROUGHPUT)

    assert not work(0.5), "half a second does not suffice to import torch"
    calls = 1
    while not work(25.0):
        calls += 1
        assert calls < 20
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    sweep, final = (summary["runs"][one.name] for one in cases)
    names = ["scratch", "proportional", "subnet", "subnet+kd"]
    assert [arm["name"] for arm in final["arms"]] == names
    for tried, taken in zip(sweep["arms"], final["arms"], strict=True):
        losses = {one["learning_rate"]: one["loss_final"] for one in tried["sweep"]}
        assert set(losses) == set(RATES)
        assert taken["learning_rate"] == min(losses, key=lambda rate: losses[rate])
        assert [budget["tokens"] for budget in taken["budgets"]] == [2048, 4096]
        assert taken["budgets"][-1]["loss"] < taken["loss_before"]
    rows = summary["throughput"]["rows"]
    assert [row["kind"] for row in rows] == ["trainer", "headstart", "headstart+kd"]
    # Same batches, same weights, same loss: the first two do the same work.
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-4)
    table = (tmp_path / "output" / "summary.md").read_text()
    assert table.count("| subnet+kd |") == 3 and "| headstart+kd | False |" in table


def test_wheel_in_pieces_is_joined(files: Path, tmp_path: Path) -> None:
    for letter, content in zip("ab", (b"first ", b"second"), strict=True):
        (files / f"some.whl.part-a{letter}").write_bytes(content)
    script = runpy.run_path(str(SCRIPT))
    environment = script["_environment"](files, tmp_path)
    assert (tmp_path / "wheels" / "some.whl").read_bytes() == b"first second"
    assert str(tmp_path / "wheels") in environment["PIP_FIND_LINKS"].split()
