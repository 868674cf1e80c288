"""A corpus is prepared once, and anew when what it is made of changes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.text.documents import (
    DOCUMENTS,
    EOS,
    NUM_WORDS,
    SETTINGS,
    as_jsonl,
    blocks_by_hand,
    refuse,
    save_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from headstart.text.prepare import check_source, prepare
from headstart.text.settings import SPLITS, DataSettings, MixtureSource
from headstart.text.tokenise import split_of


def test_manifest_says_what_went_in(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    assert json.loads((prepared.folder / "manifest.json").read_text()) == prepared.manifest
    assert prepared.manifest["settings"]["source"] == str(corpus)
    assert prepared.manifest["dtype"] == "uint16"
    assert prepared.manifest["inputs"][0]["name"] == "corpus.jsonl"
    for name in SPLITS:
        texts = [text for text in DOCUMENTS if split_of(text, settings) == name]
        num_tokens = sum(len(text.split()) + 1 for text in texts)
        assert prepared.manifest["splits"][name] == {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "tokens": num_tokens,
            "packed_tokens": num_tokens,
            "blocks": num_tokens // settings.block_length,
        }


def test_copies_of_a_document_share_one_split(tmp_path: Path, tokenizer: Path) -> None:
    marked = [f"w{n} {text}" for n, text in enumerate(DOCUMENTS)]
    path = tmp_path / "copies.jsonl"
    path.write_text(as_jsonl(marked + marked[::-1]))
    prepared = prepare(replace(SETTINGS, source=str(path)), tokenizer, tmp_path / "cache")
    seen: dict[str, set[str]] = {}
    for name in SPLITS:
        words = " ".join(
            f"w{token - 2}" if token != EOS else "|" for token in prepared.split(name).flat
        )
        seen[name] = {text.strip() for text in words.split("|")} & set(marked)
        assert seen[name]
    assert not seen["train"] & seen["search"]
    assert not seen["train"] & seen["validation"]
    assert not seen["search"] & seen["validation"]


def test_split_shares_seed_and_stability() -> None:
    settings = DataSettings(validation_fraction=0.2, search_fraction=0.1)
    texts = [f"document {n}" for n in range(5000)]
    names = [split_of(text, settings) for text in texts]
    assert names.count("validation") / 5000 == pytest.approx(0.2, abs=0.02)
    assert names.count("search") / 5000 == pytest.approx(0.1, abs=0.02)
    reseeded = [split_of(text, replace(settings, seed=1)) for text in texts]
    assert 0.3 < np.mean([a != b for a, b in zip(names, reseeded, strict=True)]) < 0.6
    # Written down: another platform or version must not move a document into another split.
    assert names[:7] == [
        "train",
        "validation",
        "search",
        "train",
        "train",
        "validation",
        "train",
    ]


def test_a_second_call_does_no_work(
    tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    first = prepare(settings, tokenizer, tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
    second = prepare(settings, tokenizer, tmp_path / "cache")
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    # The same content in another place is the same corpus.
    (tmp_path / "new").mkdir()
    moved = corpus.rename(tmp_path / "new" / corpus.name)
    third = prepare(replace(settings, source=str(moved)), tokenizer, tmp_path / "cache")
    assert third.folder == first.folder


def test_changed_content_settings_or_tokenizer_prepare_anew(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    folders = {prepare(settings, tokenizer, tmp_path / "cache").folder}
    other = save_tokenizer(tmp_path / "other", NUM_WORDS + 1, eos_token="</s>")
    folders.add(prepare(settings, other, tmp_path / "cache").folder)
    folders.add(prepare(replace(settings, seed=9), tokenizer, tmp_path / "cache").folder)
    size_bytes = corpus.stat().st_size
    corpus.write_text(corpus.read_text().replace("w11 ", "w12 "))
    assert corpus.stat().st_size == size_bytes
    changed = prepare(settings, tokenizer, tmp_path / "cache")
    folders.add(changed.folder)
    assert len(folders) == 4
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = blocks_by_hand(documents, "train", settings)
    np.testing.assert_array_equal(changed.split("train"), expected)


@pytest.mark.parametrize("name", ["train.bin", "manifest.json"])
def test_a_truncated_file_is_made_again(
    name: str, tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    folder = prepare(settings, tokenizer, tmp_path / "cache").folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2])
    prepare(settings, tokenizer, tmp_path / "cache")
    assert (folder / name).read_bytes() == whole


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    def prepared_dtype(num_words: int) -> np.dtype:
        documents = [f"w{num_words - 1} {text}" for text in DOCUMENTS]
        path = tmp_path / f"{num_words}.jsonl"
        path.write_text(as_jsonl(documents))
        tokenizer = save_tokenizer(tmp_path / str(num_words), num_words, eos_token="</s>")
        settings = replace(SETTINGS, source=str(path))
        blocks = prepare(settings, tokenizer, tmp_path / "cache").split("train")
        np.testing.assert_array_equal(blocks, blocks_by_hand(documents, "train", settings))
        return blocks.dtype

    assert prepared_dtype(2**16 - 2) == np.uint16  # the largest id is 65535
    assert prepared_dtype(2**16 - 1) == np.uint32


def test_the_default_cache_follows_the_environment(
    tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "root"))
    prepared = prepare(replace(SETTINGS, source=str(corpus)), tokenizer)
    assert prepared.folder.parent == tmp_path / "root" / "data"
    with pytest.raises(ValueError, match="no split 'dev': choose one of train, search, validat"):
        prepared.split("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ""}, "data.source is empty: give a file"),
        ({"source": "absent.jsonl"}, "absent.jsonl does not exist: give a file, a folder or"),
        ({"source": "a/b/c"}, "a/b/c does not exist"),
        ({"source": "/nowhere"}, "/nowhere does not exist"),
        ({"validation_fraction": 0.0}, "data.validation_fraction is 0.0: give a number between 0"),
        ({"search_fraction": 1.0}, "data.search_fraction is 1.0: give a number between 0 and 1"),
        (
            {"search_fraction": 0.5, "validation_fraction": 0.5, "test_fraction": 0.1},
            "add up to 1.1, which leaves nothing to train on: make their sum less than 1",
        ),
        ({"max_tokens": -1}, "data.max_tokens is -1: give 0 for all, or more"),
        ({"mixture": (MixtureSource("a.jsonl", 1.0),)}, "names others: remove one of them"),
        ({"block_length": 7}, "data.block_length is 7 tokens: give at least 8"),
        ({"text_column": "body"}, "has no column 'body': set data.text_column to one of text"),
    ],
)
def test_settings_out_of_range_are_told(
    change: dict[str, object], message: str, corpus: Path
) -> None:
    settings = replace(replace(SETTINGS, source=str(corpus)), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_source(settings)


def test_a_split_without_a_block_is_told(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(corpus), block_length=2048)
    message = (
        r"the search split got \d+ tokens, less than one block of 2048: give more text, a larger "
        r"data.search_fraction or a smaller data.block_length"
    )
    with pytest.raises(ValueError, match=message):
        prepare(settings, tokenizer, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"units", ".locks"}


def test_tokenizers_without_an_end_or_a_file_are_told(tmp_path: Path, corpus: Path) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    endless = save_tokenizer(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"endless has no end-of-sequence token .*: set eos_token"):
        prepare(settings, endless, tmp_path / "cache")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer loads from .*nothing \(.*\): give a check"):
        prepare(settings, tmp_path / "nothing", tmp_path / "cache")
