"""Text in, token blocks out: read, split, tokenise and pack a corpus once.

A corpus is read as a stream, so memory stays constant and nothing is copied into the datasets
cache. What is written is one flat binary file per split and a manifest that says what went in.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headstart.assets import cache_root, finished_folder
from headstart.corpus import Corpus, find_corpus, first_line, inputs_of, texts_of, units_of
from headstart.data import SPLITS, DataSettings, TokenBlocks, finished_blocks, split_of
from headstart.distributed import barrier, is_main
from headstart.files import write_json
from headstart.mixture import mixed_order
from headstart.progress import console
from headstart.tokenise import Tokenisation, remove_parts, tokenise

LAYOUT_VERSION = 2  # part of the fingerprint: raise it when the same inputs give other bytes
BLOCKS_PER_CHECK = 4096
MIN_BLOCK_LENGTH = 8


def check_source(settings: DataSettings) -> None:
    """Find a user's mistakes in seconds, before any model loads.

    Args:
        settings: What `prepare` will be given.

    Raises:
        ValueError: A setting is out of range, the source does not exist, holds no readable file or
            an empty one, or its first document does not read.
    """
    for part in _parts(settings):
        _checked_corpus(part)


def prepare(
    settings: DataSettings, tokenizer: str | Path, cache_folder: Path | None = None
) -> TokenBlocks:
    """Tokenise a corpus into blocks of equal length, or find that done already.

    Every document is followed by the tokenizer's end-of-sequence token and belongs to one split,
    chosen by a hash of its text, so copies of a document land together and a document keeps its
    place when others come or go. The documents of a split are joined in the order they are read
    and cut into blocks; the ragged tail is dropped.

    Every process that torchrun has started must call it; they share the work. A call after a
    killed one goes on.

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
    cache_folder = cache_folder or cache_root() / "data"
    loaded = _load_tokenizer(tokenizer)
    parts = [_prepare_one(part, loaded, cache_folder) for part in _parts(settings)]
    blocks = parts[0]
    if settings.mixture:
        blocks = _mixed(parts, [part.weight for part in settings.mixture], cache_folder)
    return replace(blocks, separate_documents=settings.separate_documents)


def check_vocabulary(blocks: TokenBlocks, num_rows: int) -> None:
    """Find out whether a model has an embedding for every token of a text.

    Tokenizers may have more entries than their model has rows, as long as no text uses them.

    Args:
        blocks: The text.
        num_rows: Of the model's embedding, its config's `vocab_size`.

    Raises:
        ValueError: The text has a token beyond the last row.
    """
    if blocks.manifest["vocabulary"] <= num_rows:
        return
    for name in SPLITS:
        num_blocks = blocks.manifest["splits"][name]["blocks"]
        for start in range(0, num_blocks, BLOCKS_PER_CHECK):
            largest = int(np.max(blocks.split(name)[start : start + BLOCKS_PER_CHECK]))
            if largest >= num_rows:
                raise ValueError(
                    f"the text has the token {largest}, and the model embeds {num_rows}: its "
                    f"tokenizer has {blocks.manifest['vocabulary']} entries, so give the model "
                    "those rows (resize_token_embeddings) or another tokenizer"
                )


def _parts(settings: DataSettings) -> list[DataSettings]:
    """The settings of each corpus on its own."""
    if not settings.mixture:
        return [settings]
    if settings.source:
        raise ValueError(
            f"data.source is {settings.source} and data.mixture names others: remove one of them"
        )
    return [
        replace(
            settings,
            source=part.source,
            text_column=part.text_column or settings.text_column,
            mixture=(),
        )
        for part in settings.mixture
    ]


def _prepare_one(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, cache_folder: Path
) -> TokenBlocks:
    corpus = _checked_corpus(settings)
    inputs = inputs_of(corpus)
    tokenizer_hash = _tokenizer_hash(tokenizer)
    # Where the same content lies does not change the blocks; what it holds does.
    own = asdict(replace(settings, source=""))
    relevant = {key: own[key] for key in own if key not in ("mixture", "separate_documents")}
    identity = [LAYOUT_VERSION, inputs, tokenizer_hash, relevant]
    fingerprint = _short_hash(json.dumps(identity, sort_keys=True))
    folder = cache_folder / fingerprint
    unfinished = folder.with_name(f"{fingerprint}.unfinished")
    with _one_run_at_a_time(unfinished):
        if finished := finished_blocks(folder):
            return finished
        vocabulary = max(tokenizer.get_vocab().values()) + 1
        dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        work = Tokenisation(
            encode=lambda texts: _encode(tokenizer, texts),
            end_token=int(tokenizer.eos_token_id),
            split_of=lambda text: split_of(text, settings),
            splits=SPLITS,
            dtype=dtype,
            text_column=settings.text_column,
            strict=settings.strict,
            max_tokens=settings.max_tokens,
        )
        try:
            counts = tokenise(corpus, work, unfinished)
            _count_blocks(counts["splits"], settings)
        except ValueError:
            if is_main():  # nothing that goes on from here would end otherwise
                shutil.rmtree(unfinished)
            raise
        manifest = {
            "fingerprint": fingerprint,
            "settings": relevant | {"source": settings.source},
            "inputs": inputs,
            "tokenizer": tokenizer_hash,
            "vocabulary": vocabulary,
            "end_token": work.end_token,
            "dtype": dtype.name,
            **counts,
        }
        if is_main():
            for name, count in counts["splits"].items():
                num_bytes = count["blocks"] * settings.block_length * dtype.itemsize
                os.truncate(unfinished / f"{name}.bin", num_bytes)
            write_json(unfinished / "manifest.json", manifest)
            remove_parts(unfinished)
            shutil.rmtree(folder, ignore_errors=True)  # if its files were cut short
            unfinished.rename(folder)
        barrier()
    return TokenBlocks(folder, manifest)


