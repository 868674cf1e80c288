"""Documents in, one flat file of token ids per split out: in constant memory, on all cores, and
going on where a killed process stopped.

The corpus falls into units, which are its files or the shards of a dataset on the hub. Process r of
w takes units r, r + w, r + 2w and so on; the tokenizer's own threads share the texts of one. The
tokens of all units are joined in the corpus' order, so any number of processes writes the same
bytes.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from headstart.system.distributed import barrier, from_main, is_main, rank, world_size
from headstart.system.files import write_json
from headstart.system.progress import console, progress
from headstart.text.corpus import Corpus, count_rows, texts_of, units_of

BATCH_CHARACTERS = 1 << 20
BATCH_ROWS = 4096
BATCHES_PER_RECORD = 16
"""How often a unit's state is recorded, after which a killed process goes on."""

Counts = dict[str, dict[str, int]]
"""Of each split: documents, text_bytes and tokens."""
Encode = Callable[[list[str]], list[list[int]]]
"""Texts to the token ids of each."""


@dataclass
class UnitState:
    """How far one unit has come; what lies in its files beyond these counts is not yet counted.

    Attributes:
        rows: Read so far.
        is_done: Whether those were all.
        counts: What went into each split.
        corrupt_lines: Passed over.
        first_corrupt: File, line and reason of the first of them, or empty.
    """

    counts: Counts
    rows: int = 0
    is_done: bool = False
    corrupt_lines: int = 0
    first_corrupt: str = ""


@dataclass(frozen=True)
class Tokenisation:
    """What to do with each document.

    Attributes:
        encode: The tokenizer.
        end_token: Its end-of-sequence token, put after every document.
        split_of: The split that a text belongs to.
        splits: All of them.
        dtype: Of the token ids on disk.
        text_column: The column that holds the text.
        strict: Whether a corrupt line is an error.
        max_tokens: Of the first split, after which reading stops; 0 for no such end.
    """

    encode: Encode
    end_token: int
    split_of: Callable[[str], str]
    splits: tuple[str, ...]
    dtype: np.dtype[Any]
    text_column: str = "text"
    strict: bool = False
    max_tokens: int = 0


def tokenise(corpus: Corpus, work: Tokenisation, folder: Path) -> dict[str, Any]:
    """Write SPLIT.bin of every split into a folder, going on with what lies there.

    Every process must call it; those of torchrun share the units.

    Args:
        corpus: What to read.
        work: What to do with each document.
        folder: To write into; the same call goes on there.

    Returns:
        "splits", the counts; "corrupt_lines", and "first_corrupt" of them.

    Raises:
        UserError: As `texts_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_units = units_of(corpus)
    mine = range(rank(), num_units, world_size())
    with progress("tokenise", count_rows(corpus, mine), "documents") as advance:
        for unit, state in _needed(folder, num_units, work):
            if unit in mine:
                _tokenise_unit(corpus, unit, state, work, folder, advance)
    barrier()
    states = from_main(lambda: _joined(num_units, work, folder))
    corrupt = [state for state in states if state.corrupt_lines]
    if corrupt and is_main():
        console.print(
            f"passed over {sum(state.corrupt_lines for state in corrupt):,} corrupt lines, the "
            f"first in {corrupt[0].first_corrupt}; data.strict makes them an error",
            markup=False,
        )
    return {
        "splits": {name: _summed(states, name) for name in work.splits},
        "corrupt_lines": sum(state.corrupt_lines for state in corrupt),
        "first_corrupt": corrupt[0].first_corrupt if corrupt else "",
    }


def _tokenise_unit(
    corpus: Corpus,
    unit: int,
    state: UnitState,
    work: Tokenisation,
    folder: Path,
    advance: Callable[..., None],
) -> None:
    if state.is_done:
        advance(state.rows)
        return
    advance(state.rows, "resumed" if state.rows else None)

    def on_corrupt(line: str) -> None:
        pending_corrupt.append(line)

    pending_corrupt: list[str] = []
    texts = texts_of(
        corpus, unit, work.text_column, state.rows, None if work.strict else on_corrupt
    )
    itemsize = work.dtype.itemsize
    with ExitStack() as stack:
        files = {}
        for name in work.splits:
            path = _unit_file(folder, unit, name)
            path.touch()
            files[name] = stack.enter_context(path.open("r+b"))
            files[name].truncate(state.counts[name]["tokens"] * itemsize)
            files[name].seek(0, 2)
        # While one batch is in the tokenizer's threads, the next one is read.
        encoder = stack.enter_context(ThreadPoolExecutor(1))
        waiting: deque[tuple[int, list[str], list[str], Future[list[list[int]]]]] = deque()

        def finish() -> None:
            num_rows, corrupt, batch, encoded = waiting.popleft()
            _write(batch, encoded.result(), work, files, state.counts)
            state.rows += num_rows
            state.corrupt_lines += len(corrupt)
            state.first_corrupt = state.first_corrupt or (corrupt[0] if corrupt else "")
            advance(num_rows)

        for number, (num_rows, batch) in enumerate(_batches(texts), 1):
            waiting.append(
                (num_rows, pending_corrupt.copy(), batch, encoder.submit(work.encode, batch))
            )
            pending_corrupt.clear()
            if len(waiting) > 1:
                finish()
            if number % BATCHES_PER_RECORD == 0:
                _record(state, folder, unit, files)
            if work.max_tokens and state.counts[work.splits[0]]["tokens"] >= work.max_tokens:
                break
        while waiting:
            finish()
        state.is_done = True
        _record(state, folder, unit, files)


def _batches(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Rows read and the documents among them, of about `BATCH_CHARACTERS` together."""
    batch, num_rows, num_characters = list[str](), 0, 0
    for text in texts:
        num_rows += 1
        if text:
            batch.append(text)
            num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS or num_rows == BATCH_ROWS:
            yield num_rows, batch
            batch, num_rows, num_characters = [], 0, 0
    if num_rows:
        yield num_rows, batch


