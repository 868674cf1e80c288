"""Names are looked up once; tests/runs/test_hub.py shows the same with whole commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.recipe import Recipe, recipe_from_dict
from headstart.runs import revisions
from headstart.runs.revisions import at_commits, find_revisions
from headstart.system.errors import UserError
from headstart.system.hub import HubName

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were looked up, all at the first commit; text is not read."""
    names: list[str] = []

    def commit(name: HubName) -> str:
        names.append(str(name))
        return FIRST

    monkeypatch.setattr(revisions, "check_source", lambda settings: None)
    monkeypatch.setattr(revisions, "model_commit", commit)
    monkeypatch.setattr(revisions, "dataset_commit", commit)
    return names


def recipe(tmp_path: Path, **entries: Any) -> Recipe:
    asked = {
        "teacher": "org/teacher",
        "output": str(tmp_path / "run"),
        "data": {"source": "org/data:20231101.en"},
        "search": {"bin": {"around": "org/small@v1"}},
        "pretrain": {"baselines": ["org/teacher@v1"]},
    }
    return recipe_from_dict(asked | entries)


def test_a_new_run_looks_up_every_name_once(looked_up: list[str], tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    found = find_revisions(asked)
    names = ["org/data:20231101.en", "org/small@v1", "org/teacher", "org/teacher@v1"]
    assert sorted(looked_up) == sorted(found) == names
    pinned = at_commits(asked, found)
    assert pinned.teacher == f"org/teacher@{FIRST}"
    assert pinned.data.source == f"org/data:20231101.en@{FIRST}"
    assert pinned.search.bin.around == f"org/small@{FIRST}"
    assert pinned.pretrain.baselines == (f"org/teacher@{FIRST}",)


def test_teachers_of_arms_are_looked_up_and_pinned(looked_up: list[str], tmp_path: Path) -> None:
    arms = [{"name": "a", "kd": {"teacher": "org/large"}}, {"name": "b", "kd": {}}, {"name": "c"}]
    asked = recipe(tmp_path, pretrain={"arms": arms})
    found = find_revisions(asked)
    assert found["org/large"] == FIRST and looked_up.count("org/large") == 1
    pinned = at_commits(asked, found).pretrain
    assert pinned.teachers == (f"org/large@{FIRST}",)
    assert [arm.kd and arm.kd.teacher for arm in pinned.arms] == [f"org/large@{FIRST}", "", None]


def test_a_begun_run_looks_up_nothing(looked_up: list[str], tmp_path: Path) -> None:
    names = ("org/data:20231101.en", "org/small@v1", "org/teacher", "org/teacher@v1")
    kept = dict.fromkeys(names, SECOND)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inputs.json").write_text(json.dumps({"revisions": kept}))
    assert find_revisions(recipe(tmp_path)) == kept
    assert looked_up == []


def test_what_is_on_this_machine_is_not_looked_up(
    looked_up: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("org/teacher", "org/teacher@v1", "org/data:20231101.en"):
        Path(folder).mkdir(parents=True)
    asked = recipe(tmp_path, search={"bin": {"around": "410M"}})
    assert find_revisions(asked) == {} and looked_up == []
    assert at_commits(asked, {}) == asked


def test_a_model_and_a_dataset_of_one_name_are_refused(
    looked_up: list[str], tmp_path: Path
) -> None:
    asked = recipe(tmp_path, data={"source": "org/teacher"})
    with pytest.raises(UserError, match=r"org/teacher names a model and a dataset .*@main"):
        find_revisions(asked)
