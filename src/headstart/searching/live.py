"""What the user sees while a search runs: a table on standard error, one row for each generation.

Where standard error is no terminal, each finished generation is one plain line instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from headstart.system.formats import NOTHING, count_text, duration_text
from headstart.system.progress import console as standard_error

SHOWN_GENERATIONS = 12
"""Older ones give way to an ellipsis, so that the table does not outgrow the terminal."""


@dataclass(frozen=True)
class GenerationRow:
    """A finished generation.

    Attributes:
        generation: its number, from 1.
        candidates: that it holds, replayed ones too.
        best: the lowest loss of the search so far.
        median: of this generation's losses.
        parameters: of the best candidate so far.
        tokens: that were read for all losses of the search so far.
        seconds: wall time that the generation took now.
    """

    generation: int
    candidates: int
    best: float
    median: float
    parameters: int
    tokens: int
    seconds: float


class SearchTable:
    """Shows a search while the body of its `with` runs.

    Rates and the time left come from what is evaluated now; candidates that a search which goes on
    reads from its journal are `advance`d by 0 and count for neither.

    Args:
        num_generations: how many there will be.
        console: where to write; standard error if not given.
        clock: seconds from any start.
    """

    def __init__(
        self,
        num_generations: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_generations = num_generations
        self.console = console or standard_error
        self.clock = clock
        self._finished: list[tuple[GenerationRow, int]] = []  # with the candidates evaluated now
        self._generation = self._candidates = 0  # of the running generation; 0 between two
        self._evaluated = self._tokens = 0
        self._best = math.inf
        self._started = clock()
        self._live = Live(console=self.console, get_renderable=self._table)

    def __enter__(self) -> SearchTable:
        if self.console.is_interactive:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def start(self, generation: int, candidates: int) -> None:
        """A generation, counted from 1, begins with so many candidates to score."""
        self._generation, self._candidates = generation, candidates
        self._evaluated = self._tokens = 0
        self._started = self.clock()

    def advance(self, candidates: int = 1, tokens: int = 0, best: float | None = None) -> None:
        """Within a generation: candidates evaluated now, tokens read, the lowest loss so far."""
        self._evaluated += candidates
        self._tokens += tokens
        if best is not None:
            self._best = min(self._best, best)

    def finish(self, row: GenerationRow) -> None:
        """The running generation is done."""
        self._finished.append((row, self._evaluated))
        self._generation = 0
        if not self.console.is_interactive:
            self.console.out(self._line(), highlight=False)

    def _line(self) -> str:
        row, evaluated = self._finished[-1]
        return (
            f"generation {row.generation}/{self.num_generations}: {row.candidates:,} candidates, "
            f"best {row.best:.3f}, median {row.median:.3f}, {count_text(row.parameters)} "
            f"parameters, {_rate(evaluated, row.seconds)} candidates/s, "
            f"{count_text(row.tokens)} tokens, ETA {self._time_left()}"
        )

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        columns = ("generation", "candidates", "best", "median", "parameters", "candidates/s")
        for column in (*columns, "tokens", "ETA"):
            table.add_column(column, justify="right", no_wrap=True)
        # The header, the ellipsis, the running generation and the prompt need a line each.
        num_shown = max(1, min(SHOWN_GENERATIONS, self.console.height - 4))
        finished = self._finished[-num_shown:]
        if len(self._finished) > num_shown:
            table.add_row("…")
        for row, evaluated in finished:
            table.add_row(
                f"{row.generation}/{self.num_generations}",
                f"{row.candidates:,}",
                f"{row.best:.3f}",
                f"{row.median:.3f}",
                count_text(row.parameters),
                _rate(evaluated, row.seconds),
                count_text(row.tokens),
            )
        if self._generation:
            table.add_row(*self._running())
        return table

    def _running(self) -> tuple[str, ...]:
        last = self._finished[-1][0] if self._finished else None
        # Until the generation ends, only its loss is known of a new best candidate.
        unchanged = last is not None and last.best <= self._best
        best = min(self._best, last.best) if last else self._best
        return (
            f"{self._generation}/{self.num_generations}",
            f"{self._evaluated:,}/{self._candidates:,}",
            f"{best:.3f}" if math.isfinite(best) else NOTHING,
            NOTHING,
            count_text(last.parameters) if last and unchanged else NOTHING,
            _rate(self._evaluated, self.clock() - self._started),
            count_text(self._tokens + (last.tokens if last else 0)),
            self._time_left(),
        )

    def _time_left(self) -> str:
        seconds = self._seconds_left()
        return NOTHING if seconds is None else duration_text(seconds)

    def _seconds_left(self) -> float | None:
        """The time left at the pace of the generations so far; None before there is a pace.

        Generations are counted whole, since a race drops candidates early and so the first half of
        a generation may take most of its time. One that was replayed in part is scaled up.
        """
        paced = [(row, evaluated) for row, evaluated in self._finished if evaluated]
        elapsed = self.clock() - self._started
        if paced:
            seconds = sum(row.seconds for row, _ in paced)
            share = sum(evaluated for _, evaluated in paced) / sum(r.candidates for r, _ in paced)
            generation_seconds = seconds / share / len(paced)
        elif self._evaluated:
            generation_seconds = elapsed * self._candidates / self._evaluated
        else:
            return None
        num_done = max(self._generation, len(self._finished))
        left_now = max(0.0, generation_seconds - elapsed) if self._generation else 0.0
        return left_now + generation_seconds * (self.num_generations - num_done)


def _rate(evaluated: int, seconds: float) -> str:
    return f"{evaluated / seconds:,.2f}" if evaluated and seconds > 0 else NOTHING
