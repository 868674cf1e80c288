"""A file is there whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headstart.system.files import finished_folder, shipped, write_json, write_whole


def test_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    write_json(path, {"loss": 7.5, "name": "é"})
    assert json.loads(path.read_text()) == {"loss": 7.5, "name": "é"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_can_be_read_by_whom_the_umask_says(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with finished_folder(tmp_path / "model") as folder:
            (folder / "deeper").mkdir()
            save_file({"x": torch.zeros(2)}, folder / "deeper" / "model.safetensors")
    finally:
        os.umask(before)
    written = tmp_path / "model" / "deeper" / "model.safetensors"
    assert written.stat().st_mode & 0o777 == mode


def test_a_kill_before_the_rename_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


WRITER = """
import sys
from pathlib import Path

from headstart.system.files import write_whole

for number in range(500):
    write_whole(Path(sys.argv[1]), f"{number} {sys.argv[2]}" * 100)
"""


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in "ab"
    ]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    assert path.read_text() in {f"499 {name}" * 100 for name in "ab"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "whole", "")
    modes = {name: (tmp_path / name).stat().st_mode for name in ("plain", "whole")}
    assert modes["plain"] == modes["whole"]


def test_a_folder_appears_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "student"
    with pytest.raises(ZeroDivisionError), finished_folder(target) as folder:
        (folder / "weights").write_text("half")
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    with finished_folder(target) as folder:
        (folder / "weights").write_text("whole")
        assert not target.exists()
    assert (target / "weights").read_text() == "whole"


def test_of_two_folders_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "student"
    with finished_folder(target) as late:
        (late / "weights").write_text("late")
        with finished_folder(target) as early:
            (early / "weights").write_text("early")
    assert (target / "weights").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_shipped_recipes_are_found() -> None:
    assert shipped("demo.yaml").is_file()
    assert list(shipped("tasks").glob("*.yaml"))


def test_what_a_dead_process_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = platform.node()
    names = {
        f".unfinished-{dead.pid}@{host}@student-x": False,
        f".unfinished-{os.getpid()}@{host}@student-x": True,  # whose writer lives
        f".unfinished-{dead.pid}@another-host@student-x": True,  # whose writer may live
        ".unfinished-of-an-earlier-version": True,
        "student": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    (tmp_path / f".unfinished-{dead.pid}@{host}@a file").write_text("half")
    with finished_folder(tmp_path / "another"):
        pass
    left = {path.name for path in tmp_path.iterdir()} - {"another"}
    assert left == {name for name, stays in names.items() if stays}
