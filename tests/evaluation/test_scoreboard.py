"""Models side by side, in the terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.conftest import random_teacher

from headstart.cli import main
from headstart.evaluation.scoreboard import EvaluationSettings, scores_cells, scores_table


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


def test_each_score_has_its_row_and_shares_have_their_error() -> None:
    """0.3 of 84 items: a standard error of the root of 0.3 * 0.7 / 84, which is 0.05."""
    tasks = {"piqa": {"acc": 0.3, "items": 84}, "wikitext": {"word_perplexity": 31.5, "items": 62}}
    assert scores_cells({"loss": 2.5, "tasks": tasks}) == {
        "loss": "2.5000",
        "piqa acc": "0.300 ± 0.050",
        "wikitext word_perplexity": "31.500",
    }
    console = Console(record=True, width=100)
    console.print(scores_table({"small": {"loss": 2.5}, "large": {"tasks": tasks}}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["small", "large"] in lines
    assert ["loss", "2.5000", "–"] in lines
    assert ["piqa", "acc", "–", "0.300", "±", "0.050"] in lines


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
