"""Continuations against the likeliest tokens of whole forward passes, one at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, extract, random_teacher
from tests.model.oracles import random_layerwise_spec
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from headstart.cli import main
from headstart.evaluation import continuation
from headstart.evaluation.continuation import (
    GenerationSettings,
    beginnings,
    continue_prompts,
    prompts_of,
    run_generate,
)
from headstart.model.checkpoint import Checkpoint
from headstart.system.errors import UserError
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings

TEXTS = ("abe cad", "gab", "hed fa")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def greedy_by_hand(folder: Path, prompt: Sequence[int], new_tokens: int) -> str:
    """The likeliest token after a whole forward pass, again and again, until a text ends."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, tokens))
    assert after.startswith(before)
    return str(after[len(before) :])


@pytest.mark.parametrize("kind", [*TEACHERS, *DESCENDANTS])
@pytest.mark.parametrize("is_layerwise", [False, True])
def test_the_likeliest_tokens_of_every_family(
    kind: str, is_layerwise: bool, saved: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    teacher = random_teacher(kind)
    folder = saved(teacher)
    if is_layerwise:
        spec = random_layerwise_spec(teacher, seed=1, layers=3, embed=36)
        folder = extract(folder, spec, tmp_path / "student")
    tokenizer.save_pretrained(folder)
    model = Checkpoint.open(folder)
    prompts = prompts_of(model, TEXTS)
    assert len({len(prompt) for prompt in prompts}) > 1
    found = continue_prompts(model, prompts, GenerationSettings(new_tokens=8))
    assert found == [greedy_by_hand(folder, prompt, 8) for prompt in prompts]


@pytest.fixture
def model(teacher_folder: Path) -> Checkpoint:
    return Checkpoint.open(teacher_folder)


def test_the_models_own_settings_have_no_say(
    saved: Any, tokenizer: PreTrainedTokenizerFast, teacher_folder: Path, model: Checkpoint
) -> None:
    teacher = random_teacher("llama-tied-gqa")
    teacher.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=8.0, max_length=7, eos_token_id=5
    )
    folder = saved(teacher)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 8
    changed = Checkpoint.open(folder)
    settings, prompts = GenerationSettings(new_tokens=8), prompts_of(model, TEXTS)
    assert continue_prompts(changed, prompts, settings) == continue_prompts(
        model, prompts, settings
    )


