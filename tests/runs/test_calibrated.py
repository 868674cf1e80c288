"""A whole run whose student is calibrated, and the command that cuts one out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from headstart.cli import main
from headstart.recipe import recipe_from_dict
from headstart.runs.stages import run_recipe


@pytest.fixture
def recipe(teacher_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return {
        "teacher": str(teacher_folder),
        "output": str(tmp_path / "run"),
        "data": {"source": str(corpus), "block_length": 32},
        "search": {
            "bin": {"low": 30_000, "high": 45_000},
            "grid": {"embed_step": 12, "mlp_step": 16},
            "tokens": 256,
            "calibration_tokens": 512,
            "evolution": {"population": 5, "generations": 2, "elites": 2},
        },
        "pretrain": {
            "tokens": 512,
            "validation_tokens": 512,
            "evaluations": 2,
            "arms": [
                {"name": "scratch", "init": "random"},
                {"name": "subnet+kd", "kd": {"alpha": 0.5}},
            ],
        },
        "train": {"per_device_train_batch_size": 4, "use_cpu": True},
    }


@pytest.mark.parametrize("init", ["least_squares", "rotate+least_squares"])
def test_a_run_cuts_out_what_it_searched_with(
    init: str, recipe: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    recipe["search"]["init"] = init
    (result,) = run_recipe(recipe_from_dict(recipe))
    scratch, subnet = result["arms"]
    assert subnet["flops"]["calibration"] == result["costs"]["calibration_flops"] > 0
    assert scratch["flops"]["calibration"] == 0

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.config.tie_word_embeddings == (init == "least_squares")
    assert student.num_parameters() == result["student"]["parameters"]
    assert 30_000 <= student.num_parameters() <= 45_000
    origin = json.loads((tmp_path / "run" / "student" / "subnet.json").read_text())
    assert (origin["init"], origin["teacher"]) == (init, str(teacher_folder))
    (again,) = run_recipe(recipe_from_dict(recipe))  # finished, so nothing is trained again
    assert again["arms"] == result["arms"]


def test_extract_from_the_command_line(
    recipe: dict[str, Any],
    teacher_folder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = {"layers": "0-3", "embed": "0-35", "kv_groups": ["0-1"] * 4, "mlp": ["0-39"] * 4}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = ["extract", "--teacher", str(teacher_folder), "--spec", str(tmp_path / "spec.json")]
    text = ["--data", str(corpus), "--block-length", "32", "--calibration-tokens", "512"]
    for init in ("slice", "least_squares", "rotate+least_squares"):
        out = tmp_path / init
        assert (
            main([*command, "--out", str(out), "--init", init, *(text if init != "slice" else [])])
            == 0
        )
        assert json.loads((out / "subnet.json").read_text())["init"] == init
        assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 36
    assert main([*command, "--out", str(tmp_path / "none"), "--init", "slice", *text]) == 2
    assert "--init slice does not; leave it out" in capsys.readouterr().err
    missing = [*command, "--out", str(tmp_path / "none"), "--init", "least_squares"]
    assert main(missing) == 2
    assert "needs text to calibrate with; give --data" in capsys.readouterr().err