def _write(
    batch: list[str],
    encoded: list[list[int]],
    work: Tokenisation,
    files: dict[str, Any],
    counts: Counts,
) -> None:
    tokens: dict[str, list[list[int]]] = {name: [] for name in work.splits}
    end = [work.end_token]
    for text, token_ids in zip(batch, encoded, strict=True):
        name = work.split_of(text)
        tokens[name] += (token_ids, end)
        count = counts[name]
        count["documents"] += 1
        count["text_bytes"] += len(text.encode())
        count["tokens"] += len(token_ids) + 1
    for name, pieces in tokens.items():
        files[name].write(np.array(list(chain.from_iterable(pieces)), work.dtype).tobytes())


def _record(state: UnitState, folder: Path, unit: int, files: dict[str, Any]) -> None:
    for file in files.values():
        file.flush()
    write_json(_unit_file(folder, unit, "json"), vars(state))


def _unit_file(folder: Path, unit: int, kind: str) -> Path:
    return folder / (f"unit-{unit:05d}.{kind}" + ("" if kind == "json" else ".part"))


def _state(folder: Path, unit: int, work: Tokenisation) -> UnitState:
    try:
        return UnitState(**json.loads(_unit_file(folder, unit, "json").read_text()))
    except FileNotFoundError:
        return UnitState({n: {"documents": 0, "text_bytes": 0, "tokens": 0} for n in work.splits})


def _needed(folder: Path, num_units: int, work: Tokenisation) -> Iterator[tuple[int, UnitState]]:
    """The units, in order, with their states as they are now, until finished ones before them hold
    `max_tokens` already."""
    tokens, all_done = 0, True
    for unit in range(num_units):
        if work.max_tokens and all_done and tokens >= work.max_tokens:
            return
        state = _state(folder, unit, work)
        yield unit, state
        tokens += state.counts[work.splits[0]]["tokens"]
        all_done = all_done and state.is_done


def _summed(states: list[UnitState], name: str) -> dict[str, int]:
    keys = states[0].counts[name]
    return {key: sum(state.counts[name][key] for state in states) for key in keys}


def _joined(num_units: int, work: Tokenisation, folder: Path) -> list[UnitState]:
    """Put the units' tokens one after another. The parts stay, for a kill in between.

    Returns:
        The states of the units that were needed.
    """
    states = [state for _, state in _needed(folder, num_units, work)]
    for name in work.splits:
        with (folder / f"{name}.bin").open("wb") as whole:
            for unit, state in enumerate(states):
                assert state.is_done
                with _unit_file(folder, unit, name).open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
    return states


def remove_parts(folder: Path) -> None:
    """Delete the units' files, which nothing needs once the whole is kept."""
    # A record without its tokens would be believed; tokens without a record are not.
    for kind in ("json", "part"):
        for path in folder.glob(f"unit-*.{kind}"):
            path.unlink()
