"""Trims a teacher's vocabulary on its own, and shows what each size would cost and give."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headstart.evaluation.scores import BLOCKS_PER_BATCH, bits_per_byte
from headstart.losses.next_token import mean_loss
from headstart.model.checkpoint import Checkpoint
from headstart.model.trim import write_trimmed, write_trimmed_tokenizer
from headstart.runs.vocabulary import (
    check_trims,
    counted_text,
    needed_rows,
    rows_to_keep,
    samples_of,
    token_counts,
)
from headstart.system.device import default_device, load_frozen
from headstart.system.errors import UserError
from headstart.system.files import finished_folder, refuse_taken, write_json
from headstart.system.memo import remembered
from headstart.system.progress import progress
from headstart.text.prepare import check_source, load_tokenizer, tokenizer_hash
from headstart.text.settings import DataSettings, VocabularySettings

VERSION = 1
"""Of what the memo keeps; raise it when an equal key would give other figures."""
LEAST_ROWS = 4096
"""The smallest size that is measured, beside the whole."""
EVALUATED_CHARACTERS = 40_000
"""Of the test split, on which the table's losses are measured."""


def trim(
    teacher: str | Path, settings: VocabularySettings, data: DataSettings, out_folder: Path
) -> Path:
    """Write a model with a smaller vocabulary, as an ordinary Hugging Face folder.

    Args:
        teacher: a folder or a hub id.
        settings: how many rows are left, and which in any case.
        data: the text whose tokens are counted.
        out_folder: must not exist yet.

    Raises:
        UserError: the folder exists, the text or the model does not read, or the vocabulary cannot
            be trimmed so.
    """
    refuse_taken(out_folder)
    if not settings.size:
        raise UserError("a trimmed vocabulary needs a size; give --vocabulary a number above 0")
    check_source(data)
    checkpoint = Checkpoint.open_whole(teacher)
    check_trims(checkpoint, settings)
    counts = token_counts(checkpoint, data, settings.sample_characters)
    kept = rows_to_keep(checkpoint, settings, counts)
    with finished_folder(out_folder) as folder:
        write_trimmed(checkpoint, kept, folder)
    return out_folder


def vocabulary_sizes(
    checkpoint: Checkpoint, settings: VocabularySettings, data: DataSettings
) -> list[dict[str, Any]]:
    """What a teacher would be with the whole vocabulary, with half of it, and so on; remembered.

    Args:
        checkpoint: the teacher's, with its whole vocabulary.
        settings: of the trimming; its size plays no part.
        data: the text, in whose training split tokens are counted.

    Returns:
        For each size "rows", "bytes_per_token" and "bits_per_byte" of the untrained teacher on
        documents of the test split.

    Raises:
        UserError: the text does not read, or the vocabulary cannot be trimmed.
    """
    checkpoint.architecture.check_context(data.block_length)
    least = len(needed_rows(checkpoint, settings))
    sizes = list(_halved(checkpoint.architecture.config.vocab_size, max(least, LEAST_ROWS)))
    key = {
        "teacher": checkpoint.hash,
        "tokenizer": tokenizer_hash(checkpoint.folder),
        "settings": asdict(replace(settings, size=0)),
        "text": counted_text(data),
        "block_length": data.block_length,
        "sizes": sizes,
    }

    def make(folder: Path) -> None:
        write_json(folder / "sizes.json", _measured(checkpoint, settings, data, sizes))

    def read(folder: Path) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((folder / "sizes.json").read_text())
        return found

    return remembered("vocabulary-sizes", VERSION, key, make, read)


def _measured(
    checkpoint: Checkpoint, settings: VocabularySettings, data: DataSettings, sizes: list[int]
) -> list[dict[str, Any]]:
    counts = token_counts(checkpoint, data, settings.sample_characters)
    texts = samples_of(data, EVALUATED_CHARACTERS, "test")
    model = load_frozen(checkpoint.folder, default_device())
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    whole = [module.weight.detach() for module in (embedding, output)]
    embedding.padding_idx = None  # which may lie beyond the rows that are left
    num_bytes, found = sum(len(text.encode()) for text in texts), []
    with progress("sizes", len(sizes), "sizes") as advance, tempfile.TemporaryDirectory() as place:
        for size in sizes:
            kept = rows_to_keep(checkpoint, replace(settings, size=size), counts)
            folder = Path(place) / str(size)
            folder.mkdir()
            write_trimmed_tokenizer(checkpoint, kept, folder)
            rows = torch.tensor(kept, device=model.device)
            for module, weight in zip((embedding, output), whole, strict=True):
                module.weight = torch.nn.Parameter(weight[rows], requires_grad=False)
            tokens = _tokens(texts, folder)
            num_blocks = len(tokens) // data.block_length
            blocks = tokens[: num_blocks * data.block_length].view(num_blocks, -1)
            loss = mean_loss(model, blocks, BLOCKS_PER_BATCH)
            found.append(
                {
                    "rows": size,
                    "bytes_per_token": num_bytes / len(tokens),
                    "bits_per_byte": bits_per_byte(loss, num_bytes / len(tokens)),
                }
            )
            advance(1)
    return found


def _halved(rows: int, least: int) -> Iterator[int]:
    """A number of rows, and its halves down to the least."""
    yield rows
    while (rows := rows // 2) >= least:
        yield rows


def _tokens(texts: Sequence[str], tokenizer_folder: Path) -> Int[Tensor, " tokens"]:
    """The texts one after another, each with the token that ends it."""
    tokenizer = load_tokenizer(tokenizer_folder)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([id for ids in encoded for id in (*ids, tokenizer.eos_token_id)])
