"""Who has a lock keeps others out while it lives, and no longer."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headstart.system.locks import locked

HOLDER = """
import sys, time
from pathlib import Path
from headstart.system.locks import locked

with locked(Path(sys.argv[1]), on_busy=sys.exit):
    print("here", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def refuse(owner: str) -> None:
    raise BlockingIOError(owner)


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lock"
    with holder(file) as process:
        owner = f"process {process.pid} on {platform.node()}"
        with pytest.raises(BlockingIOError, match=owner), locked(file, refuse):
            pass


def test_what_a_killed_owner_had_is_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with holder(file) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(file, refuse):
        command = [sys.executable, "-c", HOLDER, str(file)]
        third = subprocess.run(command, capture_output=True, text=True)
    assert (third.returncode, third.stderr.split()[1]) == (1, str(os.getpid()))


def test_those_who_wait_get_the_lock_that_others_wait_for(tmp_path: Path) -> None:
    """Ten at once, each of which waits: nobody works on a lock file that is gone."""
    file, inside, most, done = tmp_path / "lock", 0, 0, 0

    def work() -> None:
        nonlocal inside, most, done
        with locked(file, on_busy=lambda owner: None):
            inside += 1
            most = max(most, inside)
            inside -= 1
            done += 1

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 10)
    assert file.is_file()


WITHOUT_LOCKS = """
import errno, fcntl, warnings

def flock(*arguments):
    raise OSError(errno.ENOSYS, "this filesystem knows no locks")

fcntl.flock = flock
warnings.simplefilter("ignore")
"""


def test_a_filesystem_without_locks_refuses_the_second_and_takes_over_from_the_dead(
    tmp_path: Path,
) -> None:
    file = tmp_path / "lock"
    command = [sys.executable, "-c", WITHOUT_LOCKS + HOLDER, str(file)]

    def outcome(of: subprocess.Popen[str]) -> str:
        assert of.stdout is not None
        return of.stdout.readline()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert outcome(first) == "here\n"
        second = subprocess.run(command, capture_output=True, text=True)
        assert (second.returncode, second.stderr.split()[:2]) == (1, ["process", str(first.pid)])
        first.kill()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as third:
        assert outcome(third) == "here\n"
        third.kill()
