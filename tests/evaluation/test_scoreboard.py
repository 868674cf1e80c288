"""Models side by side, in the terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import random_teacher

from headstart.cli import main
from headstart.evaluation.scoreboard import EvaluationSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


def test_two_models_on_one_text(
    teacher_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    random_teacher("qwen3-tied").save_pretrained(other)
    for file in teacher_folder.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    command = ["evaluate", str(teacher_folder), str(other), "--data", str(corpus)]
    command += ["--block-length", "32", "--tokens", "256"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(teacher_folder), str(other)]
    losses = [scores["loss"] for scores in found.values()]
    assert losses[0] != losses[1]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for loss in losses:
        assert f"{loss:.4f}" in shown
    assert main([*command, "--whole-text", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole[str(other)]["loss"] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to evaluate on; give --data, --tasks or both"),
        (["--tasks", "piqa", "--limit", "0"], "--limit is 0; use at least 1"),
        (["--tasks", "piqa,piqa"], "--tasks names piqa twice; name it once"),
        (["--tasks", "pika"], "lm-eval has no single task 'pika'"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mistakes_are_found_before_a_model_is_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "/nowhere/model", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_settings_in_python() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        EvaluationSettings()
