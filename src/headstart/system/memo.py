"""The one memo on disk: what was made before for an equal key is found, not made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from headstart.system.files import cache_root, finished_folder, remove_abandoned, write_json
from headstart.system.hashing import hash_json
from headstart.system.locks import locked
from headstart.system.progress import console

Value = TypeVar("Value")
LOCKS = ".locks"
"""A folder of locks, in the cache."""


def remembered(
    kind: str,
    version: int,
    key: Any,
    make: Callable[[Path], None],
    read: Callable[[Path], Value],
) -> Value:
    """What `make` wrote for an equal key, now or earlier, on this machine.

    Args:
        kind: of thing, a folder of headstart's cache.
        version: of what `make` writes and of how it is computed; raise it when either changes.
        key: all else that the content depends on, as JSON; kept beside it in `key.json`.
        make: fills an empty folder, which is kept if it ends without an error.
        read: turns a filled folder into the value. If what lies there does not read, which raises
            an OSError, ValueError or SafetensorError, it is made anew.

    Processes that want the same at once wait for the one that makes it.
    """
    folder = cache_root() / kind / hash_json([version, key])
    remove_abandoned(folder.parent)

    def found() -> Value | None:
        if not folder.is_dir():
            return None
        try:
            return read(folder)
        except (OSError, ValueError, SafetensorError):
            return None

    if (value := found()) is not None:
        return value

    def wait(owner: str) -> None:
        console.print(f"{owner} makes the same {kind}; waiting for it")

    with locked(cache_root() / LOCKS / f"{kind}-{folder.name}", wait):
        if (value := found()) is not None:  # somebody has made it meanwhile
            return value
        shutil.rmtree(folder, ignore_errors=True)
        with finished_folder(folder) as unfinished:
            make(unfinished)
            write_json(unfinished / "key.json", {"version": version, "key": key})
    return read(folder)
