"""Where files lie, and how they are written: whole or not at all, however many write at once."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from headstart.system.errors import UserError

UNFINISHED = ".unfinished-"
"""What the names of files and folders begin with that are not whole yet."""
OWNED = re.compile(rf"{re.escape(UNFINISHED)}(\d+)@([^@]*)@.*", re.DOTALL)
"""Such a name, with process and host of its writer."""


def cache_root() -> Path:
    """The folder under which everything headstart can make again is kept.

    Returns:
        The value of the environment variable HEADSTART_CACHE, else the platform's cache folder.
    """
    override = os.environ.get("HEADSTART_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("headstart")


def shipped(name: str) -> Path:
    """A file or folder of `recipes/`, in an installed package or in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "recipes" / name
    return installed if installed.exists() else package.parents[1] / "recipes" / name


def scratch_prefix(name: str) -> str:
    """What the name of something that this process writes begins with until it is whole."""
    return f"{UNFINISHED}{os.getpid()}@{platform.node()}@{name}-"


def is_abandoned(name: str) -> bool:
    """Whether something unfinished was left by a process of this host that is no more."""
    found = OWNED.fullmatch(name)
    if found is None or found[2] != platform.node():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return False


def remove_abandoned(folder: Path) -> None:
    """Delete what killed processes have left unfinished in a folder."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if is_abandoned(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if nobody else has."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Each writer has a temporary file of its own, so that of several at once the last one stays.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=scratch_prefix(path.name))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(scratch).chmod(0o666 & ~_umask())  # mkstemp's are for their owner alone
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote, or None where there is no file.

    Raises:
        UserError: it is no JSON, so something else has written to it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or delete its folder") from error


def refuse_taken(path: Path) -> None:
    """Raise a UserError if a path that shall be written exists, or lies below a file."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another --out or remove it")
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise UserError(f"{path} lies below {folder}, a file; choose another --out")
            return


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` only if the block ends without an error.

    Args:
        target: Must not exist yet. If another writer finishes it first, that one is kept.

    Returns:
        A context manager of the folder to write into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    prefix = scratch_prefix(target.name)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        apply_umask(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def apply_umask(folder: Path) -> None:
    """Let others read a folder's files as the umask says; safetensors' are the owner's alone."""
    readable = 0o444 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | readable)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