def test_draws_depend_on_the_seed_and_narrow_to_the_likeliest(model: Checkpoint) -> None:
    prompts = prompts_of(model, TEXTS)

    def drawn(**settings: Any) -> list[str]:
        return continue_prompts(model, prompts, GenerationSettings(new_tokens=8, **settings))

    likeliest = drawn()
    assert drawn(temperature=1e-4) == likeliest
    assert drawn(temperature=5.0, top_p=1e-6) == likeliest
    first = drawn(temperature=1.0, seed=1)
    assert first != likeliest and first != drawn(temperature=1.0, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    again = GenerationSettings(8, temperature=1.0, seed=1)
    assert first == continuation._continued(model, tokenizer, prompts, again)


def test_a_model_without_a_tokenizer_is_read_with_another_folders(
    saved: Any, model: Checkpoint
) -> None:
    alone = Checkpoint.open(saved(random_teacher("llama-tied-gqa")))
    prompts, settings = prompts_of(model, TEXTS), GenerationSettings(4)
    found = continue_prompts(alone, prompts, settings, model.folder)
    assert found == continue_prompts(model, prompts, settings)


def test_draws_follow_the_models_probabilities(model: Checkpoint) -> None:
    """Of 2,000 first tokens, the shares of the likeliest are within four standard errors."""
    (prompt,) = prompts_of(model, TEXTS[:1])
    loaded = AutoModelForCausalLM.from_pretrained(model.folder)
    with torch.no_grad():
        expected = (loaded(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(0)
    tokenizer, count = AutoTokenizer.from_pretrained(model.folder), 2_000
    settings = GenerationSettings(new_tokens=1, temperature=0.7)
    rows = continuation._generate(loaded, tokenizer, [prompt] * count, 1, settings)
    shares = torch.bincount(torch.tensor([row[-1] for row in rows]), minlength=128) / count
    errors = (expected * (1 - expected) / count).sqrt()
    for token in expected.topk(20).indices:
        assert abs(shares[token] - expected[token]) < 4 * errors[token]


def test_what_was_made_is_read_from_the_cache(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, settings = prompts_of(model, TEXTS), GenerationSettings(new_tokens=4)
    found = continue_prompts(model, prompts, settings)
    monkeypatch.setattr(continuation, "load_frozen", None)
    assert continue_prompts(model, prompts, settings) == found
    with pytest.raises(TypeError):  # there is no model to ask
        continue_prompts(model, prompts, GenerationSettings(new_tokens=5))


def test_a_text_ends_with_the_models_context(
    saved: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = random_teacher("gpt_neox-untied")  # of 128 positions
    folder = saved(teacher)
    tokenizer.save_pretrained(folder)
    model = Checkpoint.open(folder)
    assert model.architecture.context_limit == 128
    prompts = [list(range(1, 126))]
    found = continue_prompts(model, prompts, GenerationSettings(new_tokens=64))
    assert found == [greedy_by_hand(folder, prompts[0], 3)]
    with pytest.raises(UserError, match="context is 128; shorten it"):
        prompts_of(model, ["abe " * 200])


def test_a_document_begins_as_in_training(
    tokenizer: PreTrainedTokenizerFast, saved: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(saved(random_teacher("llama-tied-gqa")))
    folder = tmp_path / "teacher"
    plain = prompts_of(Checkpoint.open(folder), ["abe"])
    with_begin = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<end>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    with_begin["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, sequence],
        "pair": [begin, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [0], "tokens": ["<end>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(with_begin))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<end>"}))
    assert prompts_of(Checkpoint.open(folder), ["abe"]) == [[0, *plain[0]]]


def test_beginnings_are_those_of_documents_of_the_test_split(
    corpus: Path, teacher_folder: Path
) -> None:
    text = prepare(DataSettings(str(corpus), block_length=128), teacher_folder)
    end_token = text.manifest["end_token"]
    blocks = [list(map(int, block)) for block in text.split("test")]
    found = beginnings(text, 3, num_tokens=12)
    assert len(found) == 3 and len({tuple(prompt) for prompt in found}) == 3
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    lines = corpus.read_text().splitlines()
    documents = {tuple(tokenizer.encode(json.loads(line)["text"])[:12]) for line in lines}
    for prompt in found:
        assert len(prompt) == 12 and end_token not in prompt
        assert tuple(prompt) in documents
        assert any(
            [end_token, *prompt] == block[at : at + 13]
            for block in blocks
            for at in range(len(block))
        )


def test_a_block_without_a_beginning_gives_its_own(corpus: Path, teacher_folder: Path) -> None:
    text = prepare(DataSettings(str(corpus), block_length=8), teacher_folder)
    blocks = [list(map(int, block)) for block in text.split("test")]
    for prompt in beginnings(text, 5, num_tokens=8):
        assert prompt in blocks


def test_the_command(
    teacher_folder: Path, capsys: pytest.CaptureFixture[str], model: Checkpoint
) -> None:
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    command = ["generate", *prompts, str(teacher_folder), "--tokens", "6"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    expected = run_generate(str(teacher_folder), TEXTS, GenerationSettings(6))
    for entry, text in zip(expected, TEXTS, strict=True):
        assert entry["prompt"] == text
        assert text + entry["text"] in shown
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", ""], "the prompt '' is empty"),
        (["--prompt", "a", "--tokens", "0"], "--tokens is 0; use at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0; use 0 or more"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "--top-p is 0.0"),
        (["--prompt", "a", "--top-p", "0.5"], "set --temperature above 0"),
    ],
)
def test_mistakes_are_told(
    flags: list[str], sentence: str, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(teacher_folder), *flags]) == 2
    assert sentence in capsys.readouterr().err
