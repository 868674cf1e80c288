"""Text in, token blocks out: read, split, tokenise and pack a corpus once, then memory-map it.

A corpus is read as a stream, so memory stays constant and nothing is copied into the datasets
cache. What is written is one flat binary file per split and a manifest that says what went in.
"""

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headstart.assets import cache_root, finished_folder
from headstart.corpus import Corpus, count_rows, find_corpus, first_line, inputs_of, texts_of

SplitName = Literal["train", "search", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "search", "validation")

LAYOUT_VERSION = 1  # part of the fingerprint: raise it when the same inputs give other bytes
BATCH_DOCUMENTS = 64
MIN_BLOCK_LENGTH = 8


@dataclass(frozen=True)
class DataSettings:
    """What to read and how to cut it.

    Attributes:
        source: A file, a folder of files, or the id of a dataset on the Hugging Face hub (its
            "train" split is read). In a .txt file a document is a run of lines up to a blank line.
        text_column: The column that holds the text; a .txt file has no columns and ignores it.
        block_length: Tokens per block.
        validation_fraction: Share of the documents that results are reported on.
        search_fraction: Share of the documents that the search measures fitness on: never
            trained on, never reported on.
        seed: Changes which documents fall into which split.
    """

    source: str = ""
    text_column: str = "text"
    block_length: int = 512
    validation_fraction: float = 0.05
    search_fraction: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class TokenBlocks:
    """A prepared corpus on disk.

    Attributes:
        folder: Holds train.bin, search.bin, validation.bin and manifest.json.
        manifest: The content of manifest.json. `manifest["splits"][name]` counts documents,
            text_bytes and tokens (both before the ragged tail was dropped) and blocks.
    """

    folder: Path
    manifest: dict[str, Any]

    def split(self, name: SplitName) -> UInt[np.memmap, "num_blocks block_length"]:
        """Memory-map one split.

        Args:
            name: "train", "search" or "validation".

        Returns:
            Token ids, read-only.

        Raises:
            ValueError: There is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"there is no split {name!r}: choose one of {', '.join(SPLITS)}")
        shape = (self.manifest["splits"][name]["blocks"], self.manifest["settings"]["block_length"])
        dtype = np.dtype(self.manifest["dtype"])
        return np.memmap(self.folder / f"{name}.bin", dtype=dtype, mode="r", shape=shape)

    def first(self, name: SplitName, num_tokens: int) -> Int[torch.Tensor, "blocks tokens"]:
        """At least so many tokens of a split as whole blocks, or all that it has."""
        array = self.split(name)
        return torch.from_numpy(array[: -(-num_tokens // array.shape[1])].astype(np.int64))


class BlockDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The blocks of one split as a torch dataset.

    Args:
        blocks: Token ids, such as `TokenBlocks.split` gives.
        num_blocks: Keep the first so many; all when None.

    Raises:
        ValueError: Fewer blocks exist than were asked for.
    """

    def __init__(
        self, blocks: UInt[np.ndarray, "num_blocks block_length"], num_blocks: int | None = None
    ) -> None:
        if num_blocks is not None and not 0 < num_blocks <= len(blocks):
            raise ValueError(
                f"num_blocks is {num_blocks} but the split holds {len(blocks)} blocks: "
                f"ask for 1 to {len(blocks)}, or give more text"
            )
        self.blocks = blocks[:num_blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One block, int64 [block_length]; labels are the ids, as the shift is the loss's job."""
        token_ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": token_ids, "labels": token_ids}


def check_source(settings: DataSettings) -> None:
    """Find a user's mistakes in seconds, before any model loads.

    Args:
        settings: What `prepare` will be given.

    Raises:
        ValueError: A setting is out of range, the source does not exist, holds no readable file or
            an empty one, or its first document does not read.
    """
    _checked_corpus(settings)


def prepare(
    settings: DataSettings, tokenizer: str | Path, cache_folder: Path | None = None
) -> TokenBlocks:
    """Tokenise a corpus into blocks of equal length, or find that done already.

    Every document is followed by the tokenizer's end-of-sequence token and belongs to one split,
    chosen by a hash of its text, so copies of a document land together and a document keeps its
    place when others come or go. The documents of a split are joined in the order they are read
    and cut into blocks; the ragged tail is dropped.

    Args:
        settings: What to read and how to cut it.
        tokenizer: Checkpoint folder or hub id whose tokenizer is used.
        cache_folder: Where prepared corpora are kept, one folder per fingerprint of the inputs'
            content, the tokenizer and the settings; `cache_root() / "data"` when None.

    Returns:
        The prepared corpus.

    Raises:
        ValueError: As `check_source`; or a file is corrupt, the tokenizer does not load or has no
            end-of-sequence token, or a split gets no whole block.
    """
    corpus = _checked_corpus(settings)
    inputs = inputs_of(corpus)
    loaded = _load_tokenizer(tokenizer)
    tokenizer_hash = _tokenizer_hash(loaded)
    # Where the same content lies does not change the blocks; what it holds does.
    relevant = {key: value for key, value in asdict(settings).items() if key != "source"}
    identity = [LAYOUT_VERSION, inputs, tokenizer_hash, relevant]
    fingerprint = _short_hash(json.dumps(identity, sort_keys=True))
    folder = (cache_folder or cache_root() / "data") / fingerprint
    if finished := _finished(folder):
        return finished
    shutil.rmtree(folder, ignore_errors=True)
    with finished_folder(folder) as unfinished:
        dtype = np.dtype(np.uint16 if max(loaded.get_vocab().values()) < 1 << 16 else np.uint32)
        manifest = {
            "fingerprint": fingerprint,
            "settings": asdict(settings),
            "inputs": inputs,
            "tokenizer": tokenizer_hash,
            "dtype": dtype.name,
            "splits": _write_splits(corpus, settings, loaded, dtype, unfinished),
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (unfinished / "manifest.json").write_text(text, encoding="utf-8")
    return TokenBlocks(folder, manifest)


def split_of(text: str, settings: DataSettings) -> SplitName:
    """The split a document belongs to, whatever else the corpus holds.

    Args:
        text: The document.
        settings: Gives the fractions and the seed.

    Returns:
        "train", "search" or "validation".
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(settings.seed).encode())
    place = int.from_bytes(digest.digest(), "big") / 2**64
    if place < settings.validation_fraction:
        return "validation"
    if place < settings.validation_fraction + settings.search_fraction:
        return "search"
    return "train"


def _checked_corpus(settings: DataSettings) -> Corpus:
    for name in ("validation_fraction", "search_fraction"):
        fraction = getattr(settings, name)
        if not 0 < fraction < 1:
            raise ValueError(f"data.{name} is {fraction}: give a number between 0 and 1")
    held_out = settings.validation_fraction + settings.search_fraction
    if held_out >= 1:
        raise ValueError(
            f"data.validation_fraction and data.search_fraction add up to {held_out:g}, which "
            "leaves nothing to train on: make their sum less than 1"
        )
    if settings.block_length < MIN_BLOCK_LENGTH:
        raise ValueError(
            f"data.block_length is {settings.block_length} tokens: give at least {MIN_BLOCK_LENGTH}"
        )
    corpus = find_corpus(settings.source)
    if next(texts_of(corpus, settings.text_column), None) is None:
        raise ValueError(f"{settings.source} holds no text: every document is empty")
    return corpus


def _load_tokenizer(tokenizer: str | Path) -> PreTrainedTokenizerBase:
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer loads from {tokenizer} ({first_line(error)}): "
            "give a checkpoint folder or a hub id that has one"
        ) from error
    if loaded.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer} has no end-of-sequence token to put between documents: "
            "set eos_token in its tokenizer_config.json"
        )
    return loaded


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that decides the tokens, wherever the tokenizer was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _short_hash(f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {rules}")


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _finished(folder: Path) -> TokenBlocks | None:
    """The prepared corpus in a folder, if its files are as long as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        item_bytes = np.dtype(manifest["dtype"]).itemsize
        block_bytes = manifest["settings"]["block_length"] * item_bytes
        for name in SPLITS:
            expected_bytes = manifest["splits"][name]["blocks"] * block_bytes
            if (folder / f"{name}.bin").stat().st_size != expected_bytes:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenBlocks(folder, manifest)


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=3600,
    )


def _write_splits(
    corpus: Corpus,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype[Any],
    folder: Path,
) -> dict[SplitName, dict[str, int]]:
    """Write <split>.bin of every split and count what went in."""
    counts = {name: {"documents": 0, "text_bytes": 0, "tokens": 0, "blocks": 0} for name in SPLITS}
    documents = texts_of(corpus, settings.text_column)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in SPLITS}
        bar = stack.enter_context(_progress_bar())
        num_rows = count_rows(corpus)
        task = bar.add_task("tokenise", total=num_rows, documents=0, rate=0.0)
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            encoded = tokenizer(
                batch,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,  # no warning for a text longer than the model's context
            )["input_ids"]
            for text, token_ids in zip(batch, encoded, strict=True):
                name = split_of(text, settings)
                count = counts[name]
                files[name].write(np.array([*token_ids, tokenizer.eos_token_id], dtype).tobytes())
                count["documents"] += 1
                count["text_bytes"] += len(text.encode())
                count["tokens"] += len(token_ids) + 1
            num_documents = sum(count["documents"] for count in counts.values())
            num_tokens = sum(count["tokens"] for count in counts.values())
            rate = num_tokens / (bar.tasks[task].elapsed or 1)
            bar.update(task, completed=num_documents, documents=num_documents, rate=rate)
        bar.update(task, completed=num_rows or 1, total=num_rows or 1)
        for name, count in counts.items():
            count["blocks"] = count["tokens"] // settings.block_length
            files[name].truncate(count["blocks"] * settings.block_length * dtype.itemsize)
    for name, count in counts.items():
        if count["blocks"] == 0:
            mend = "" if name == "train" else f", a larger data.{name}_fraction"
            raise ValueError(
                f"the {name} split got {count['tokens']} tokens, less than one block of "
                f"{settings.block_length}: give more text{mend} or a smaller data.block_length"
            )
    return counts