@contextmanager
def _one_run_at_a_time(unfinished: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the processes of this run go in together."""
    if not is_main():
        barrier()
        yield
        return
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = FileLock(unfinished / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("another run prepares the same text; waiting for it")
        lock.acquire()
    try:
        barrier()
        yield
    finally:
        lock.release()
        (unfinished / "lock").unlink(missing_ok=True)
        (unfinished.with_suffix("") / "lock").unlink(missing_ok=True)
        if unfinished.is_dir() and not any(unfinished.iterdir()):
            unfinished.rmdir()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning for a text longer than the model's context
    )["input_ids"]
    return encoded


def _count_blocks(counts: dict[str, dict[str, int]], settings: DataSettings) -> None:
    """Add the whole blocks of each split, or say which has none though it has a share."""
    if settings.max_tokens:
        counts["train"]["tokens"] = min(counts["train"]["tokens"], settings.max_tokens)
    for name, count in counts.items():
        count["blocks"] = count["tokens"] // settings.block_length
        if count["blocks"] == 0 and (name == "validation" or not settings.is_validation_only):
            mend = "" if name == "train" else f", a larger data.{name}_fraction"
            raise ValueError(
                f"the {name} split got {count['tokens']} tokens, less than one block of "
                f"{settings.block_length}: give more text{mend} or a smaller data.block_length"
            )


def _mixed(parts: list[TokenBlocks], weights: list[float], cache_folder: Path) -> TokenBlocks:
    """The mixture of prepared corpora: their order on disk, and counts by their shares."""
    mixed = [
        {"fingerprint": part.manifest["fingerprint"], "weight": weight}
        for part, weight in zip(parts, weights, strict=True)
    ]
    fingerprint = _short_hash(json.dumps([LAYOUT_VERSION, mixed]))
    folder = cache_folder / fingerprint
    first = parts[0].manifest
    orders, splits = {}, {}
    for name in SPLITS:
        counts = [part.manifest["splits"][name] for part in parts]
        blocks = [count["blocks"] for count in counts]
        orders[name] = mixed_order(blocks, weights, repeats=name == "train")
        read = np.bincount(orders[name][:, 0], minlength=len(parts)) / blocks
        splits[name] = {
            key: round(sum(share * count[key] for share, count in zip(read, counts, strict=True)))
            for key in counts[0]
        }
        if not len(orders[name]):
            raise ValueError(
                f"the {name} split of the mixture has no block: give its smallest corpus more text"
            )
    manifest = {
        "fingerprint": fingerprint,
        "settings": first["settings"],
        "parts": mixed,
        "tokenizer": first["tokenizer"],
        "vocabulary": first["vocabulary"],
        "end_token": first["end_token"],
        "dtype": first["dtype"],
        "splits": splits,
    }
    if is_main() and not folder.is_dir():
        with finished_folder(folder) as unfinished:
            for name, order in orders.items():
                np.save(unfinished / f"{name}.npy", order.astype(np.int32))
            write_json(unfinished / "manifest.json", manifest)
    barrier()
    return TokenBlocks(folder, manifest)


def _checked_corpus(settings: DataSettings) -> Corpus:
    for name in ("validation_fraction", "search_fraction"):
        fraction = getattr(settings, name)
        if not 0 < fraction < 1 and not settings.is_validation_only:
            raise ValueError(f"data.{name} is {fraction}: give a number between 0 and 1")
    held_out = settings.validation_fraction + settings.search_fraction
    if held_out >= 1 and not settings.is_validation_only:
        raise ValueError(
            f"data.validation_fraction and data.search_fraction add up to {held_out:g}, which "
            "leaves nothing to train on: make their sum less than 1"
        )
    if settings.block_length < MIN_BLOCK_LENGTH:
        raise ValueError(
            f"data.block_length is {settings.block_length} tokens: give at least {MIN_BLOCK_LENGTH}"
        )
    corpus = find_corpus(settings.source)
    if settings.max_tokens < 0:
        raise ValueError(f"data.max_tokens is {settings.max_tokens}: give 0 for all, or more")
    on_corrupt = None if settings.strict else (lambda line: None)
    column = settings.text_column
    units = (texts_of(corpus, unit, column, 0, on_corrupt) for unit in range(units_of(corpus)))
    if not any(text for texts in units for text in texts):
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


def tokenizer_hash(tokenizer: str | Path) -> str:
    """What the manifest of prepared text says of its tokenizer; errors as in `prepare`."""
    return _tokenizer_hash(_load_tokenizer(tokenizer))


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that decides the tokens, wherever the tokenizer was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _short_hash(f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {rules}")


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
