"""How the scores of models on a text and in tasks are written, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.system.formats import NOTHING

Scores = Mapping[str, Any]
"""Of one model, as docs/evaluate.md has them: of a text, and "tasks"."""
FORMS = {
    "parameters": "{:,}",
    "loss": "{:.4f}",
    "perplexity": "{:,.4g}",
    "bits_per_byte": "{:.4f}",
    "tokens": "{:,}",
}
"""How each score of a text is written."""


def scores_table(models: Mapping[str, Scores]) -> Table:
    """A table with a column for each model, and a row for each score that any of them has."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    cells = [scores_cells(scores) for scores in models.values()]
    for row in dict.fromkeys(row for column in cells for row in column):
        table.add_row(row, *(column.get(row, NOTHING) for column in cells))
    return table


def scores_cells(scores: Scores) -> dict[str, str]:
    """Row -> text. Shares of right answers stand with their binomial standard error."""
    cells = {row: form.format(scores[row]) for row, form in FORMS.items() if row in scores}
    for task, values in scores.get("tasks", {}).items():
        for metric, value in values.items():
            if metric == "items":
                continue
            error = math.sqrt(max(0.0, value * (1 - value)) / values["items"])
            is_share = metric.startswith("acc") or metric == "exact_match"
            cells[f"{task} {metric}"] = f"{value:.3f}" + (f" ± {error:.3f}" if is_share else "")
    return cells
