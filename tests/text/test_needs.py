"""A run reads what it needs, from all over the corpus, and what was read is not read again."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.text.documents import (
    DOCUMENTS,
    SETTINGS,
    as_jsonl,
    blocks_by_hand,
    refuse,
    write_source,
)
from transformers import PreTrainedTokenizerFast

from headstart.system.errors import UserError
from headstart.text import corpus as corpus_module
from headstart.text import needs as needs_module
from headstart.text import tokenise as tokenise_module
from headstart.text.needs import Needed, shares_of
from headstart.text.prepare import prepare
from headstart.text.settings import SPLITS, DataSettings, MixtureSource
from headstart.text.tokenise import split_of


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Documents that the tokenizer is given, in batches of ten."""
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 10)
    whole_call, seen = PreTrainedTokenizerFast.__call__, list[str]()

    def watch(self: object, batch: list[str], **options: object) -> object:
        seen.extend(batch)
        return whole_call(self, batch, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watch)
    yield seen


def write_shards(folder: Path, count: int) -> Path:
    """As many files, in which the documents are dealt out."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.jsonl").write_text(as_jsonl(DOCUMENTS[number::count]))
    return folder


def test_max_tokens_cut_the_training_split(
    tmp_path: Path, tokenizer: Path, read: list[str]
) -> None:
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "a.jsonl")), max_tokens=500)
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    counts = prepared.manifest["splits"]
    assert counts["train"]["tokens"] == 500
    assert len(read) < 80
    expected = blocks_by_hand(DOCUMENTS, "train", settings)[: 500 // SETTINGS.block_length]
    np.testing.assert_array_equal(prepared.split("train"), expected)


def test_every_file_gives_its_share(
    tmp_path: Path, tokenizer: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: four files with as much text each; a quarter is read of each, batch by batch."""
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 5)
    source = write_shards(tmp_path / "shards", 4)
    settings = replace(SETTINGS, source=str(source))
    needed = Needed({"train": 700, "validation": 100, "search": 20, "test": 20})
    prepared = prepare(settings, tokenizer, tmp_path / "cache", needed)
    counts = prepared.manifest["splits"]
    assert all(counts[split]["tokens"] >= count for split, count in needed.tokens.items())
    assert len(read) < 100, "more than was needed was read"
    by_file = [DOCUMENTS[number::4] for number in range(4)]
    taken = [[text for text in documents if text in set(read)] for documents in by_file]
    assert all(
        of_file == file[: len(of_file)] for of_file, file in zip(taken, by_file, strict=True)
    )
    assert max(map(len, taken)) - min(map(len, taken)) <= 10 and min(map(len, taken)) > 5
    # A batch that was under way is read and not taken.
    for split in SPLITS:
        num_documents = counts[split]["documents"]
        texts = [text for file in taken for text in file if split_of(text, settings) == split]
        assert num_documents <= len(texts) <= num_documents + 20


def test_the_files_that_are_needed_lie_all_over_the_folder(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module, "LEAST_UNITS", 10)
    monkeypatch.setattr(needs_module, "UNIT_TOKENS", 1 << 30)
    source = write_shards(tmp_path / "shards", 100)
    settings = replace(SETTINGS, source=str(source))
    needed = Needed({"train": 200, "search": 8, "test": 8})
    prepared = prepare(settings, tokenizer, tmp_path / "cache", needed)
    read = {path.name for path in (tmp_path / "cache" / "units").iterdir()}
    assert 10 <= len(read) < 40
    assert prepared.manifest["files_not_needed"] == 100 - len(read)
    given = {
        number
        for number in range(100)
        for text in DOCUMENTS[number::100]
        if _is_in(text, prepared.split("train"))
    }
    assert min(given) < 20 and max(given) > 80


def _is_in(text: str, blocks: np.ndarray) -> bool:
    tokens = " ".join(f"w{int(token) - 2}" for token in np.asarray(blocks).flat)
    return f" {text} " in f" {tokens} "


