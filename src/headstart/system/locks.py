"""One process at a time: a lock that is gone with its process, however that ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(file: Path, on_busy: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes out while the body runs, here and wherever the disk is mounted.

    Where a filesystem knows no locks, filelock marks the file instead, and takes over what a dead
    process of this host has left.

    Args:
        file: the lock, which stays there, since others may wait for it. It names its owner.
        on_busy: called with the owner, such as "process 17 on node-3", if another has it; if that
            returns, the lock is waited for.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_busy(_owner(file))
        while not lock.is_locked:
            try:
                lock.acquire()
            except FileNotFoundError:  # its owner has removed the folder
                file.parent.mkdir(parents=True, exist_ok=True)
    try:
        _name_owner(file)
        yield
    finally:
        lock.release()


def _owner(file: Path) -> str:
    """Who has a lock, as far as its file says."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = file.read_text()
        if not text.startswith("{"):  # filelock's mark: process and host, a line each
            pid, host = text.splitlines()[:2]
            return f"process {int(pid)} on {host}"
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    return "another process"


def _name_owner(file: Path) -> None:
    """Write this process into a lock that it has, unless filelock has marked it already."""
    with suppress(OSError):
        if file.read_text()[:1] in ("", "{"):
            file.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}) + "\n")
