"""Blocks as a dataset: their token ids, labels, and positions in documents."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.text.documents import DOCUMENTS, EOS, SETTINGS, as_jsonl

from headstart.text.blocks import BlockDataset
from headstart.text.prepare import prepare


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
    assert len(BlockDataset(blocks, 4)) == 4
    batch = next(iter(torch.utils.data.DataLoader(BlockDataset(blocks, 4), batch_size=4)))
    assert batch["labels"].shape == (4, SETTINGS.block_length)
    with pytest.raises(ValueError, match=f"num_blocks is 100000 but the split holds {len(blocks)}"):
        BlockDataset(blocks, 100_000)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockDataset(blocks, 0)


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
