"""What was read of each unit of a corpus, which is a file or a shard, and what was passed over.

What was read of a unit is kept in the cache and only ever grows, so that a killed run goes on, a
larger budget reads on, and a corpus in which one file has changed reads that file alone. A corpus
takes the first batches of a unit, as many as it needs, however many others have read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt

from headstart.text.corpus import Corpus
from headstart.text.local import kinds_of, some_of
from headstart.text.settings import SPLITS, SplitName

Counts = Mapping[SplitName, Mapping[str, int]]
"""Of each split: documents, text_bytes and tokens."""


def no_counts() -> dict[SplitName, dict[str, int]]:
    """Of every split, none."""
    return {name: {"documents": 0, "text_bytes": 0, "tokens": 0} for name in SPLITS}


def add_counts(counts: Mapping[SplitName, dict[str, int]], more: Counts) -> None:
    """Add to every count in place."""
    for name, of_split in counts.items():
        for key in of_split:
            of_split[key] += more[name][key]


@dataclass(frozen=True)
class Batch:
    """What some rows of a unit came to.

    Attributes:
        rows: how many were read.
        counts: of what went into each split.
        corrupt_lines: passed over.
        first_corrupt: file, line and reason of the first of them, or empty.
        rows_without_column: passed over too.
        first_without_column: file and row of the first of them, or empty.
    """

    rows: int
    counts: Counts
    corrupt_lines: int = 0
    first_corrupt: str = ""
    rows_without_column: int = 0
    first_without_column: str = ""

    @property
    def tokens(self) -> int:
        """Of all splits."""
        return sum(count["tokens"] for count in self.counts.values())


@dataclass
class Taken:
    """What a corpus takes of a unit, its first batches together.

    Attributes:
        counts: of what goes into each split.
        num_batches: how many they are.
        is_whole: whether the unit holds no more, or no more that can be read.
        fault: why a file of a folder was not read to its end, or empty.

    All others are as in `Batch`.
    """

    counts: dict[SplitName, dict[str, int]] = field(default_factory=no_counts)
    num_batches: int = 0
    is_whole: bool = False
    fault: str = ""
    corrupt_lines: int = 0
    first_corrupt: str = ""
    rows_without_column: int = 0
    first_without_column: str = ""

    def add(self, batch: Batch) -> None:
        add_counts(self.counts, batch.counts)
        self.num_batches += 1
        self.corrupt_lines += batch.corrupt_lines
        self.first_corrupt = self.first_corrupt or batch.first_corrupt
        self.rows_without_column += batch.rows_without_column
        self.first_without_column = self.first_without_column or batch.first_without_column


@dataclass
class UnitLog:
    """How far a unit was read. Of its batches no more is in memory than their sums.

    Attributes:
        folder: has tokens.bin, each batch's tokens split by split, and batches.jsonl.
        dtype: of the tokens.
        num_batches: that were read.
        num_rows: in all of them.
        num_tokens: in all splits.
        last_tokens: of the last batch.
        log_bytes: of the batches' lines in batches.jsonl.
        has_column: whether any row had the column of text.
        fault: why reading ended, empty if the unit did; None while there may be more.
    """

    folder: Path
    dtype: np.dtype[Any]
    num_batches: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    last_tokens: int = 0
    log_bytes: int = 0
    has_column: bool = False
    fault: str | None = None

    def read(self) -> UnitLog:
        """Itself, with the sums of what the folder holds; what a kill or another process has left
        half written is not read."""
        for entry, num_bytes in self._entries():
            if isinstance(entry, str):
                self.fault = entry
            else:
                self.count(entry, num_bytes)
        return self

    def _entries(self) -> Iterator[tuple[Batch | str, int]]:
        """Every batch with the length of its line; at the end the fault, if there is one."""
        num_tokens = 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            num_kept = (self.folder / "tokens.bin").stat().st_size // self.dtype.itemsize
            with (self.folder / "batches.jsonl").open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        return
                    entry = json.loads(line)
                    if "fault" in entry:
                        yield entry["fault"], 0
                        return
                    batch = Batch(**entry)
                    num_tokens += batch.tokens
                    if num_tokens > num_kept:
                        return
                    yield batch, len(line)

    def count(self, batch: Batch, num_bytes: int) -> None:
        """Add a batch whose line has so many bytes."""
        self.num_batches += 1
        self.num_rows += batch.rows
        self.num_tokens += batch.tokens
        self.last_tokens = batch.tokens
        self.log_bytes += num_bytes
        self.has_column |= batch.rows > batch.rows_without_column + batch.corrupt_lines

    def is_enough(self, num_tokens: float) -> bool:
        """Whether there are so many tokens, or no more."""
        return self.num_tokens >= num_tokens or self.fault is not None

    def taken(self, num_tokens: float) -> Taken:
        """The first batches, until they have so many tokens or are all that were read."""
        taken, found = Taken(), 0
        for entry, _ in self._entries():
            if found >= num_tokens:
                return taken
            if isinstance(entry, str):
                taken.is_whole, taken.fault = True, entry
                return taken
            taken.add(entry)
            found += entry.tokens
        return taken

    @contextmanager
    def appended(self) -> Iterator[UnitWriter]:
        """Open both files behind what was read; one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / "tokens.bin").open("ab") as tokens,
            (self.folder / "batches.jsonl").open("ab") as log,
        ):
            log.truncate(self.log_bytes)
            tokens.truncate(self.num_tokens * self.dtype.itemsize)
            yield UnitWriter(self, tokens, log)

    def tokens_of(self, split: SplitName, num_batches: int) -> Iterator[UInt[np.ndarray, " _"]]:
        """The token ids of a split in the first batches, each memory-mapped."""
        tokens, place = None, 0
        for entry, _ in islice(self._entries(), num_batches):
            assert isinstance(entry, Batch)
            if tokens is None and entry.tokens:  # an empty file cannot be mapped
                tokens = np.memmap(self.folder / "tokens.bin", self.dtype, mode="r")
            for name in SPLITS:
                count = entry.counts[name]["tokens"]
                if name == split and tokens is not None:
                    yield tokens[place : place + count]
                place += count


