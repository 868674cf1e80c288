"""Text in, token blocks out: read, split, tokenise and pack a corpus once.

A corpus is read as a stream, so memory stays constant and nothing is copied into the datasets
cache. What is written is one flat binary file per split and a manifest that says what went in.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headstart.demo import DEMO
from headstart.system.distributed import entered_by_main, from_main
from headstart.system.errors import UserError
from headstart.system.files import cache_root, finished_folder, remove_abandoned, write_json
from headstart.system.hashing import hash_files, hash_json
from headstart.system.hub import HubName
from headstart.system.locks import locked
from headstart.system.memo import LOCKS
from headstart.system.progress import console
from headstart.text.blocks import TokenBlocks, finished_blocks, token_dtype
from headstart.text.corpus import (
    Corpus,
    find_corpus,
    first_line,
    inputs_of,
    texts_of,
    units_of,
)
from headstart.text.local import is_plain_text
from headstart.text.mixture import mixed_order
from headstart.text.needs import Needed
from headstart.text.settings import FRACTIONS, SPLITS, DataSettings, SplitName
from headstart.text.tokenise import UNIT_SETTINGS, Tokenisation
from headstart.text.units import PassedOver, Taken, total_counts

LAYOUT_VERSION = 6
"""Raise it when the same inputs give other bytes."""
RELEVANT = (*UNIT_SETTINGS, "block_length", "max_tokens")
"""The settings that decide the bytes. Where the same content lies is not among them."""
BLOCKS_PER_CHECK = 4096
MIN_BLOCK_LENGTH = 8


def check_source(settings: DataSettings) -> None:
    """Find a user's mistakes in what `prepare` will be given, in seconds, before any model loads.

    Raises:
        UserError: A setting is out of range, the source does not exist, holds no readable file or
            an empty one, or its first document does not read. A dataset at a commit is read by
            `prepare`, which may find its text in the cache.
    """
    for part in parts_of(settings):
        _check_settings(part)
        if part.source != DEMO and not _is_pinned(part):  # the demo's is downloaded later
            _check_text(find_corpus(part.source), part)


def prepare(
    settings: DataSettings,
    tokenizer: str | Path,
    cache_folder: Path | None = None,
    needed: Needed | None = None,
) -> TokenBlocks:
    """Tokenise a corpus into blocks of equal length, or find that done already.

    Every document is followed by the tokenizer's end-of-sequence token and belongs to one split,
    chosen by a hash of its text, so copies of a document land together and a document keeps its
    place when others come or go. The documents of a split are joined in the order they are read
    and cut into blocks; the ragged tail is dropped. If the tokenizer puts a token before every
    text, documents begin with it, and so do blocks.

    Every process that torchrun has started must call it; they share the work. A call after a
    killed one goes on.

    Args:
        settings: What to read and how to cut it.
        tokenizer: Checkpoint folder or hub id whose tokenizer is used.
        cache_folder: Where prepared corpora are kept, and what was read of each file;
            `cache_root() / "data"` when None.
        needed: How much of the text a run needs, which is read from all over it; everything when
            None. `settings.max_tokens` goes before it.

    Raises:
        UserError: As `check_source`; or a file is corrupt, the tokenizer does not load or has no
            end-of-sequence token, or a split gets no whole block.
    """
    cache_folder = cache_folder or cache_root() / "data"
    from_main(lambda: remove_abandoned(cache_folder))
    loaded = load_tokenizer(tokenizer)
    weights = [part.weight for part in settings.mixture] or [1.0]
    parts = []
    for part, weight in zip(parts_of(settings), weights, strict=True):
        share = weight / sum(weights)
        of_part = needed and needed.share(share, settings.block_length + 1)
        parts.append(_prepare_one(part, loaded, cache_folder, of_part))
    blocks = parts[0]
    if settings.mixture:
        blocks = _mixed(parts, weights, cache_folder, None if settings.max_tokens else needed)
    return replace(blocks, separate_documents=settings.separate_documents)


def check_vocabulary(blocks: TokenBlocks, num_rows: int) -> None:
    """Find out whether a model has an embedding for every token of a text.

    Tokenizers may have more entries than their model has rows, as long as no text uses them.

    Args:
        blocks: The text.
        num_rows: Of the model's embedding, its config's `vocab_size`.

    Raises:
        UserError: The text has a token beyond the last row.
    """
    if blocks.manifest["vocabulary"] <= num_rows:
        return
    for name in SPLITS:
        num_blocks = blocks.manifest["splits"][name]["blocks"]
        for start in range(0, num_blocks, BLOCKS_PER_CHECK):
            largest = int(np.max(blocks.split(name)[start : start + BLOCKS_PER_CHECK]))
            if largest >= num_rows:
                raise UserError(
                    f"the text has the token {largest}, and the model embeds {num_rows}: its "
                    f"tokenizer has {blocks.manifest['vocabulary']} entries, so give the model "
                    "those rows (resize_token_embeddings) or another tokenizer"
                )


def parts_of(settings: DataSettings) -> list[DataSettings]:
    """The settings of each corpus on its own."""
    if not settings.mixture:
        return [settings]
    if settings.source:
        raise UserError(
            f"data.source is {settings.source} and data.mixture names others: remove one of them"
        )
    columns = [part.text_column or settings.text_column for part in settings.mixture]
    return [
        replace(settings, source=part.source, text_column=column, mixture=())
        for part, column in zip(settings.mixture, columns, strict=True)
    ]


def _prepare_one(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    cache_folder: Path,
    needed: Needed | None,
) -> TokenBlocks:
    if settings.max_tokens:
        needed = Needed({"train": settings.max_tokens})
    corpus, inputs = from_main(lambda: _identified(settings))
    relevant = {key: getattr(settings, key) for key in RELEVANT}
    of_tokenizer = _tokenizer_hash(tokenizer)
    sought = [LAYOUT_VERSION, inputs, of_tokenizer, relevant, asdict(needed) if needed else None]
    folder = cache_folder / hash_json(sought)
    with _one_run_at_a_time(folder):
        if finished := from_main(lambda: finished_blocks(folder)):
            return finished
        if _is_pinned(settings):
            from_main(lambda: _check_text(corpus, settings))
        vocabulary = max(tokenizer.get_vocab().values()) + 1
        tokenisation = Tokenisation(
            corpus=corpus,
            cache_folder=cache_folder,
            settings=settings,
            tokenizer=tokenizer,
            tokenizer_hash=of_tokenizer,
            dtype=token_dtype(vocabulary),
            inputs=inputs,
            begin=first_token(tokenizer),
            needed=needed,
        )
        taken = tokenisation.read()
        manifest = {
            "settings": relevant | {"source": settings.source},
            "inputs": inputs,
            "tokenizer": of_tokenizer,
            "vocabulary": vocabulary,
            "end_token": int(tokenizer.eos_token_id),
            "dtype": tokenisation.dtype.name,
        }
        return from_main(lambda: _joined(tokenisation, taken, folder, manifest))


def _joined(
    tokenisation: Tokenisation, taken: Mapping[int, Taken], folder: Path, manifest: dict[str, Any]
) -> TokenBlocks:
    """Put the tokens that were read one after another, in whole blocks, with a manifest.

    The text is known by its tokens, so that it is the same wherever and however often it was read.
    """
    settings, corpus = tokenisation.settings, tokenisation.corpus
    splits = total_counts(taken.values())
    passed_over = PassedOver.of(corpus, taken)
    if passed_over.faults and not any(count["documents"] for count in splits.values()):
        raise UserError(next(iter(passed_over.faults.values())))
    shutil.rmtree(folder, ignore_errors=True)  # if its files were cut short
    with finished_folder(folder) as unfinished:
        for name, count in splits.items():
            with (unfinished / f"{name}.bin").open("wb") as whole:
                for tokens in tokenisation.tokens(name, taken):
                    whole.write(tokens.tobytes())
                count["packed_tokens"] = whole.tell() // tokenisation.dtype.itemsize
        _count_blocks(splits, settings, any(map(is_plain_text, corpus.files)))
        files = [unfinished / f"{name}.bin" for name in splits]
        for file, count in zip(files, splits.values(), strict=True):
            os.truncate(file, count["blocks"] * settings.block_length * tokenisation.dtype.itemsize)
        content = [settings.block_length, manifest["dtype"], manifest["end_token"]]
        fingerprint = hash_json([LAYOUT_VERSION, content, hash_files(files)])
        manifest = {
            "fingerprint": fingerprint, **manifest, "splits": splits, **asdict(passed_over),
        }  # fmt: skip
        write_json(unfinished / "manifest.json", manifest)
    for sentence in passed_over.sentences(settings.text_column):
        console.print(sentence, highlight=False)
    return TokenBlocks(folder, manifest)


def _identified(settings: DataSettings) -> tuple[Corpus, list[dict[str, Any]]]:
    """The corpus of some settings, and what identifies its content."""
    _check_settings(settings)
    corpus = find_corpus(settings.source)
    if not _is_pinned(settings):
        _check_text(corpus, settings)
    return corpus, inputs_of(corpus)


@contextmanager
def _one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the processes of this run go in together."""

    def wait(owner: str) -> None:
        console.print(f"{owner} prepares the same text; waiting for it")

    with entered_by_main(lambda: locked(folder.parent / LOCKS / folder.name, on_busy=wait)):
        yield


