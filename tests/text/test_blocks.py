"""Blocks as a dataset: their token ids, labels, and positions in documents."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.text.documents import DOCUMENTS, EOS, SETTINGS, as_jsonl

from headstart.text.blocks import BlockDataset, TokenBlocks
from headstart.text.prepare import prepare
from headstart.text.settings import MixtureSource, SplitName


def test_block_dataset_gives_int64_ids_and_equal_labels(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    blocks = prepare(replace(SETTINGS, source=str(corpus)), tokenizer, tmp_path / "cache").split(
        "train"
    )
    dataset = BlockDataset(blocks)
    assert len(dataset) == len(blocks)
    assert dataset[5]["input_ids"].dtype == torch.int64
    assert torch.equal(dataset[5]["input_ids"], dataset[5]["labels"])
    assert dataset[5]["input_ids"].tolist() == blocks[5].tolist()
    order = np.array([7, 2, 2, 0])
    ordered = BlockDataset(blocks, order)
    (batch,) = torch.utils.data.DataLoader(ordered, batch_size=len(ordered))
    assert batch["labels"].tolist() == [blocks[place].tolist() for place in order]


def test_documents_are_apart_where_that_is_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_jsonl(DOCUMENTS))
    settings = replace(SETTINGS, source=str(tmp_path / "a.jsonl"), separate_documents=True)
    blocks = prepare(settings, tokenizer, tmp_path / "cache")
    joined = prepare(replace(settings, separate_documents=False), tokenizer, tmp_path / "cache")
    assert blocks.folder == joined.folder
    assert blocks.fingerprint != joined.fingerprint
    assert joined.separator is None
    dataset = BlockDataset(blocks.split("train"), separator=blocks.separator)
    for item in dataset:
        position = 0
        for token, found in zip(item["input_ids"], item["position_ids"], strict=True):
            assert found == position
            position = 0 if token == EOS else position + 1


@pytest.fixture
def three_files(tmp_path: Path, tokenizer: Path) -> TokenBlocks:
    """Of as many domains: each has words of its own, so that a block tells where it is from."""
    folder = tmp_path / "sorted"
    folder.mkdir()
    for domain in range(3):
        rng = random.Random(domain)
        texts = [
            " ".join(f"w{100 * domain + rng.randrange(100)}" for _ in range(40)) for _ in range(100)
        ]
        (folder / f"{domain}.jsonl").write_text(as_jsonl(texts))
    return prepare(replace(SETTINGS, source=str(folder)), tokenizer, tmp_path / "cache")


def domains_of(blocks: np.ndarray) -> list[int]:
    return [int(np.median(block) - 2) // 100 for block in blocks]


@pytest.mark.parametrize("split", ["train", "search", "validation"])
def test_a_few_tokens_come_from_every_file(three_files: TokenBlocks, split: SplitName) -> None:
    chosen = three_files.spread(split, 48 * SETTINGS.block_length)
    assert chosen.shape == (48, SETTINGS.block_length)
    shares = np.bincount(domains_of(three_files.split(split)[:])) / len(three_files.split(split))
    for beginning in (6, 12, 24, 48):  # such as the rungs of a race
        counts = np.bincount(domains_of(chosen[:beginning]), minlength=3)
        assert counts.min() > 0
        assert np.abs(counts - beginning * shares).max() < 2
    assert domains_of(three_files.split(split)[:24]) == [0] * 24  # which the first would be


def test_spread_gives_every_block_at_most_once(three_files: TokenBlocks) -> None:
    array = three_files.split("search")
    whole = three_files.spread("search", 10 * array.size)
    assert sorted(map(bytes, whole)) == sorted(map(bytes, np.array(array)))
    rows = [row for _, row in three_files.spread("search", array.size // 3).order]
    gaps = np.diff(sorted(rows))
    assert gaps.min() >= 2
    assert gaps.max() <= 4
    few = three_files.spread("search", 3 * SETTINGS.block_length - 5)
    assert [row for _, row in few.order] == [0, 2 * len(array) // 3, len(array) // 3]
    assert three_files.spread("search", 0).shape == (0, SETTINGS.block_length)
    tokens = three_files.sample("search", array.size // 3)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.from_numpy(np.array(array)[rows].astype(np.int64)))


def test_a_mixture_is_spread_as_well(tmp_path: Path, tokenizer: Path, corpus: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(as_jsonl([f"w{299 - n} w5 w6" for n in range(300)]))
    mixture = (MixtureSource(str(corpus), 1.0), MixtureSource(str(other), 1.0))
    blocks = prepare(replace(SETTINGS, mixture=mixture), tokenizer, tmp_path / "cache")
    split = np.array(list(blocks.split("validation")))
    chosen = blocks.spread("validation", split.size // 2)
    assert np.array_equal(chosen[:], split[chosen.order[:, 1]])
