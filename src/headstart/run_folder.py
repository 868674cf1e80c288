"""The folder of a run, which belongs to one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from headstart.files import write_whole
from headstart.recipe import Recipe, recipe_to_dict


def check_run_folder(recipe: Recipe) -> None:
    """Find out whether the run folder is free, or holds this very run.

    Raises:
        ValueError: the folder holds another run, or something that is no run.
    """
    folder = Path(recipe.output)
    kept = folder / "recipe.yaml"
    if kept.is_file():
        theirs = yaml.safe_load(kept.read_text())
        ours = recipe_to_dict(recipe) | {"output": theirs.get("output")}  # a folder may be moved
        for key, (here, there) in _differences(ours, theirs).items():
            raise ValueError(
                f"{folder} holds a run of another recipe ({key} is {there!r} there and {here!r} "
                "here); choose another --output or delete the folder"
            )
    elif folder.exists() and {path.name for path in folder.iterdir()} - {"recipe.yaml.unfinished"}:
        raise ValueError(
            f"{folder} is not empty and holds no headstart run; choose another --output"
        )


def open_run(recipe: Recipe) -> Path:
    """Create the run folder and pin its recipe, once `check_run_folder` has let it pass."""
    folder = Path(recipe.output)
    if not (folder / "recipe.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)
        write_whole(folder / "recipe.yaml", text)
    return folder


def _differences(ours: Any, theirs: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**ours, **theirs}:
            inner = f"{key}.{name}" if key else name
            found |= _differences(ours.get(name), theirs.get(name), inner)
        return found
    return {} if ours == theirs else {key: (ours, theirs)}
