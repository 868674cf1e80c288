"""What was made before is found, and never half of it."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.system import memo
from headstart.system.memo import remembered, remembered_of_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path))
    return tmp_path


class Maker:
    """Writes a number, another one each time, into a folder that has to be empty."""

    def __init__(self):
        self.times = 0

    def __call__(self, folder):
        assert not any(folder.iterdir())
        self.times += 1
        (folder / "number").write_text(str(self.times))


def number_in(folder):
    return int((folder / "number").read_text())


def test_what_was_made_is_found_again():
    make = Maker()
    found = [remembered("things", 1, {"a": 1, "b": [2]}, make, number_in) for _ in range(3)]
    assert found == [1, 1, 1]
    assert remembered("things", 1, {"b": [2], "a": 1}, make, number_in) == 1
    assert make.times == 1


def test_another_kind_version_or_key_is_another_folder(cache):
    first = remembered("things", 1, {"a": 1}, Maker(), lambda folder: folder)
    others = [("others", 1, {"a": 1}), ("things", 2, {"a": 1}), ("things", 1, {"a": 2})]
    folders = [remembered(*other, Maker(), lambda folder: folder) for other in others]
    assert len({first, *folders}) == 4
    assert [folder.parent for folder in (first, *folders)] == [
        cache / kind for kind in ("things", "others", "things", "things")
    ]


def test_the_key_lies_beside_what_was_made():
    key = {"teacher": "abc", "blocks": [1, 2]}
    folder = remembered("things", 3, key, Maker(), lambda folder: folder)
    assert json.loads((folder / "key.json").read_text()) == {"version": 3, "key": key}
    assert {file.name for file in folder.iterdir()} == {"key.json", "number"}


@pytest.mark.parametrize("broken", ["missing", "garbled"])
def test_a_broken_folder_is_made_anew(broken):
    make = Maker()
    folder = remembered("things", 1, "a", make, lambda folder: folder)
    if broken == "missing":
        (folder / "number").unlink()
    else:
        (folder / "number").write_text("one")
    assert remembered("things", 1, "a", make, number_in) == 2
    assert remembered("things", 1, "a", make, number_in) == make.times == 2


def test_a_bug_in_reading_is_not_taken_for_a_broken_folder():
    make = Maker()
    remembered("things", 1, "a", make, number_in)
    with pytest.raises(KeyError):
        remembered("things", 1, "a", make, lambda folder: {}["number"])
    assert remembered("things", 1, "a", make, number_in) == make.times == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_nothing(error, cache):
    def fail(folder):
        (folder / "number").write_text("half")
        raise error

    with pytest.raises(error):
        remembered("things", 1, {}, fail, number_in)
    assert not any((cache / "things").iterdir())
    assert remembered("things", 1, {}, Maker(), number_in) == 1


def test_damaged_tensors_are_made_anew(cache):
    def make(folder):
        save_file({"numbers": torch.arange(3)}, folder / "numbers.safetensors")

    def read(folder):
        return load_file(folder / "numbers.safetensors")["numbers"].tolist()

    assert remembered("things", 1, "a", make, read) == [0, 1, 2]
    (file,) = cache.glob("things/*/numbers.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    assert remembered("things", 1, "a", make, read) == [0, 1, 2]


def test_what_was_left_beside_a_memory_goes_when_it_is_found(cache):
    """Killed between putting the folder in its place and removing the one it was written in."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    remembered("things", 1, "a", Maker(), number_in)
    (cache / "things" / f".unfinished-{dead.pid}@{platform.node()}@a-x").mkdir()
    remembered("things", 1, "a", Maker(), number_in)
    assert not list(cache.rglob(".unfinished-*"))


MAKER = """
import sys, time
from pathlib import Path
from headstart.system import memo
from headstart.system.memo import remembered, remembered_of_files

def make(folder):
    with open(sys.argv[1], "a") as stream:
        stream.write("made\\n")
    time.sleep(0.5)
    (folder / "number").write_text("7")

print(remembered("things", 1, "a", make, lambda folder: (folder / "number").read_text()))
"""


def test_two_that_want_the_same_at_once_make_it_once(cache, tmp_path):
    command = [sys.executable, "-c", MAKER, str(tmp_path / "log")]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [maker.communicate()[0] for maker in makers] == ["7\n"] * 2
    assert (tmp_path / "log").read_text() == "made\n"


def aged(file, seconds=60):
    """A file that nobody has touched for a while, as far as the memo can see."""
    past = time.time() - seconds
    os.utime(file, (past, past))


def test_a_file_is_read_once_while_it_is_the_same(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    monkeypatch.setattr(memo, "SETTLED_SECONDS", -1)  # times of the inode cannot be set back
    reads = []

    def read():
        reads.append(file.read_bytes())
        return reads[-1].decode()

    assert [remembered_of_files("text", 1, [file], read) for _ in range(3)] == ["first"] * 3
    assert reads == [b"first"]
    assert remembered_of_files("text", 2, [file], read) == "first" and len(reads) == 2
    assert remembered_of_files("other", 1, [file], read) == "first" and len(reads) == 3
    file.write_bytes(b"other")  # as long
    assert remembered_of_files("text", 1, [file], read) == "other"
    aged(file)
    assert remembered_of_files("text", 1, [file], read) == "other" and len(reads) == 5
    file = file.rename(tmp_path / "moved")
    assert remembered_of_files("text", 1, [file], read) == "other" and len(reads) == 6
    link = tmp_path / "link"
    link.symlink_to(file)
    assert remembered_of_files("text", 1, [link], read) == "other" and len(reads) == 7


def test_what_was_just_written_is_read_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    reads = []
    for _ in range(2):
        remembered_of_files("text", 1, [file], lambda: reads.append(1))
    assert len(reads) == 2


def test_a_fault_of_a_file_is_found_again(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    monkeypatch.setattr(memo, "SETTLED_SECONDS", -1)

    def fail():
        raise ValueError("not finite")

    for _ in range(2):
        with pytest.raises(ValueError, match="not finite"):
            remembered_of_files("finite", 1, [file], fail)
