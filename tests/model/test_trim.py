"""A trimmed teacher is an ordinary checkpoint that computes what the whole one does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import random_teacher
from tests.text.vocabularies import KINDS, saved_tokenizer, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headstart.model.checkpoint import Checkpoint
from headstart.model.transformers_4 import old_entries
from headstart.model.trim import (
    config_ids,
    read_tokenizer,
    trimmed_architecture,
    write_trimmed,
)
from headstart.system.errors import UserError
from headstart.text.vocabulary import kept_tokens

PADDING_ROWS = 6
CONVERSATION = [
    {"role": "user", "content": "kalo mi"},
    {"role": "assistant", "content": "tor"},
]


def write_teacher(kind: str, folder: Path, is_tied: bool = True) -> Path:
    """A random Llama with rows beyond its tokenizer's, and ids in its configs."""
    tokenizer = saved_tokenizer(kind, folder)
    ids = {"bos_token_id": 1, "eos_token_id": [2, tokenizer.convert_tokens_to_ids("<|user|>")]}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + PADDING_ROWS, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=is_tied, pad_token_id=len(tokenizer) + 1, **ids,
        )
    )  # fmt: skip
    model.generation_config.update(**ids, suppress_tokens=[5, len(tokenizer) - 1])
    model.save_pretrained(folder)
    return folder


def kept_of(teacher: Checkpoint, size: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    counts = np.zeros(teacher.architecture.config.vocab_size, np.int64)
    for text in sentences():
        counts += np.bincount(tokenizer(text)["input_ids"], minlength=len(counts))
    return kept_tokens(read_tokenizer(teacher), counts, size, config_ids(teacher))


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, list[int]]:
    """A teacher, the same without some of its tokens, and the ids of those that are left."""
    teacher = Checkpoint.open(write_teacher(request.param, tmp_path / "teacher"))
    rows = teacher.architecture.config.vocab_size
    kept = kept_of(teacher, rows - 40)
    (tmp_path / "trimmed").mkdir()
    write_trimmed(teacher, kept, tmp_path / "trimmed")
    return teacher.folder, tmp_path / "trimmed", kept


@torch.no_grad()
def test_logits_are_the_kept_rows_of_the_teachers(both: tuple[Path, Path, list[int]]) -> None:
    teacher, trimmed, kept = both
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (teacher, trimmed)]
    whole, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (teacher, trimmed))
    texts = [text for text in sentences() if set(tokenizers[0](text)["input_ids"]) <= set(kept)]
    assert len(texts) > 20
    for text in texts[:20]:
        theirs, ours = (tokenizer(text, return_tensors="pt").input_ids for tokenizer in tokenizers)
        assert [kept[id] for id in ours[0]] == theirs[0].tolist()
        assert torch.equal(small(ours).logits, whole(theirs).logits[..., kept])


def test_special_tokens_keep_position_and_meaning(both: tuple[Path, Path, list[int]]) -> None:
    teacher, trimmed, kept = both
    whole, small = (AutoTokenizer.from_pretrained(folder) for folder in (teacher, trimmed))
    assert small.all_special_tokens == whole.all_special_tokens
    assert [kept[id] for id in small.all_special_ids] == whole.all_special_ids
    assert {t.content: t.special for t in small.added_tokens_decoder.values()} == {
        t.content: t.special for t in whole.added_tokens_decoder.values()
    }
    text = "ka<|user|>lo</s> mi<|assistant|>"
    assert [kept[id] for id in small(text)["input_ids"]] == whole(text)["input_ids"]
    for is_asked in (False, True):
        rendered = [
            tokenizer.apply_chat_template(
                CONVERSATION, tokenize=False, add_generation_prompt=is_asked
            )
            for tokenizer in (whole, small)
        ]
        assert rendered[0] == rendered[1] != ""


def test_configs_name_the_same_tokens(both: tuple[Path, Path, list[int]]) -> None:
    teacher, trimmed, kept = both
    for file, keys in {
        "config.json": ("bos_token_id", "eos_token_id", "pad_token_id"),
        "generation_config.json": ("bos_token_id", "eos_token_id", "pad_token_id"),
    }.items():
        whole, small = (json.loads((folder / file).read_text()) for folder in (teacher, trimmed))
        for key in keys:
            places = small[key] if isinstance(small[key], list) else [small[key]]
            theirs = whole[key] if isinstance(whole[key], list) else [whole[key]]
            assert [kept[place] for place in places] == theirs
    suppressed = json.loads((trimmed / "generation_config.json").read_text())["suppress_tokens"]
    theirs = json.loads((teacher / "generation_config.json").read_text())["suppress_tokens"]
    assert [kept[place] for place in suppressed] == [id for id in theirs if id in kept]


def test_the_whole_vocabulary_is_the_teacher_itself(tmp_path: Path) -> None:
    teacher = Checkpoint.open(write_teacher("byte-level", tmp_path / "teacher", is_tied=False))
    rows = teacher.architecture.config.vocab_size
    (tmp_path / "same").mkdir()
    write_trimmed(teacher, kept_of(teacher, rows), tmp_path / "same")
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "same", teacher.folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        read: list[Any] = [
            json.loads((folder / file).read_text())
            for folder in (tmp_path / "same", teacher.folder)
        ]
        if file == "config.json":
            read[1] |= old_entries(read[1])
        assert read[0] == read[1]


@pytest.mark.parametrize("kind", ["gpt_neox-untied", "llama-tied-gqa", "qwen3-tied"])
def test_every_family_loses_rows_of_its_embedding_and_output(kind: str, tmp_path: Path) -> None:
    random_teacher(kind).save_pretrained(tmp_path / "teacher")
    saved_tokenizer("byte-level", tmp_path / "tokenizer")
    teacher = Checkpoint.open(tmp_path / "teacher")
    kept = [0, 1, 2, *range(7, 128, 3)]
    rows = {file.name: file for file in (tmp_path / "tokenizer").iterdir()}
    for name, file in rows.items():
        shutil.copyfile(file, teacher.folder / name)
    entries = read_tokenizer(teacher)
    entries["added_tokens"] = [e for e in entries["added_tokens"] if e["id"] in kept]
    (teacher.folder / "tokenizer.json").write_text(json.dumps(entries))
    (tmp_path / "small").mkdir()
    write_trimmed(teacher, kept, tmp_path / "small")
    small = Checkpoint.open_whole(tmp_path / "small")
    assert small.architecture.config.vocab_size == len(kept)
    expected = trimmed_architecture(teacher.architecture, len(kept))
    assert small.architecture.sizes == expected.sizes
    whole, cut = dict(teacher.tensors()), dict(small.tensors())
    for name, tensor in cut.items():
        has_rows = tensor.shape != whole[name].shape
        assert has_rows == ("embed_" in name or name == "lm_head.weight")
        assert torch.equal(tensor, whole[name][kept] if has_rows else whole[name])


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    random_teacher("llama-tied-gqa").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and only such a tokenizer can"):
        read_tokenizer(Checkpoint.open(tmp_path))
