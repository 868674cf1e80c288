"""What the report shows of a run's models beside losses: how they continue texts, and zero-shot
scores.

Both are made once all else is known, and are no part of what training costs. They are remembered in
headstart's cache by the hash of the weights, so a run that was killed goes on after the last model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from headstart.evaluation.continuation import (
    GenerationSettings,
    beginnings,
    continue_prompts,
    decoded,
    prompts_of,
)
from headstart.evaluation.settings import ReportSettings
from headstart.evaluation.tasks import task_sources, zero_shot
from headstart.model.checkpoint import Checkpoint
from headstart.system.progress import progress
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import load_tokenizer


class Exhibit(NamedTuple):
    """A model, what it is in the comparison, and its name there."""

    kind: Literal["teacher", "student", "arm", "baseline"]
    name: str
    model: Checkpoint


def check_report(settings: ReportSettings, teacher: Checkpoint) -> None:
    """Find a user's mistakes in what shall be shown.

    Raises:
        UserError: a task is unknown, its questions are not there, or a prompt is empty or too long.
        ImportError: there are tasks, and lm-eval is not installed.
    """
    if settings.tasks:
        task_sources(settings.tasks, _task_data(settings))
    if settings.prompts:
        prompts_of(teacher, settings.prompts)


def continuations(
    exhibits: Sequence[Exhibit], text: TokenBlocks, settings: ReportSettings
) -> list[dict[str, Any]]:
    """How models of one vocabulary continue the same prompts, greedily.

    Args:
        exhibits: the first one's tokenizer is that of all.
        text: whose test split gives the prompts, where the settings name none.
        settings: of the report.

    Returns:
        For each prompt "prompt" and "models", a list of {"kind", "name", "text"}.
    """
    if not (settings.prompts or settings.num_prompts):
        return []
    first = exhibits[0].model
    if settings.prompts:
        prompts = prompts_of(first, settings.prompts)
    else:
        limit = first.architecture.context_limit  # of which one token at least is to be written
        length = min(settings.prompt_tokens, limit - 1) if limit else settings.prompt_tokens
        prompts = beginnings(text, settings.num_prompts, length)
    tokenizer, wanted = load_tokenizer(first.folder), GenerationSettings(settings.new_tokens)
    texts = []
    with progress("continue prompts", len(exhibits), "models") as advance:
        for exhibit in exhibits:
            texts.append(continue_prompts(exhibit.model, prompts, wanted, first.folder))
            advance()
    return [
        {
            "prompt": decoded(tokenizer, prompt),
            "models": [
                {"kind": exhibit.kind, "name": exhibit.name, "text": of_model[place]}
                for exhibit, of_model in zip(exhibits, texts, strict=True)
            ],
        }
        for place, prompt in enumerate(prompts)
    ]


def zero_shot_scores(exhibits: Sequence[Exhibit], settings: ReportSettings) -> list[dict[str, Any]]:
    """{"kind", "name", "tasks"} of each model, in the report's tasks; errors as `zero_shot`."""
    if not settings.tasks:
        return []
    data, limit = _task_data(settings), settings.task_limit or None
    return [
        {
            "kind": exhibit.kind,
            "name": exhibit.name,
            "tasks": zero_shot(exhibit.model, settings.tasks, data, limit),
        }
        for exhibit in exhibits
    ]


def _task_data(settings: ReportSettings) -> Path | None:
    return Path(settings.task_data) if settings.task_data else None