def _count_blocks(
    counts: dict[SplitName, dict[str, int]], settings: DataSettings, is_plain: bool
) -> None:
    """Add the whole blocks of each split, or say which has none though it has a share."""
    if settings.max_tokens:
        for key in ("tokens", "packed_tokens"):
            counts["train"][key] = min(counts["train"][key], settings.max_tokens)
    for name, count in counts.items():
        count["blocks"] = count["packed_tokens"] // settings.block_length
        if count["blocks"] == 0 and (name == "test" or not settings.is_test_only):
            mend = "" if name == "train" else f", a larger data.{name}_fraction"
            if is_plain and not settings.document_separator:
                mend += ", data.document_separator (a .txt file is one document without it)"
            raise UserError(
                f"the {name} split got {count['tokens']} tokens, less than one block of "
                f"{settings.block_length}: give more text{mend} or a smaller data.block_length"
            )


def _mixed(
    parts: list[TokenBlocks], weights: list[float], cache_folder: Path, needed: Needed | None
) -> TokenBlocks:
    """The mixture of prepared corpora: their order on disk, and counts by their shares.

    Training takes no more than is needed: some corpora were read beyond their share, and the others
    would be repeated to match.
    """
    mixed = [
        {"folder": part.folder.name, "fingerprint": part.fingerprint, "weight": weight}
        for part, weight in zip(parts, weights, strict=True)
    ]
    most = None
    if needed is not None:
        num_tokens = sum(
            needed.share(weight / sum(weights)).train_tokens(part.manifest["splits"]["train"])
            for part, weight in zip(parts, weights, strict=True)
        )
        most = math.ceil(num_tokens / parts[0].manifest["settings"]["block_length"])
    folder = cache_folder / hash_json([LAYOUT_VERSION, mixed, most])
    contents = [[part["fingerprint"], part["weight"]] for part in mixed]
    first = parts[0].manifest
    orders, splits = {}, {}
    for name in SPLITS:
        counts = [part.manifest["splits"][name] for part in parts]
        blocks = [count["blocks"] for count in counts]
        is_trained = name == "train"
        orders[name] = mixed_order(blocks, weights, is_trained, most if is_trained else None)
        read = np.bincount(orders[name][:, 0], minlength=len(parts)) / blocks
        splits[name] = {
            key: round(sum(share * count[key] for share, count in zip(read, counts, strict=True)))
            for key in counts[0]
        }
        if not len(orders[name]):
            raise UserError(
                f"the {name} split of the mixture has no block: give its smallest corpus more text"
            )
    manifest = {
        "fingerprint": hash_json([LAYOUT_VERSION, contents, most]),
        "settings": first["settings"],
        "parts": mixed,
        **{key: first[key] for key in ("tokenizer", "vocabulary", "end_token", "dtype")},
        "splits": splits,
    }

    def write() -> None:
        if folder.is_dir():
            return
        with finished_folder(folder) as unfinished:
            for name, order in orders.items():
                np.save(unfinished / f"{name}.npy", order.astype(np.int32))
            write_json(unfinished / "manifest.json", manifest)

    from_main(write)
    return TokenBlocks(folder, manifest)


