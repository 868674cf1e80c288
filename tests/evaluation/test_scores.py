"""What is measured once is kept, for as long as what it depends on stays the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import random_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.evaluation import scores as evaluation
from headstart.evaluation.scores import bits_per_byte, remembered_scores, text_scores
from headstart.model.checkpoint import Checkpoint
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_scores_are_kept_by_what_they_depend_on(cache: Path) -> None:
    answers = iter([{"acc": 0.5}, {"acc": 0.25}])
    for _ in range(2):
        assert remembered_scores("tasks", ["a", 1, None], lambda: next(answers)) == {"acc": 0.5}
    assert remembered_scores("tasks", ["a", 2, None], lambda: next(answers)) == {"acc": 0.25}
    assert len(list((cache / "tasks").iterdir())) == 2


def test_a_whole_text_is_the_models_own_loss_on_its_bytes(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' own loss of the very documents, in float64."""
    text = tmp_path / "text.jsonl"
    documents = ["abc def " * 9, "hah bad " * 12, "cafe " * 20]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    settings = DataSettings(str(text), block_length=8).for_test_alone()
    teacher = Checkpoint.open(teacher_folder)
    blocks = prepare(settings, teacher_folder)
    found = text_scores(teacher, blocks, 10_000)

    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokens = [token for document in documents for token in [*tokenizer(document)["input_ids"], 0]]
    whole = torch.tensor(tokens[: len(tokens) // 8 * 8]).view(-1, 8)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).double()
    with torch.no_grad():
        expected = model(whole, labels=whole).loss.item()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    num_bytes = sum(len(document.encode()) for document in documents)
    bits = expected * len(tokens) / num_bytes / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert (found["tokens"], found["parameters"]) == (whole.numel(), model.num_parameters())

    def fail(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluation, "text_loss", fail)
    assert text_scores(teacher, blocks, 10_000) == found
    other = tmp_path / "other"
    random_teacher("llama-tied-gqa", seed=1).save_pretrained(other)
    with pytest.raises(AssertionError, match="measured again"):
        text_scores(Checkpoint.open(other), blocks, 10_000)


def test_bits_per_byte_does_not_depend_on_the_tokenizer() -> None:
    """A uniform guess over 256 bytes, or over 65536 pairs of them, is 8 bits a byte."""
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(65536), bytes_per_token=2) == pytest.approx(8)
