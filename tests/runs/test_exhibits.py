"""What a run shows of its models beside losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.cli import main
from headstart.evaluation import continuation
from headstart.evaluation.continuation import GenerationSettings, run_generate
from headstart.recipe import recipe_from_dict
from headstart.runs import exhibits
from headstart.runs.stages import run_recipe
from headstart.system.errors import UserError


def models_of(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["kind"], entry["name"]) for entry in entries]


@pytest.mark.exhaustive
def test_every_model_continues_the_same_beginnings(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same command with other prompts trains nothing and shows them."""
    recipe["search"] |= {"init": "slice", "evolution": {"population": 4, "generations": 1}}
    recipe["pretrain"] |= {"tokens": 256, "evaluations": 1}
    recipe["report"] = {"num_prompts": 2, "prompt_tokens": 8, "new_tokens": 6}
    asked = []

    def scored(model: Any, tasks: Any, data: Any, limit: Any) -> dict[str, Any]:
        asked.append((model.folder, tasks, data, limit))
        return {"piqa": {"acc": 0.5, "items": 4}}

    monkeypatch.setattr(exhibits, "zero_shot", scored)
    (result,) = run_recipe(recipe_from_dict(recipe))
    folder = Path(recipe["output"])
    shown = [("teacher", "teacher"), ("student", "student"), ("arm", "scratch"), ("arm", "subnet")]
    shown.append(("arm", "subnet+kd"))
    assert len(result["continuations"]) == 2
    for entry in result["continuations"]:
        assert entry["prompt"] and models_of(entry["models"]) == shown
    assert result["zero_shot"] == [] and asked == []
    page = (folder / "report.html").read_text()
    assert "What the models write" in page and "Zero-shot tasks" not in page

    # Nothing is asked of a model twice.
    monkeypatch.setattr(continuation, "load_frozen", None)
    (again,) = run_recipe(recipe_from_dict(recipe))
    assert again["continuations"] == result["continuations"]
    monkeypatch.undo()

    monkeypatch.setenv("HEADSTART_CACHE", str(folder.parent / "cache"))
    monkeypatch.setattr(exhibits, "zero_shot", scored)
    monkeypatch.setattr(exhibits, "task_sources", lambda tasks, data: None)
    tasks = {"tasks": ["piqa"], "task_data": "questions", "task_limit": 4}
    recipe["report"] = {"prompts": ["abe cad"], "new_tokens": 5, **tasks}
    trained = (folder / "arms" / "subnet" / "arm.json").stat().st_mtime_ns
    (result,) = run_recipe(recipe_from_dict(recipe))
    assert (folder / "arms" / "subnet" / "arm.json").stat().st_mtime_ns == trained
    (entry,) = result["continuations"]
    assert models_of(entry["models"]) == shown
    folders = [Path(recipe["teacher"]), folder / "student"]
    folders += [folder / "arms" / name / "model" for kind, name in shown if kind == "arm"]
    for model, place in zip(entry["models"], folders, strict=True):
        (found,) = run_generate(str(place), ["abe cad"], GenerationSettings(5))
        assert model["text"] == found["text"]
    assert asked == [(place, ("piqa",), Path("questions"), 4) for place in folders]
    assert models_of(result["zero_shot"]) == shown
    assert result["zero_shot"][0]["tasks"] == {"piqa": {"acc": 0.5, "items": 4}}
    page = (folder / "report.html").read_text()
    assert "Zero-shot tasks" in page and "0.500 ± 0.250" in page
    assert json.loads((folder / "result.json").read_text())["zero_shot"] == result["zero_shot"]

    recipe["report"] = {"num_prompts": 0}
    (result,) = run_recipe(recipe_from_dict(recipe))
    assert result["continuations"] == []
    assert "What the models write" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"new_tokens": 0}, "report.new_tokens is 0; use at least 1"),
        ({"prompts": [""]}, "the prompt '' is empty"),
        ({"tasks": ["piqa"], "task_data": "nowhere"}, "nowhere has no .arrow"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    report: dict[str, Any], sentence: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        run_recipe(recipe_from_dict(recipe | {"report": report}))
    assert not (tmp_path / "cache" / "data").exists() and not (tmp_path / "run").exists()


def test_a_run_may_not_change_otherwise(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"report": {"num_prompts": 7}}))
    command = ["run", str(folder / "recipe.yaml"), "--report.num_prompts", "1"]
    assert main([*command, "--data.seed", "5"]) == 2
    assert "another recipe (data.seed is 0 there and 5 here)" in capsys.readouterr().err
