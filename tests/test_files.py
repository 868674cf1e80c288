"""A file is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart.files import write_json, write_whole


def test_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    write_json(path, {"loss": 7.5, "name": "é"})
    assert json.loads(path.read_text()) == {"loss": 7.5, "name": "é"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


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
