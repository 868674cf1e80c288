"""What was read of each unit of a corpus, which is a file or a shard, and what was passed over.

What was read of a unit is kept in the cache and only ever grows, so that a killed run goes on, a
larger budget reads on, and a corpus in which one file has changed reads that file alone. A corpus
takes the first batches of a unit, as many as it needs, however many others have read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt

from headstart.text.corpus import Corpus
from headstart.text.local import kinds_of, some_of
from headstart.text.settings import SPLITS, SplitName

NO_COUNTS = {"documents": 0, "text_bytes": 0, "tokens": 0}
Counts = Mapping[SplitName, Mapping[str, int]]
"""Of each split, what `NO_COUNTS` has."""


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


@dataclass(frozen=True)
class Taken:
    """What a corpus takes of a unit.

    Attributes:
        batches: the unit's first ones.
        is_whole: whether it holds no more, or no more that can be read.
        fault: why a file of a folder was not read to its end, or empty.
    """

    batches: Sequence[Batch]
    is_whole: bool = False
    fault: str = ""


@dataclass
class UnitLog:
    """What was read of a unit so far.

    Attributes:
        folder: has tokens.bin, each batch's tokens split by split, and batches.jsonl.
        dtype: of the tokens.
        batches: in the order of rows.
        num_tokens: of all of them, in all splits.
        fault: why reading ended, empty if the unit did; None while there may be more.
    """

    folder: Path
    dtype: np.dtype[Any]
    batches: list[Batch] = field(default_factory=list)
    num_tokens: int = 0
    fault: str | None = None

    @staticmethod
    def read(folder: Path, dtype: np.dtype[Any]) -> UnitLog:
        """What a folder holds; what a kill or another process has left half written is not read."""
        log = UnitLog(folder, dtype)
        with suppress(OSError, ValueError, KeyError, TypeError):
            num_kept = (folder / "tokens.bin").stat().st_size // dtype.itemsize
            for line in (folder / "batches.jsonl").read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                if "fault" in entry:
                    log.fault = entry["fault"]
                    break
                batch = Batch(**entry)
                if log.num_tokens + batch.tokens > num_kept:
                    break
                log.add(batch)
        return log

    @property
    def num_rows(self) -> int:
        return sum(batch.rows for batch in self.batches)

    def add(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.num_tokens += batch.tokens

    def is_enough(self, num_tokens: float) -> bool:
        """Whether there are so many tokens, or no more."""
        return self.num_tokens >= num_tokens or self.fault is not None

    def taken(self, num_tokens: float) -> Taken | None:
        """The first batches, until they have so many tokens or are all that the unit holds; None
        if more have to be read."""
        if not self.is_enough(num_tokens):
            return None
        found, batches = 0, list[Batch]()
        for batch in self.batches:
            if found >= num_tokens:
                return Taken(batches)
            batches.append(batch)
            found += batch.tokens
        return Taken(batches) if found >= num_tokens else Taken(batches, True, self.fault or "")

    @contextmanager
    def appended(self) -> Iterator[UnitWriter]:
        """Open both files behind what was read; one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        num_bytes = self.num_tokens * self.dtype.itemsize
        lines = b"".join(_line(asdict(batch)) for batch in self.batches)
        with (
            (self.folder / "tokens.bin").open("ab") as tokens,
            (self.folder / "batches.jsonl").open("ab") as log,
        ):
            log.truncate(len(lines))
            tokens.truncate(num_bytes)
            yield UnitWriter(self, tokens, log)

    def tokens_of(self, split: SplitName, num_batches: int) -> Iterator[UInt[np.ndarray, " _"]]:
        """The token ids of a split in the first batches, each memory-mapped."""
        if not self.num_tokens:  # an empty file cannot be mapped
            return
        whole = np.memmap(self.folder / "tokens.bin", self.dtype, mode="r")
        place = 0
        for batch in self.batches[:num_batches]:
            for name in SPLITS:
                count = batch.counts[name]["tokens"]
                if name == split:
                    yield whole[place : place + count]
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
        self.log.add(batch)
        self._write(asdict(batch))

    def end(self, fault: str) -> None:
        """The unit holds no more, or no more that can be read."""
        self.log.fault = fault
        self._write({"fault": fault})

    def _write(self, entry: dict[str, Any]) -> None:
        self.log_file.write(_line(entry))
        self.log_file.flush()


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def total_counts(taken: Iterable[Taken]) -> dict[SplitName, dict[str, int]]:
    """Of all that was taken of some units."""
    totals: dict[SplitName, dict[str, int]] = {name: NO_COUNTS.copy() for name in SPLITS}
    for batch in (batch for of_unit in taken for batch in of_unit.batches):
        for name, total in totals.items():
            for key in total:
                total[key] += batch.counts[name][key]
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
        folder, batches = corpus.folder, [b for unit in taken.values() for b in unit.batches]
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
            corrupt_lines=sum(batch.corrupt_lines for batch in batches),
            first_corrupt=_first(batch.first_corrupt for batch in batches),
            rows_without_column=sum(batch.rows_without_column for batch in batches),
            first_without_column=_first(batch.first_without_column for batch in batches),
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
