"""A small recipe over all stages, and what runs of it are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BLOCK_LENGTH = 32


@pytest.fixture
def recipe(teacher_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return {
        "teacher": str(teacher_folder),
        "output": str(tmp_path / "run"),
        "data": {"source": str(corpus), "block_length": BLOCK_LENGTH},
        "search": {
            "init": "least_squares",
            "bin": {"low": 30_000, "high": 45_000},
            "grid": {"embed_step": 12, "mlp_step": 16},
            "tokens": 256,
            "calibration_tokens": 512,
            "evolution": {"population": 5, "generations": 3, "elites": 2},
            "finalists": {"count": 0},
        },
        "pretrain": {
            "tokens": 1900,
            "validation_tokens": 512,
            "evaluations": 4,
            "arms": [
                {"name": "scratch", "init": "random", "learning_rate": 3e-3},
                {"name": "subnet", "learning_rate": 3e-3},
                {"name": "subnet+kd", "learning_rate": 3e-3, "kd": {"alpha": 0.5}},
            ],
        },
        "train": {"per_device_train_batch_size": 4, "save_steps": 3},
    }


def answer(run_folder: Path) -> dict[str, Any]:
    """result.json without what depends on the clock or the place."""
    result: dict[str, Any] = json.loads((run_folder / "result.json").read_text())
    for key in ("created", "command", "recipe", "name"):
        del result[key]
    del result["costs"]["search_seconds"]
    for arm in result["arms"]:
        for entry in (arm, *arm["budgets"]):
            del entry["seconds"]
    return result
