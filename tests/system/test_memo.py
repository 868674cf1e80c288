"""What was made before is found, and never half of it."""

import json

import pytest

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
