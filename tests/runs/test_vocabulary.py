"""A run whose teacher has lost part of its vocabulary knows no other teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.text.documents import save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.cli import main
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import recipe_from_dict
from headstart.runs.ahead import run_cache_teacher
from headstart.runs.plan import print_search_plans
from headstart.runs.stages import run_recipe
from headstart.runs.trimming import vocabulary_sizes
from headstart.runs.vocabulary import (
    needed_rows,
    planned_architecture,
    token_counts,
    trimmed_teacher,
)
from headstart.system.errors import UserError
from headstart.text import sample
from headstart.text.corpus import find_corpus
from headstart.text.sample import sampled_texts
from headstart.text.settings import DataSettings, VocabularySettings
from headstart.text.tokenise import split_of

ROWS = 96


@pytest.fixture
def recipe(teacher_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return {
        "teacher": str(teacher_folder),
        "output": str(tmp_path / "run"),
        "data": {"source": str(corpus), "block_length": 32},
        "vocabulary": {"size": ROWS},
        "search": {
            "bin": {"low": 30_000, "high": 43_000},
            "grid": {"embed_step": 12, "mlp_step": 16},
            "tokens": 256,
            "calibration_tokens": 512,
            "evolution": {"population": 4, "generations": 1, "elites": 2},
        },
        "pretrain": {
            "tokens": 512,
            "validation_tokens": 512,
            "arms": [
                {"name": "scratch", "init": "random"},
                {"name": "subnet", "kd": {"top_k": 4, "cache": str(tmp_path / "cached")}},
            ],
        },
        "train": {"per_device_train_batch_size": 4},
    }


def test_every_stage_follows(recipe: dict[str, Any], tmp_path: Path) -> None:
    run_cache_teacher(recipe_from_dict(recipe))
    (result,) = run_recipe(recipe_from_dict(recipe))
    run = Path(recipe["output"])
    (trimmed,) = (tmp_path / "cache" / "trimmed").glob("*/teacher")
    teacher = Checkpoint.open_whole(trimmed)
    assert teacher.architecture.config.vocab_size == ROWS
    assert json.loads((run / "inputs.json").read_text())["teacher"] == teacher.hash
    for folder in (run / "student", run / "arms" / "subnet" / "model"):
        student = AutoModelForCausalLM.from_pretrained(folder)
        assert student.get_input_embeddings().weight.shape[0] == ROWS
        text = (tmp_path / "text").as_posix()
        for name in ("tokenizer_whole.json", "vocabulary.json"):
            assert (folder / name).read_bytes() == (trimmed / name).read_bytes()
        ids = [AutoTokenizer.from_pretrained(place)(text).input_ids for place in (folder, trimmed)]
        assert ids[0] == ids[1]
    assert 30_000 <= result["student"]["parameters"] <= 43_000
    assert [entry["rows"] for entry in result["vocabulary_sizes"]] == [128]
    assert f"This run keeps\n{ROWS} rows" in (run / "report.html").read_text()
    assert planned_architecture(recipe_from_dict(recipe)).sizes == teacher.architecture.sizes


def test_the_plan_is_of_the_trimmed_teacher(recipe: dict[str, Any]) -> None:
    whole = recipe_from_dict({**recipe, "vocabulary": {}})
    small = recipe_from_dict(recipe)
    plans = [print_search_plans(r, planned_architecture(r))[0] for r in (whole, small)]
    assert plans[0] != plans[1]


def test_the_same_trimmed_teacher_is_found_again(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Checkpoint.open(recipe["teacher"])
    data, settings = DataSettings(source=recipe["data"]["source"]), VocabularySettings(ROWS)
    first = trimmed_teacher(teacher, settings, data)
    monkeypatch.setattr("headstart.runs.vocabulary.token_counts", None)
    assert trimmed_teacher(teacher, settings, data).folder == first.folder
    assert trimmed_teacher(teacher, VocabularySettings(), data) is teacher
    assert trimmed_teacher(teacher, VocabularySettings(128), data) is teacher
    with pytest.raises(TypeError):  # it would count again
        trimmed_teacher(teacher, VocabularySettings(ROWS, keep=("abc",)), data)


def test_tokens_that_the_user_wants_stay(recipe: dict[str, Any]) -> None:
    teacher = Checkpoint.open(recipe["teacher"])
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    data = DataSettings(source=recipe["data"]["source"])
    counts = token_counts(teacher, data, 10**6)
    plain = trimmed_teacher(teacher, VocabularySettings(60), data)
    left = set(json.loads((plain.folder / "vocabulary.json").read_text()))
    rarest = min(set(range(128)) - left, key=lambda id: counts[id])
    wanted = tokenizer.decode([rarest])
    assert tokenizer(wanted)["input_ids"] == [rarest]
    kept = trimmed_teacher(teacher, VocabularySettings(60, keep=(wanted,)), data)
    assert rarest in json.loads((kept.folder / "vocabulary.json").read_text())
    assert len(AutoTokenizer.from_pretrained(kept.folder)(wanted)["input_ids"]) == 1


def test_tokens_are_counted_in_the_training_split_alone(recipe: dict[str, Any]) -> None:
    teacher = Checkpoint.open(recipe["teacher"])
    data = DataSettings(source=recipe["data"]["source"], validation_fraction=0.4)
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    expected = np.zeros(128, np.int64)
    for line in Path(data.source).read_text().splitlines():
        text = json.loads(line)["text"]
        if split_of(text, data) == "train":
            expected += np.bincount(tokenizer(text)["input_ids"], minlength=128)
    assert np.array_equal(token_counts(teacher, data, 10**6), expected)


def test_a_sample_is_from_all_over_every_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {number:04d}"}) for number in range(1000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = DataSettings(source=str(tmp_path))
    texts = sampled_texts(find_corpus(data.source), data, 600)
    for name in ("a", "b"):
        numbers = [int(text[2:]) for text in texts if text[0] == name]
        assert 20 < len(numbers) <= 50  # 300 characters of six
        assert numbers == sorted(numbers) and numbers[-1] > 900
        assert max(np.diff(numbers)) < 100


def test_a_sample_reads_no_more_than_it_has_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"{number:06d}"}) for number in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "not JSON"]))
    data = DataSettings(source=str(tmp_path), strict=True)
    monkeypatch.setattr(sample, "READ_TIMES", 4)
    texts = sampled_texts(find_corpus(data.source), data, 60)
    assert len(texts) <= 10 and 20 < int(texts[-1]) < 60
    monkeypatch.setattr(sample, "READ_TIMES", 10**6)
    with pytest.raises(UserError, match="line 1001"):
        sampled_texts(find_corpus(data.source), data, 60)


@pytest.mark.parametrize(
    ("vocabulary", "sentence"),
    [
        ({"size": 300}, "vocabulary.size is 300 and the teacher has 128 rows; use fewer"),
        ({"size": 5}, "vocabulary.size is 5, and"),
        ({"size": -1}, "vocabulary.size is -1; use at least 0"),
        ({"size": 96, "sample_characters": 0}, "vocabulary.sample_characters is 0; use at least 1"),
    ],
)
def test_mistakes_come_before_any_text_is_read(
    vocabulary: dict[str, int], sentence: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run_recipe(recipe_from_dict({**recipe, "vocabulary": vocabulary}))
    assert sentence in str(caught.value)
    assert not (tmp_path / "cache" / "data").exists() and not Path(recipe["output"]).exists()


def test_a_tokenizer_of_another_kind_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(recipe["teacher"], tmp_path / "words")
    save_tokenizer(tmp_path / "words", num_words=100, eos_token="</s>")
    with pytest.raises(UserError, match="of the kind WordLevel, and only BPE and Unigram"):
        run_recipe(recipe_from_dict({**recipe, "teacher": str(tmp_path / "words")}))


def test_the_table_ends_where_tokens_must_stay(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.runs.trimming.LEAST_ROWS", 1)
    teacher = Checkpoint.open(recipe["teacher"])
    data = DataSettings(source=recipe["data"]["source"], block_length=32)
    everything = AutoTokenizer.from_pretrained(teacher.folder).decode(range(128))
    for settings, expected in (
        (VocabularySettings(), [128, 64, 32, 16]),
        (VocabularySettings(keep=(everything,)), [128]),
    ):
        rows = [entry["rows"] for entry in vocabulary_sizes(teacher, settings, data)]
        assert rows == expected
        assert expected[-1] // 2 < len(needed_rows(teacher, settings)) <= expected[-1]


def test_trim_writes_a_folder(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["trim", recipe["teacher"], "--data", recipe["data"]["source"]]
    out = tmp_path / "smaller"
    assert main([*command, "--vocabulary", str(ROWS), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert Checkpoint.open_whole(out).architecture.config.vocab_size == ROWS
    for wrong, sentence in (
        (["--vocabulary", "96"], "trim writes a folder; give --out, or --table"),
        (["--out", str(out), "--vocabulary", "96"], "exists already"),
        (["--out", str(tmp_path / "x")], "needs a size; give --vocabulary a number above 0"),
        (["--out", str(tmp_path / "x"), "--vocabulary", "3"], "vocabulary.size is 3, and"),
    ):
        assert main([*command, *wrong]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    assert main(["trim", recipe["teacher"], "--out", str(tmp_path / "x")]) == 2
    assert "trim counts tokens in a text; give --data" in capsys.readouterr().err


def test_the_table_shows_what_a_trimmed_teacher_scores(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against `evaluate` of the folder that `trim` writes, on the same text."""
    monkeypatch.setattr("headstart.runs.trimming.LEAST_ROWS", 64)
    padded = tmp_path / "padded"  # with a row that half of the vocabulary has not
    shutil.copytree(recipe["teacher"], padded)
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "pad_token_id": 127}))
    recipe["teacher"] = str(padded)
    data = DataSettings(source=recipe["data"]["source"], block_length=32)
    teacher = Checkpoint.open(recipe["teacher"])
    whole, half = vocabulary_sizes(teacher, VocabularySettings(), data)
    assert (whole["rows"], half["rows"]) == (128, 64)
    assert whole["bytes_per_token"] > half["bytes_per_token"] > 1
    out = str(tmp_path / "half")
    command = ["trim", recipe["teacher"], "--data", data.source, "--block-length", "32"]
    assert main([*command, "--vocabulary", "64", "--out", out]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", recipe["teacher"], out, "--data", data.source, "--block-length", "32"]
    assert main([*evaluate, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    for found, scored in zip((whole, half), scores.values(), strict=True):
        assert found["bits_per_byte"] == pytest.approx(scored["bits_per_byte"], rel=1e-4)
    assert main([*command, "--table", "--width", "24", "--parameters", "20K"]) == 0
    printed = capsys.readouterr().out
    assert "bits/byte" in printed and "18.5k" in printed  # 20,000 - 64 * 24
