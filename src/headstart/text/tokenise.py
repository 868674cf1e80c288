"""Documents in, one flat file of token ids per split out: in constant memory, on all cores, and
going on where a killed process stopped.

The corpus falls into units, which are its files or the shards of a dataset on the hub. Process r of
w takes units r, r + w, r + 2w and so on; the tokenizer's own threads share the texts of one. The
tokens of all units are joined in the corpus' order, so any number of processes writes the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from headstart.system.distributed import barrier, from_main, is_main, rank, world_size
from headstart.system.files import write_json
from headstart.system.progress import console, progress
from headstart.text.corpus import Corpus, count_rows, texts_of, units_of
from headstart.text.settings import SPLITS, DataSettings, SplitName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 20
BATCH_ROWS = 4096
BATCHES_PER_RECORD = 16
"""How often a unit's state is recorded, after which a killed process goes on."""

NO_COUNTS = {"documents": 0, "text_bytes": 0, "tokens": 0}
HELD_OUT: tuple[SplitName, ...] = ("validation", "search", "test")
Counts = dict[str, dict[str, int]]
"""Of each split, what `NO_COUNTS` has."""


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
    """A corpus on its way into SPLIT.bin of every split.

    Attributes:
        corpus: What to read.
        folder: To write into; the same work goes on there.
        settings: Which split a document belongs to, and where reading stops.
        tokenizer: Its end-of-sequence token is put after every document.
        dtype: Of the token ids on disk.
    """

    corpus: Corpus
    folder: Path
    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    dtype: np.dtype[Any]

    def run(self) -> dict[str, Any]:
        """Write the files, going on with what lies in the folder.

        Every process must call it; those of torchrun share the units.

        Returns:
            "splits", the counts; "corrupt_lines", and "first_corrupt" of them.

        Raises:
            UserError: As `texts_of`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        num_units = units_of(self.corpus)
        mine = range(rank(), num_units, world_size())
        with progress("tokenise", count_rows(self.corpus, mine), "documents") as advance:
            for unit, state in self._needed(num_units):
                if unit in mine:
                    self._tokenise_unit(unit, state, advance)
        barrier()
        states = from_main(lambda: self._joined(num_units))
        corrupt_lines = sum(state.corrupt_lines for state in states)
        first_corrupt = next((state.first_corrupt for state in states if state.corrupt_lines), "")
        if corrupt_lines and is_main():
            console.print(
                f"passed over {corrupt_lines:,} corrupt lines, the first in {first_corrupt}; "
                "data.strict makes them an error",
                markup=False,
            )
        splits = {
            name: {key: sum(state.counts[name][key] for state in states) for key in NO_COUNTS}
            for name in SPLITS
        }
        return {"splits": splits, "corrupt_lines": corrupt_lines, "first_corrupt": first_corrupt}

    def _tokenise_unit(self, unit: int, state: UnitState, advance: Callable[..., None]) -> None:
        if state.is_done:
            advance(state.rows)
            return
        advance(state.rows, "resumed" if state.rows else None)
        corrupt_lines: list[str] = []  # since the last batch
        on_corrupt = None if self.settings.strict else corrupt_lines.append
        column, separator = self.settings.text_column, self.settings.document_separator
        texts = texts_of(self.corpus, unit, column, separator, state.rows, on_corrupt)
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for name in SPLITS:
                path = self._unit_file(unit, name)
                path.touch()
                files[name] = stack.enter_context(path.open("r+b"))
                files[name].truncate(state.counts[name]["tokens"] * self.dtype.itemsize)
                files[name].seek(0, 2)
            # While one batch is in the tokenizer's threads, the next one is read.
            encoder = stack.enter_context(ThreadPoolExecutor(1))
            waiting: deque[tuple[int, list[str], list[str], Future[list[list[int]]]]] = deque()

            def finish() -> None:
                num_rows, corrupt, batch, encoded = waiting.popleft()
                self._write(batch, encoded.result(), files, state.counts)
                state.rows += num_rows
                state.corrupt_lines += len(corrupt)
                state.first_corrupt = state.first_corrupt or (corrupt[0] if corrupt else "")
                advance(num_rows)

            def record() -> None:
                for file in files.values():
                    file.flush()
                write_json(self._unit_file(unit, "json"), vars(state))

            for number, (num_rows, batch) in enumerate(_batches(texts), 1):
                encoded = encoder.submit(self._encode, batch)
                waiting.append((num_rows, corrupt_lines.copy(), batch, encoded))
                corrupt_lines.clear()
                if len(waiting) > 1:
                    finish()
                if number % BATCHES_PER_RECORD == 0:
                    record()
                if self._is_enough(state.counts["train"]["tokens"]):
                    break
            while waiting:
                finish()
            state.is_done = True
            record()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning for a text longer than the model's context
        )["input_ids"]
        return encoded

    def _write(
        self, batch: list[str], encoded: list[list[int]], files: dict[str, BinaryIO], counts: Counts
    ) -> None:
        tokens: dict[str, list[list[int]]] = {name: [] for name in SPLITS}
        end = [int(self.tokenizer.eos_token_id)]
        for text, token_ids in zip(batch, encoded, strict=True):
            name = split_of(text, self.settings)
            tokens[name] += (token_ids, end)
            count = counts[name]
            count["documents"] += 1
            count["text_bytes"] += len(text.encode())
            count["tokens"] += len(token_ids) + 1
        for split, pieces in tokens.items():
            files[split].write(np.array(list(chain.from_iterable(pieces)), self.dtype).tobytes())

    def _is_enough(self, train_tokens: int) -> bool:
        return 0 < self.settings.max_tokens <= train_tokens

    def _unit_file(self, unit: int, kind: str) -> Path:
        return self.folder / (f"unit-{unit:05d}.{kind}" + ("" if kind == "json" else ".part"))

    def _state(self, unit: int) -> UnitState:
        try:
            return UnitState(**json.loads(self._unit_file(unit, "json").read_text()))
        except FileNotFoundError:
            return UnitState({name: NO_COUNTS.copy() for name in SPLITS})

    def _needed(self, num_units: int) -> Iterator[tuple[int, UnitState]]:
        """The units, in order, with their states as they are now, until finished ones before them
        hold `max_tokens` already."""
        tokens, all_done = 0, True
        for unit in range(num_units):
            if all_done and self._is_enough(tokens):
                return
            state = self._state(unit)
            yield unit, state
            tokens += state.counts["train"]["tokens"]
            all_done = all_done and state.is_done

    def _joined(self, num_units: int) -> list[UnitState]:
        """Put the units' tokens one after another. The parts stay, for a kill in between.

        Returns:
            The states of the units that were needed.
        """
        states = [state for _, state in self._needed(num_units)]
        for name in SPLITS:
            with (self.folder / f"{name}.bin").open("wb") as whole:
                for unit, state in enumerate(states):
                    assert state.is_done
                    with self._unit_file(unit, name).open("rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
        return states


def split_of(text: str, settings: DataSettings) -> SplitName:
    """The split a document belongs to by the settings' fractions and seed, whatever else there is.

    A hash of its text decides.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(settings.seed).encode())
    place = int.from_bytes(digest.digest(), "big") / 2**64
    for name in HELD_OUT:
        place -= getattr(settings, f"{name}_fraction")
        if place < 0:
            return name
    return "train"


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


def remove_parts(folder: Path) -> None:
    """Delete the units' files, which nothing needs once the whole is kept."""
    # A record without its tokens would be believed; tokens without a record are not.
    for kind in ("json", "part"):
        for path in folder.glob(f"unit-*.{kind}"):
            path.unlink()