@dataclass(frozen=True)
class UnitWriter:
    """Adds to a log, in memory and on disk."""

    log: UnitLog
    tokens_file: BinaryIO
    log_file: BinaryIO

    def add(self, batch: Batch, tokens: Mapping[SplitName, Iterable[np.ndarray]]) -> None:
        """A batch with the token ids of its documents."""
        for name in SPLITS:
            self.tokens_file.write(b"".join(piece.tobytes() for piece in tokens[name]))
        self.tokens_file.flush()  # first, since what the log says is believed
        self.log.count(batch, self._write(asdict(batch)))

    def end(self, fault: str) -> None:
        """The unit holds no more, or no more that can be read."""
        self.log.fault = fault
        self._write({"fault": fault})

    def _write(self, entry: dict[str, Any]) -> int:
        line = json.dumps(entry).encode() + b"\n"
        self.log_file.write(line)
        self.log_file.flush()
        return len(line)


def total_counts(taken: Iterable[Taken]) -> dict[SplitName, dict[str, int]]:
    """Of all that was taken of some units."""
    totals = no_counts()
    for of_unit in taken:
        add_counts(totals, of_unit.counts)
    return totals


@dataclass(frozen=True)
class PassedOver:
    """What of a corpus was not read.

    Attributes:
        files: that were read, by kinds; empty if the corpus is no folder.
        files_not_needed: how many others there are.
        left_out: name -> reason of files that were not read at all.
        faults: name -> reason of files that were not read to their end.
        corrupt_lines: how many there were.
        first_corrupt: file, line and reason of the first of them.
        rows_without_column: how many there were.
        first_without_column: file and row of the first of them.
    """

    files: str
    files_not_needed: int
    left_out: dict[str, str]
    faults: dict[str, str]
    corrupt_lines: int
    first_corrupt: str
    rows_without_column: int
    first_without_column: str

    @staticmethod
    def of(corpus: Corpus, taken: Mapping[int, Taken]) -> PassedOver:
        """By what was taken of the units that were needed."""
        folder, units = corpus.folder, taken.values()
        read = [corpus.files[unit] for unit in taken] if folder else []
        faults = {unit: of_unit.fault for unit, of_unit in taken.items() if of_unit.fault}
        return PassedOver(
            files=f"{len(read):,} ({kinds_of(read)})" if folder else "",
            files_not_needed=len(corpus.files) - len(read) if folder else 0,
            left_out=dict(corpus.left_out),
            faults={
                str(corpus.files[unit].relative_to(folder)): fault for unit, fault in faults.items()
            }
            if folder
            else {},
            corrupt_lines=sum(unit.corrupt_lines for unit in units),
            first_corrupt=_first(unit.first_corrupt for unit in units),
            rows_without_column=sum(unit.rows_without_column for unit in units),
            first_without_column=_first(unit.first_without_column for unit in units),
        )

    def sentences(self, text_column: str) -> list[str]:
        """What a user should know, one matter each."""
        found = []
        if self.files:
            sentence = f"files that were read: {self.files}"
            if self.files_not_needed:
                sentence += f"; not needed: {self.files_not_needed:,}"
            if self.left_out:
                named = some_of(f"{name} ({reason})" for name, reason in self.left_out.items())
                sentence += f"; left out: {len(self.left_out):,}, {named}"
            found.append(sentence)
        if self.faults:
            found.append(
                f"files that were not read to their end: {len(self.faults):,}, "
                f"{some_of(self.faults.values())}; data.strict makes that an error"
            )
        if self.corrupt_lines:
            found.append(
                f"passed over {self.corrupt_lines:,} corrupt lines, the first in "
                f"{self.first_corrupt}; data.strict makes them an error"
            )
        if self.rows_without_column:
            found.append(
                f"passed over {self.rows_without_column:,} rows without a column "
                f"{text_column!r}, the first in {self.first_without_column}"
            )
        return found


def _first(texts: Iterable[str]) -> str:
    return next(filter(None, texts), "")
