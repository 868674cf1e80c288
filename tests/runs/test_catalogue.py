"""What `headstart list` shows, against the tables that decide it."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from headstart.calibration.start import Init
from headstart.cli import KINDS, main
from headstart.evaluation.tasks import task_recipes
from headstart.model.families import FAMILIES
from headstart.recipe import load_recipe
from headstart.runs.catalogue import catalogue
from headstart.searching.space import SpaceName


def test_every_kind_has_what_the_code_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = catalogue()
    assert tuple(found) == KINDS
    assert list(found["families"]) == list(FAMILIES)
    assert list(found["tasks"]) == list(task_recipes())
    assert tuple(found["starts"]) == typing.get_args(Init)
    assert tuple(found["spaces"]) == typing.get_args(SpaceName)
    for kind in ("starts", "spaces"):
        assert list(found[kind].values()).count("default") == 1
    recipes = [load_recipe(Path(name)) for name in found["recipes"]]  # absolute, from elsewhere
    assert "demo" in [recipe.teacher for recipe in recipes]
    assert all(note and "\n" not in note for note in found["recipes"].values())


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(KINDS)
    assert main(["list", "recipes"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"recipes/demo.yaml", "recipes/paper/pythia-6.9b.yaml"} <= set(names)
    assert not any("recipes/tasks" in name or "recipes/cluster" in name for name in names)
