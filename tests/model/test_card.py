"""The card of a student says what its files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.conftest import extract, random_teacher
from tests.model.oracles import random_layerwise_spec, random_spec

from headstart.model.architecture import Architecture
from headstart.model.card import licence_of, training_note, write_card


@pytest.mark.parametrize("shape", ["uniform", "layer-wise"])
def test_an_extracted_student_has_one(shape: str, saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("llama-tied-gqa")
    folder = saved(teacher)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    is_uniform = shape == "uniform"
    spec = random_spec(teacher, embed=36) if is_uniform else random_layerwise_spec(teacher, 1)
    provenance = {"teacher_name": "some-org/some-model", "bin": [30_000, 45_000], "loss": 3.21987}
    out = extract(folder, spec, tmp_path / "student", provenance=provenance)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "some-org/some-model"
    parameters = Architecture.read(out).count(1).parameters
    for fact in (
        f"{parameters:,} parameters",
        "`some-org/some-model`",
        "binds this model too: apache-2.0",
        "between 30,000 and 45,000",
        "3.2199 nats",
        "| embed | 36 |" if is_uniform else "by layer |",
    ):
        assert fact in card.text, fact
    assert ("trust_remote_code" in card.text) == (not is_uniform)
    assert ("transformers 5." in card.text) == (not is_uniform)


def test_an_unknown_licence_is_said_to_be_unknown(saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("llama-tied-gqa")
    folder = saved(teacher)
    assert licence_of(folder) == "unknown"
    (folder / "README.md").write_text("# no front matter\n")
    assert licence_of(folder) == "unknown"
    out = extract(folder, random_spec(teacher, mlp=40), tmp_path / "student")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model is None
    assert "binds this model too: its card does not say" in card.text


@pytest.mark.parametrize("text", [b"---\nlicense: [mit, x\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_card_that_nobody_can_read_says_nothing(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text)
    assert licence_of(tmp_path) == "unknown"


def test_a_licence_of_its_own_name(tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: gemma\n---\n"
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == "gemma"


def test_training_stands_under_its_heading(saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("llama-tied-gqa")
    out = extract(saved(teacher), random_spec(teacher, mlp=40), tmp_path / "student")
    arm = {
        "init": "subnet",
        "kd": {"alpha": 0.3, "beta": 0.7, "divergence": "forward_kl", "temperature": 2.0},
        "tokens": 1_234_567,
        "learning_rate": 0.003,
        "loss_before": 8.5,
        "loss_final": 6.25,
    }
    recipe = {"data": {"source": "corpus.jsonl", "mixture": []}}
    note = training_note(arm, {"recipe": recipe, "teacher": {"loss": 3.5}})
    write_card(out, {"Training": note})
    text = (out / "README.md").read_text()
    section = text.split("## Training\n")[1]
    for fact in ("`corpus.jsonl`", "1,234,567", "cut out of", "0.3 of cross-entropy", "0.7 of"):
        assert fact in section, fact
    assert "8.5000 before, 6.2500 after (teacher 3.5000)" in section
    plain = training_note({**arm, "kd": None}, {"recipe": recipe, "teacher": {"loss": 3.5}})
    assert "cross-entropy alone" in plain
    assert json.loads((out / "subnet.json").read_text())["teacher_licence"] == "unknown"
