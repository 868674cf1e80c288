"""The one memo on disk: what was made before for an equal key is found, not made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from headstart.system.files import cache_root, finished_folder, write_json
from headstart.system.hashing import hash_json

Value = TypeVar("Value")


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
            an OSError or ValueError, it is made anew.
    """
    folder = cache_root() / kind / hash_json([version, key])
    if folder.is_dir():
        try:
            return read(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
    with finished_folder(folder) as unfinished:
        make(unfinished)
        write_json(unfinished / "key.json", {"version": version, "key": key})
    return read(folder)
