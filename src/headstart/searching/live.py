"""What the user sees while a search runs: a table on standard error, one row for each generation.

Where standard error is no terminal, each finished generation is one plain line instead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from headstart.searching.journal import Evaluated
from headstart.system.distributed import is_main
from headstart.system.formats import NOTHING, count_text, duration_text
from headstart.system.progress import console as standard_error

SHOWN_GENERATIONS = 12
"""Older ones give way to an ellipsis, so that the table does not outgrow the terminal."""


@dataclass(frozen=True)
class _Generation:
    """A finished generation; `best`, `parameters` and `tokens` are of the whole search so far."""

    number: int
    candidates: int
    evaluated: int
    best: float
    median: float
    parameters: int
    tokens: int
    seconds: float


class SearchTable:
    """Shows a search while the body of its `with` runs, from what `evolve` and a `Race` tell it.

    Rates and the time left come from what is evaluated now; candidates that a search which goes on
    reads from its journal count for neither.

    Args:
        num_generations: how many there will be.
        all_tokens: on which a candidate is scored that goes through the whole race.
        console: where to write; if not given, standard error, of the main process alone.
        clock: seconds from any start.
    """

    def __init__(
        self,
        num_generations: int,
        all_tokens: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_generations, self.all_tokens, self.clock = num_generations, all_tokens, clock
        silent = Console(quiet=True, force_interactive=False)
        self.console = console or (standard_error if is_main() else silent)
        self._finished: list[_Generation] = []
        self._generation = self._candidates = self._evaluated = 0  # 0 between two generations
        self._best, self._parameters, self._tokens = math.inf, 0, 0
        self._started = clock()
        self._live = Live(console=self.console, get_renderable=self._table)

    def __enter__(self) -> SearchTable:
        if self.console.is_interactive:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def start(self, generation: int, candidates: int) -> None:
        """A generation, counted from 0, begins with so many candidates to score."""
        self._generation, self._candidates, self._evaluated = generation + 1, candidates, 0
        self._started = self.clock()

    def scored(self, score: Evaluated, tokens: int, replayed: bool) -> None:
        """A candidate has a score that took so many tokens more, or comes from the journal."""
        self._tokens += tokens
        if tokens == score.tokens and not replayed:  # its first rung
            self._evaluated += 1
        if score.tokens == self.all_tokens and score.loss < self._best:
            self._best, self._parameters = score.loss, score.parameters

    def finish(self, generation: int, scores: Sequence[Evaluated]) -> None:
        """A generation is done; these are its candidates' last scores."""
        losses = [score.loss for score in scores if math.isfinite(score.loss)]
        finished = _Generation(
            number=generation + 1,
            candidates=len(scores),
            evaluated=self._evaluated,
            best=self._best,
            median=statistics.median(losses) if losses else math.nan,
            parameters=self._parameters,
            tokens=self._tokens,
            seconds=self.clock() - self._started,
        )
        self._finished.append(finished)
        self._generation = 0
        if not self.console.is_interactive:
            number, candidates, best, median, parameters, rate, tokens = self._cells(finished)
            self.console.out(
                f"generation {number}: {candidates} candidates, best {best}, median {median}, "
                f"{parameters} parameters, {rate} candidates/s, {tokens} tokens, "
                f"ETA {self._time_left()}",
                highlight=False,
            )

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        columns = ("generation", "candidates", "best", "median", "parameters", "candidates/s")
        for column in (*columns, "tokens", "ETA"):
            table.add_column(column, justify="right", no_wrap=True)
        # The header, the ellipsis, the running generation and the prompt need a line each.
        num_shown = max(1, min(SHOWN_GENERATIONS, self.console.height - 4))
        if len(self._finished) > num_shown:
            table.add_row("…")
        for finished in self._finished[-num_shown:]:
            table.add_row(*self._cells(finished))
        if self._generation:
            table.add_row(*self._running())
        return table

    def _cells(self, finished: _Generation) -> tuple[str, ...]:
        return (
            f"{finished.number}/{self.num_generations}",
            f"{finished.candidates:,}",
            f"{finished.best:.3f}",
            f"{finished.median:.3f}",
            count_text(finished.parameters),
            _rate(finished.evaluated, finished.seconds),
            count_text(finished.tokens),
        )

    def _running(self) -> tuple[str, ...]:
        last = self._finished[-1] if self._finished else None
        # The size of a new best candidate is shown when its generation is done.
        unchanged = last is not None and last.best <= self._best
        return (
            f"{self._generation}/{self.num_generations}",
            f"{self._evaluated:,}/{self._candidates:,}",
            f"{self._best:.3f}" if math.isfinite(self._best) else NOTHING,
            NOTHING,
            count_text(self._parameters) if unchanged else NOTHING,
            _rate(self._evaluated, self.clock() - self._started),
            count_text(self._tokens),
            self._time_left(),
        )

    def _time_left(self) -> str:
        """At the pace of the generations so far, if there is one.

        Generations are counted whole, since a race drops candidates early and so the first half of
        a generation may take most of its time. One that was replayed in part is scaled up.
        """
        paced = [finished for finished in self._finished if finished.evaluated]
        elapsed = self.clock() - self._started
        if paced:
            num_candidates = sum(finished.candidates for finished in paced)
            share = sum(finished.evaluated for finished in paced) / num_candidates
            generation_seconds = sum(finished.seconds for finished in paced) / share / len(paced)
        elif self._evaluated:
            generation_seconds = elapsed * self._candidates / self._evaluated
        else:
            return NOTHING
        num_done = max(self._generation, len(self._finished))
        left_now = max(0.0, generation_seconds - elapsed) if self._generation else 0.0
        return duration_text(left_now + generation_seconds * (self.num_generations - num_done))


def _rate(evaluated: int, seconds: float) -> str:
    return f"{evaluated / seconds:,.2f}" if evaluated and seconds > 0 else NOTHING
