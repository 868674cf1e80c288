"""The folder of a run: whose it is, and that one process at a time works in it, or in an arm's."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from headstart.recipe import Recipe, recipe_to_dict
from headstart.system.distributed import entered_by_main
from headstart.system.errors import UserError
from headstart.system.files import UNFINISHED, read_json, remove, write_json, write_whole
from headstart.system.locks import locked as lock
from headstart.system.progress import console
from headstart.system.settings import FREE_KEYS, differences, with_defaults

LOCK = ".lock"


def check_run_folder(recipe: Recipe) -> None:
    """Find out whether the run folder is free, or holds this very run.

    Raises:
        UserError: the folder holds another run, or something that is no run.
    """
    folder = Path(recipe.output)
    kept = folder / "recipe.yaml"
    if kept.is_file():
        # A key that a later version added stood at its default when the run was begun.
        try:
            begun = yaml.safe_load(kept.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            begun = None
        if not isinstance(begun, dict):
            raise UserError(f"{kept} is no recipe; choose another --output or delete the folder")
        theirs = with_defaults(begun, Recipe)
        ours = recipe_to_dict(recipe)
        ours |= {key: theirs.get(key) for key in FREE_KEYS}
        for key, (here, there) in differences(ours, theirs).items():
            raise UserError(
                f"{folder} holds a run of another recipe ({key} is {there!r} there and {here!r} "
                "here); choose another --output or delete the folder"
            )
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    elif folder.exists():
        # Each bin's own folder is checked by itself; one may have been begun alone.
        known = {LOCK, *(of_bin.label() for of_bin in recipe.search.bins)}
        names = {path.name for path in folder.iterdir()} - known
        if not all(name.startswith(UNFINISHED) for name in names):
            raise UserError(
                f"{folder} is not empty and holds no headstart run; choose another --output"
            )


def pin_recipe(recipe: Recipe) -> Path:
    """Create the run folder and write its recipe, once `check_run_folder` has let it pass."""
    folder = Path(recipe.output)
    if not (folder / "recipe.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)
        write_whole(folder / "recipe.yaml", text)
    return folder


REVISIONS = "revisions"
"""The entry of inputs.json that keeps commits. A run goes on with them: they are not compared."""


def kept_revisions(folder: Path) -> dict[str, str]:
    """The commits that a run was begun with, by the names in its recipe; empty before that."""
    return dict((read_json(folder / "inputs.json") or {}).get(REVISIONS, {}))


def pin_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Write what a run reads, or hold it against what it was begun with.

    Args:
        folder: of the run.
        inputs: hashes by the names of what they are of, and `REVISIONS`.

    Raises:
        UserError: something has changed since the run was begun.
    """
    kept = folder / "inputs.json"
    before = read_json(kept)
    for name in inputs.keys() - {REVISIONS} if before else ():
        if name not in before:
            raise UserError(
                f"{folder} was begun by an earlier version of headstart, which had another "
                f"{name}; choose another --output"
            )
        if inputs[name] != before[name]:
            raise UserError(
                f"the {name} has changed since {folder} was begun; restore it or choose "
                "another --output"
            )
    write_json(kept, {**(before or {}), **inputs})


CORRECTED = "corrected teacher"
"""The entry of inputs.json that keeps the hash of the teacher after its correction, once that is
done."""


def pin_corrected(folders: Sequence[Path], teacher_hash: str) -> None:
    """Write which corrected teacher a run reads, or hold it against the one it was begun with.

    Args:
        folders: of the run, and of each of its bins.
        teacher_hash: of the corrected teacher.

    Raises:
        UserError: it is another one: the cache was removed, and training gave other weights.
    """
    for folder in folders:
        before = read_json(folder / "inputs.json") or {}
        if before.get(CORRECTED, teacher_hash) != teacher_hash:
            raise UserError(
                f"the {CORRECTED} has changed since {folder} was begun; restore it to the cache or "
                "choose another --output"
            )
        write_json(folder / "inputs.json", {**before, CORRECTED: teacher_hash})


@contextmanager
def locked(folder: Path, waits: bool = False) -> Iterator[None]:
    """Keep other processes out of a run's or an arm's folder while the body runs.

    Folders below it that have a lock of their own stay open to others.

    Args:
        folder: made if it is not there, and removed if nothing comes of it.
        waits: for another process, instead of refusing.

    Raises:
        UserError: another process works in it, or it cannot be made.
    """

    def busy(owner: str) -> None:
        if not waits:
            raise UserError(f"{owner} works in {folder}; wait for it or choose another --output")
        console.print(f"{owner} works in {folder}; waiting for it")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); choose another --output"
        ) from error
    with lock(folder / LOCK, on_busy=busy):
        _remove_unfinished(folder)
        try:
            yield
        finally:
            if {path.name for path in folder.iterdir()} <= {LOCK}:  # nothing came of it
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # another process has begun there
                    folder.rmdir()


@contextmanager
def locked_by_main(folder: Path, waits: bool = False) -> Iterator[None]:
    """`locked` for processes that torchrun has started: all go in together."""
    with entered_by_main(lambda: locked(folder, waits)):
        yield


def _remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed has left."""
    for path in list(folder.iterdir()):
        if path.name.startswith(UNFINISHED):
            remove(path)
        elif path.is_dir() and not path.is_symlink() and not (path / LOCK).exists():
            _remove_unfinished(path)
