"""What headstart knows by name, read from the tables that decide it."""

from __future__ import annotations

import typing
from pathlib import Path

from headstart.calibration.start import Init
from headstart.evaluation.tasks import task_recipes
from headstart.model.families import FAMILIES
from headstart.searching.settings import SearchSettings
from headstart.searching.space import SpaceName
from headstart.system.files import shipped

NO_RECIPES = ("tasks", "cluster")
"""Folders of `recipes/` whose files are something else."""


def catalogue() -> dict[str, dict[str, str]]:
    """For each kind of thing its names, and for each name a note, which may be empty."""
    defaults = SearchSettings()
    return {
        "families": dict.fromkeys(FAMILIES, ""),
        "recipes": {str(path): _first_sentence(path) for path in recipe_files()},
        "tasks": {name: f"questions in {task['files']}" for name, task in task_recipes().items()},
        "starts": {
            name: "default" if name == defaults.init else "" for name in typing.get_args(Init)
        },
        "spaces": {
            name: "default" if name == defaults.space else "" for name in typing.get_args(SpaceName)
        },
    }


def recipe_files() -> list[Path]:
    """The recipes that are shipped; as a path from here, where they lie below."""
    root = shipped("demo.yaml").parent
    found = sorted(root.rglob("*.yaml"))
    paths = [path for path in found if path.relative_to(root).parts[0] not in NO_RECIPES]
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in paths]


def _first_sentence(recipe: Path) -> str:
    """What the comment at the top of a recipe says first."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    sentence, stop, _ = " ".join(comment).partition(". ")
    return sentence + stop.strip() if stop else sentence
