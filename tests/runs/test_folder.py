"""A run folder is one recipe's and one process', and nothing that lies there is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from headstart.recipe import Recipe, recipe_from_dict
from headstart.runs.folder import check_run_folder, locked, pin_inputs, pin_recipe
from headstart.system.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher": "t",
        "output": str(tmp_path / "run"),
        "data": {"source": "s"},
        "search": {"bin": {"low": "1M", "high": "2M"}, "tokens": 256},
    }


def test_a_run_folder_is_for_one_recipe(tree: dict[str, Any], tmp_path: Path) -> None:
    ours = recipe_from_dict(tree)
    check_run_folder(ours)
    pin_recipe(ours)
    check_run_folder(ours)
    tree["search"]["tokens"] = 300
    with pytest.raises(UserError, match=r"another recipe \(search.tokens is 256 there and 300"):
        check_run_folder(recipe_from_dict(tree))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        check_run_folder(recipe_from_dict({**tree, "output": str(tmp_path / "full")}))


def without(tree: Any, key: str) -> Any:
    """A tree as a version wrote it that did not know some key, wherever it stands."""
    if isinstance(tree, dict):
        return {name: without(inner, key) for name, inner in tree.items() if name != key}
    return [without(inner, key) for inner in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("key", ["strict", "racing", "top_k", "baselines", "unit_noise"])
def test_a_key_that_came_later_makes_no_other_recipe(tree: dict[str, Any], key: str) -> None:
    """At its default, at the top of a section, inside it, or in an arm."""
    recipe = recipe_from_dict(tree)
    kept = pin_recipe(recipe) / "recipe.yaml"
    before = yaml.safe_load(kept.read_text())
    kept.write_text(yaml.safe_dump(without(before, key)))
    assert yaml.safe_load(kept.read_text()) != before
    check_run_folder(recipe)


def test_a_key_that_came_later_counts_where_it_is_set(tree: dict[str, Any]) -> None:
    kept = pin_recipe(recipe_from_dict(tree)) / "recipe.yaml"
    kept.write_text(yaml.safe_dump(without(yaml.safe_load(kept.read_text()), "unit_noise")))
    tree["search"]["unit_noise"] = 0.25
    with pytest.raises(UserError, match=r"search.unit_noise is 0.5 there and 0.25 here"):
        check_run_folder(recipe_from_dict(tree))


def test_a_key_of_a_later_version_is_named(tree: dict[str, Any]) -> None:
    recipe = recipe_from_dict(tree)
    kept = pin_recipe(recipe) / "recipe.yaml"
    later = yaml.safe_load(kept.read_text())
    later["search"]["speed"] = "fast"
    kept.write_text(yaml.safe_dump(later))
    with pytest.raises(UserError, match=r"search.speed is 'fast' there and None here"):
        check_run_folder(recipe)


def test_changed_inputs_are_refused(tmp_path: Path) -> None:
    pin_inputs(tmp_path, {"data": "1", "teacher": "2"})
    pin_inputs(tmp_path, {"data": "1", "teacher": "2"})
    with pytest.raises(UserError, match="the teacher has changed since"):
        pin_inputs(tmp_path, {"data": "1", "teacher": "4"})


def test_a_run_that_an_earlier_version_began_is_refused(tmp_path: Path) -> None:
    pin_inputs(tmp_path, {"data": "1"})
    with pytest.raises(UserError, match=r"begun by an earlier version .* another choice of blocks"):
        pin_inputs(tmp_path, {"data": "1", "choice of blocks": "spread"})


def test_a_folder_is_for_one_process_at_a_time(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe: Recipe = recipe_from_dict(tree)
    folder = tmp_path / "run"
    with locked(folder):
        check_run_folder(recipe)  # the lock is nobody's work
        with (
            pytest.raises(UserError, match=rf"process {os.getpid()} on .* works in"),
            locked(folder),
        ):
            pass
    assert not folder.exists()  # nothing came of it
    with locked(folder):
        pin_recipe(recipe)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", ".lock"}


def test_what_a_killed_process_left_unfinished_goes(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = pin_recipe(recipe_from_dict(tree))
    (folder / ".unfinished-student-x1" / "student").mkdir(parents=True)
    (folder / ".unfinished-search.json-x2").write_text("{")
    with locked(folder):
        assert {path.name for path in folder.iterdir()} == {"recipe.yaml", ".lock"}