def test_more_is_read_where_less_was_read_before(
    tmp_path: Path, tokenizer: Path, read: list[str]
) -> None:
    settings = replace(SETTINGS, source=str(write_shards(tmp_path / "shards", 3)))
    little = prepare(settings, tokenizer, tmp_path / "cache", Needed({"train": 400}))
    num_read = len(read)
    more = prepare(settings, tokenizer, tmp_path / "cache", Needed({"train": 2400}))
    assert len(read) == len(set(read)), "documents were tokenised twice"
    assert len(read) > num_read
    fresh = prepare(settings, tokenizer, tmp_path / "other", Needed({"train": 2400}))
    assert more.manifest == fresh.manifest
    again = prepare(settings, tokenizer, tmp_path / "afterwards", Needed({"train": 2400}))
    shutil.rmtree(again.folder)
    # However far others have read, a run takes what it would have taken alone.
    late = prepare(settings, tokenizer, tmp_path / "afterwards", Needed({"train": 400}))
    assert late.manifest == little.manifest
    for split in SPLITS:
        assert (fresh.folder / f"{split}.bin").read_bytes() == (
            more.folder / f"{split}.bin"
        ).read_bytes()


def test_one_changed_file_is_read_alone(tmp_path: Path, tokenizer: Path, read: list[str]) -> None:
    source = write_shards(tmp_path / "shards", 3)
    settings = replace(SETTINGS, source=str(source))
    before = prepare(settings, tokenizer, tmp_path / "cache")
    read.clear()
    changed = source / "001.jsonl"
    changed.write_text(as_jsonl(["w1 w2 w3", *DOCUMENTS[1::3]]))
    after = prepare(settings, tokenizer, tmp_path / "cache")
    assert set(read) == {"w1 w2 w3", *DOCUMENTS[1::3]}
    assert after.fingerprint != before.fingerprint
    documents = [*DOCUMENTS[0::3], "w1 w2 w3", *DOCUMENTS[1::3], *DOCUMENTS[2::3]]
    for split in SPLITS:
        expected = blocks_by_hand(documents, split, settings)
        np.testing.assert_array_equal(after.split(split), expected)


def test_a_copy_of_another_time_is_the_same_text(tmp_path: Path, tokenizer: Path) -> None:
    source = write_shards(tmp_path / "shards", 2)
    assert all(path.stat().st_size > 4096 for path in source.iterdir())
    settings = replace(SETTINGS, source=str(source))
    before = prepare(settings, tokenizer, tmp_path / "cache")
    for path in source.iterdir():
        os.utime(path, ns=(1, 1))
    after = prepare(settings, tokenizer, tmp_path / "cache")
    assert after.folder != before.folder and after.fingerprint == before.fingerprint


def test_what_is_not_there_ends_the_reading(tmp_path: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(write_shards(tmp_path / "shards", 3)))
    everything = prepare(settings, tokenizer, tmp_path / "cache")
    needed = Needed({"train": 1_000_000}, train_bytes=1 << 40)
    prepared = prepare(settings, tokenizer, tmp_path / "cache", needed)
    assert prepared.fingerprint == everything.fingerprint


def test_text_is_read_by_bytes(tmp_path: Path, tokenizer: Path, read: list[str]) -> None:
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "a.jsonl")))
    prepared = prepare(settings, tokenizer, tmp_path / "cache", Needed(train_bytes=4000))
    assert 4000 <= prepared.manifest["splits"]["train"]["text_bytes"] < 8000
    assert len(read) < len(DOCUMENTS) // 2


def test_parts_of_a_mixture_give_their_shares(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("a", "b"):
        text = [f"w{number} {text}" for number, text in enumerate(DOCUMENTS)]
        (tmp_path / f"{name}.jsonl").write_text(as_jsonl(text[:: -1 if name == "b" else 1]))
    parts = tuple(
        MixtureSource(str(tmp_path / f"{name}.jsonl"), weight)
        for name, weight in (("a", 3.0), ("b", 1.0))
    )
    settings = replace(SETTINGS, source="", mixture=parts)
    needed = Needed({"train": 1200, "validation": 200})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise_module, "BATCH_ROWS", 4)
        prepared = prepare(settings, tokenizer, tmp_path / "cache", needed)
    folders = [tmp_path / "cache" / part["folder"] for part in prepared.manifest["parts"]]
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in folders)
    assert first["splits"]["train"]["tokens"] >= 900
    assert 300 <= second["splits"]["train"]["tokens"] < 700
    for split, count in needed.tokens.items():
        assert prepared.split(split).size >= count - 2 * SETTINGS.block_length
    assert prepared.split("train").size <= 1200 + 2 * SETTINGS.block_length
    rows = list(map(tuple, prepared.split("train").order))
    assert len(set(rows)) == len(rows), "blocks are repeated"


