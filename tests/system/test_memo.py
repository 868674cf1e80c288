"""What was made before is found, and never half of it."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.system.memo import remembered


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
from headstart.system.memo import remembered

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