def _check_settings(settings: DataSettings) -> None:
    for name, fraction in settings.fractions.items():
        if not 0 < fraction < 1 and not settings.is_test_only:
            raise UserError(f"data.{name} is {fraction}: give a number between 0 and 1")
    held_out = sum(settings.fractions.values())
    if held_out >= 1 and not settings.is_test_only:
        raise UserError(
            f"data.{', data.'.join(FRACTIONS)} add up to {held_out:g}, which leaves nothing to "
            "train on: make their sum less than 1"
        )
    if settings.block_length < MIN_BLOCK_LENGTH:
        raise UserError(
            f"data.block_length is {settings.block_length} tokens: give at least {MIN_BLOCK_LENGTH}"
        )
    if settings.max_tokens < 0:
        raise UserError(f"data.max_tokens is {settings.max_tokens}: give 0 for all, or more")


def _is_pinned(settings: DataSettings) -> bool:
    """Whether the source is a dataset on the hub at a commit, whose prepared text needs no hub."""
    name = HubName.parse(settings.source)
    return name is not None and name.is_pinned and not Path(settings.source).expanduser().exists()


def _check_text(corpus: Corpus, settings: DataSettings) -> None:
    """Find out whether there is any text in a corpus.

    Raises:
        UserError: There is none, or the first document does not read.
    """
    column, separator = settings.text_column, settings.document_separator
    corrupt, faults = list[str](), list[UserError]()
    on_corrupt = None if settings.strict else corrupt.append
    for unit in range(units_of(corpus)):
        texts = texts_of(corpus, unit, column, separator, on_corrupt=on_corrupt)
        try:
            if any(texts):
                return
        except UserError as error:
            if settings.strict or corpus.folder is None:
                raise
            faults.append(error)
    if faults:
        raise faults[0]
    reason = "every document is empty"
    if corrupt:
        reason = f"{len(corrupt):,} lines are corrupt, the first in {corrupt[0]}"
    raise UserError(f"{settings.source} holds no text: {reason}")


def load_tokenizer(tokenizer: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer that can end documents; a UserError if there is none."""
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(tokenizer))
    except Exception as error:  # tokenizers raises bare Exceptions, others KeyErrors
        raise UserError(
            f"no tokenizer loads from {tokenizer} ({type(error).__name__}: {first_line(error)}): "
            "give a checkpoint folder or a hub id that has one"
        ) from error
    if loaded.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer} has no end-of-sequence token to put between documents: "
            "set eos_token in its tokenizer_config.json"
        )
    return loaded


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a tokenizer puts before every text, as its model was trained; or none."""
    token_ids = tokenizer.encode("a")
    begin: int | None = tokenizer.bos_token_id
    return begin if begin is not None and token_ids[:1] == [begin] else None


def tokenizer_hash(tokenizer: str | Path) -> str:
    """What the manifest of prepared text says of its tokenizer; errors as in `prepare`."""
    return _tokenizer_hash(load_tokenizer(tokenizer))


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that decides the tokens, wherever the tokenizer was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hash_json([type(tokenizer).__name__, tokenizer.eos_token_id, rules])