def test_a_small_part_of_a_mixture_gives_a_block_of_every_split(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 2)
    texts = {"a": DOCUMENTS, "b": [f"w{number} {text}" for number, text in enumerate(DOCUMENTS)]}
    for name, documents in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(as_jsonl(documents))
    weights = {"a": 99.0, "b": 1.0}
    parts = tuple(MixtureSource(str(tmp_path / f"{n}.jsonl"), w) for n, w in weights.items())
    settings = replace(SETTINGS, source="", mixture=parts, block_length=64)
    needed = Needed({"train": 1500, "search": 100, "validation": 100, "test": 100})
    prepared = prepare(settings, tokenizer, tmp_path / "cache", needed)
    assert 1400 <= prepared.split("train").size <= 1700


def test_a_finished_text_needs_no_tokenizer_call(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "folder")))
    first = prepare(settings, tokenizer, tmp_path / "cache", Needed({"train": 300}))
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
    assert prepare(settings, tokenizer, tmp_path / "cache", Needed({"train": 300})) == first


def test_held_out_splits_decide_where_little_is_trained_on() -> None:
    settings = DataSettings(validation_fraction=0.1, search_fraction=0.1, test_fraction=0.2)
    assert settings.share("train") == pytest.approx(0.6)
    assert Needed({"train": 600, "test": 100}).first_tokens(settings) == 1000
    assert Needed({"train": 600, "test": 1000}).first_tokens(settings) == 5000
    assert Needed(train_bytes=2400).first_tokens(settings) == 1000
    counts = {name: {"tokens": 100, "text_bytes": 400} for name in SPLITS}
    assert Needed({"train": 100, "test": 100}, train_bytes=400).growth(counts) == 1
    assert Needed({"train": 100, "test": 120}).growth(counts) == pytest.approx(1.02 * 1.2)
    assert Needed({}, train_bytes=4000).growth(counts) == 2


@given(
    expected=st.lists(st.floats(1, 1e10), min_size=1, max_size=300),
    num_tokens=st.floats(1, 1e12),
)
def test_shares_come_to_what_is_needed(expected: list[float], num_tokens: float) -> None:
    shares = shares_of(expected, num_tokens)
    assert list(shares) == sorted(shares) and len(shares) >= min(len(expected), 64)
    assert sum(shares.values()) == pytest.approx(num_tokens)
    rates = [share / expected[unit] for unit, share in shares.items()]
    assert max(rates) == pytest.approx(min(rates))
    if len(shares) < len(expected):
        assert sum(min(expected[unit], 1 << 20) for unit in shares) >= num_tokens
    assert shares_of(expected, math.inf) == dict.fromkeys(range(len(expected)), math.inf)


def test_a_strict_reader_refuses_again(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 10)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(as_jsonl(DOCUMENTS))
    (folder / "b.jsonl").write_text(as_jsonl(DOCUMENTS, column="body"))
    settings = replace(SETTINGS, source=str(folder), strict=True)
    for _ in range(2):
        with pytest.raises(UserError, match="has no column 'text'"):
            prepare(settings, tokenizer, tmp_path / "cache")


def test_a_fault_that_has_passed_is_read_over(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, source=str(write_shards(tmp_path / "shards", 2)))
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "json_lines", _one_fault(corpus_module.json_lines))
        broken = prepare(settings, tokenizer, tmp_path / "cache")
    assert list(broken.manifest["faults"]) == ["000.jsonl"]
    mended = prepare(replace(settings, block_length=16), tokenizer, tmp_path / "cache")
    assert not mended.manifest["faults"]
    count = sum(split["documents"] for split in mended.manifest["splits"].values())
    assert count == len(DOCUMENTS)


def _one_fault(read: Callable[..., Iterator[dict[str, str]]]) -> Callable[..., Any]:
    """A reader that fails once, after 30 rows."""
    faults = ["a fault"]

    def rows(*given: Any) -> Iterator[dict[str, str]]:
        for number, row in enumerate(read(*given)):
            if number == 30 and faults:
                raise ValueError(faults.pop())
            yield row

    return rows
