"""The one memo on disk: what was made before for an equal key is found, not made again.

What was found out of a large file is kept while the file is the same by all that the filesystem
says, so that a model's weights are not read to their end by every process that begins.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from headstart.system.distributed import barrier, from_main, is_main
from headstart.system.files import cache_root, finished_folder, remove_abandoned, write_json
from headstart.system.hashing import hash_json
from headstart.system.locks import locked
from headstart.system.progress import console

Value = TypeVar("Value")
LOCKS = ".locks"
"""A folder of locks, in the cache."""
SETTLED_SECONDS = 2.0
"""Of a file that was changed more lately than that, another change might not be seen."""


def remembered_of_files(
    kind: str, version: int, files: Sequence[Path], make: Callable[[], Value]
) -> Value:
    """What `make` finds out of the names and contents of files, now or earlier, on this machine.

    Args:
        kind: of what is found.
        version: of how it is found out.
        files: that are read; they count as the same while their places, sizes and times are.
        make: returns what JSON can write; an error is not remembered.
    """
    identities, newest = list[list[Any]](), 0
    for file in files:
        status = file.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        place = [file.name, str(file.resolve()), status.st_ino]
        identities.append([*place, status.st_size, *times])
        newest = max(newest, *times)
    record = cache_root() / "files" / hash_json([kind, version, identities])
    with suppress(OSError, ValueError, KeyError):
        found: Value = json.loads(record.read_text())["found"]
        return found
    is_settled = time.time() - newest / 1e9 > SETTLED_SECONDS
    value = make()
    if is_settled:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"files": list(map(str, files)), "found": value})
    return value


def remembered(
    kind: str,
    version: int,
    key: Any,
    make: Callable[[Path], None],
    read: Callable[[Path], Value],
    together: bool = False,
) -> Value:
    """What `make` wrote for an equal key, now or earlier, on this machine.

    Args:
        kind: of thing, a folder of headstart's cache.
        version: of what `make` writes and of how it is computed; raise it when either changes.
        key: all else that the content depends on, as JSON; kept beside it in `key.json`.
        make: fills an empty folder, which is kept if it ends without an error.
        read: turns a filled folder into the value. If what lies there does not read, which raises
            an OSError, ValueError or SafetensorError, it is made anew.
        together: all processes under torchrun call it at once. The main one finds out whether it is
            there; all call `make`, which writes on that one alone.

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

    def wait(owner: str) -> None:
        console.print(f"{owner} makes the same {kind}; waiting for it")

    def begun(stack: ExitStack) -> Path | None:
        """A folder to fill, which takes its place when the stack is left and is locked until then;
        None if all is there."""
        if found() is not None:
            return None
        stack.enter_context(locked(cache_root() / LOCKS / f"{kind}-{folder.name}", wait))
        if found() is not None:  # somebody has made it meanwhile
            return None
        shutil.rmtree(folder, ignore_errors=True)
        return stack.enter_context(finished_folder(folder))

    if not together and (value := found()) is not None:
        return value
    with ExitStack() as stack:
        unfinished = from_main(lambda: begun(stack)) if together else begun(stack)
        if unfinished is not None:
            make(unfinished)
            if is_main() or not together:
                write_json(unfinished / "key.json", {"version": version, "key": key})
    if together:
        barrier()
    return read(folder)
