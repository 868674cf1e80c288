"""One look for every long stage: a progress bar with rate and time left, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from headstart.system.distributed import is_main

# What a user named is text, whatever brackets and colons it has.
console = Console(stderr=True, markup=False, emoji=False)
"""Where progress and notes go."""
output = Console(markup=False, emoji=False)
"""Where results go."""


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str, table_column: Column) -> None:
        super().__init__(table_column)
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"– {self.unit}/s")


class _CountColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total}")


@contextmanager
def progress(description: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar while the body runs; only the main process shows one.

    Args:
        description: the stage in a few words.
        total: how many units there are; None where nobody knows.
        unit: plural name of what is counted, for the rate.

    Yields:
        A function `advance(amount=1, note=None)`; a note is shown after the bar.
    """
    whole = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", table_column=whole, markup=False),
        BarColumn(bar_width=10),
        _CountColumn(table_column=whole),
        _RateColumn(unit, table_column=whole),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn(
            "{task.fields[note]}",
            table_column=Column(no_wrap=True, overflow="ellipsis"),
            markup=False,
        ),
    )
    with Progress(
        *columns, console=console, speed_estimate_period=60, disable=not is_main()
    ) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: float = 1, note: str | None = None) -> None:
            bar.advance(task, amount)
            if note is not None:
                bar.update(task, note=note)

        yield advance
