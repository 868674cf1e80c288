"""How far each unit of a corpus has come, and what was passed over on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headstart.text.corpus import Corpus
from headstart.text.local import kinds_of, some_of

NO_COUNTS = {"documents": 0, "text_bytes": 0, "tokens": 0}
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
        rows_without_column: Passed over too.
        first_without_column: File and row of the first of them, or empty.
        fault: Why a file of a folder was not read to its end, or empty.
    """

    counts: Counts
    rows: int = 0
    is_done: bool = False
    corrupt_lines: int = 0
    first_corrupt: str = ""
    rows_without_column: int = 0
    first_without_column: str = ""
    fault: str = ""

    def pass_over(self, corrupt: list[str], without_column: list[str]) -> None:
        """Count rows that hold no text, by what was said of each, and forget what was said."""
        self.corrupt_lines += len(corrupt)
        self.first_corrupt = self.first_corrupt or next(iter(corrupt), "")
        self.rows_without_column += len(without_column)
        self.first_without_column = self.first_without_column or next(iter(without_column), "")


@dataclass(frozen=True)
class PassedOver:
    """What of a corpus was not read.

    Attributes:
        files: That were read, by kinds; empty if the corpus is no folder.
        files_not_needed: How many others held more than was asked for.
        left_out: Name -> reason of files that were not read at all.
        faults: Name -> reason of files that were not read to their end.
        corrupt_lines: How many there were.
        first_corrupt: File, line and reason of the first of them.
        rows_without_column: How many there were.
        first_without_column: File and row of the first of them.
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
    def of(corpus: Corpus, states: Sequence[UnitState]) -> PassedOver:
        """By the states of the units that were needed."""
        read, folder = corpus.files[: len(states)], corpus.folder
        names = [str(file.relative_to(folder)) for file in read] if folder else []
        return PassedOver(
            files=f"{len(read):,} ({kinds_of(read)})" if folder else "",
            files_not_needed=len(corpus.files) - len(read),
            left_out=dict(corpus.left_out),
            faults={
                name: state.fault for name, state in zip(names, states, strict=False) if state.fault
            },
            corrupt_lines=sum(state.corrupt_lines for state in states),
            first_corrupt=_first(state.first_corrupt for state in states),
            rows_without_column=sum(state.rows_without_column for state in states),
            first_without_column=_first(state.first_without_column for state in states),
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
