"""A last round of a search, if it is asked for: the best candidates are scored once more.

They are refitted on more tokens than every candidate is, or trained a little. Where candidates were
scored as plain slices the round is what tells shapes apart (docs/benchmarks/shapes.md).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from headstart.losses.next_token import mean_loss, next_token_loss
from headstart.searching.candidate import Candidate
from headstart.searching.fitness import HeldOutLoss
from headstart.searching.journal import Evaluated, Journal
from headstart.system.distributed import gather, rank, world_size
from headstart.system.errors import UserError
from headstart.system.settings import check_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE_FACTOR = 1.4
"""By which depth or width of two finalists differ at least."""


@dataclass(frozen=True)
class FinalistSettings:
    """How finalists are judged.

    Attributes:
        count: candidates, each of another shape; 0 for no last round.
        refitted: whether they are refitted by least squares even where the student will be a plain
            slice; without it they are started as the student.
        calibration_tokens: of a refit, unless the search has measured the teacher already, to
            rotate it.
        steps: optimizer steps of AdamW before they are scored.
        learning_rate: reached after a tenth of the steps, then constant.
        batch_size: blocks of training text in a step.
    """

    count: int = 0
    refitted: bool = True
    calibration_tokens: int = 4096
    steps: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 4

    def __post_init__(self) -> None:
        check_least(self, "search.finalists.", count=0, calibration_tokens=1, steps=0, batch_size=1)
        if self.learning_rate <= 0:
            raise UserError(
                f"search.finalists.learning_rate is {self.learning_rate}; it must be above 0"
            )


def choose_finalists(
    ranked: Sequence[Evaluated], count: int, always: Candidate | None = None
) -> list[Evaluated]:
    """The best candidates of different shapes, so that the round has a choice to make.

    Of any two, depth or width differ by `SHAPE_FACTOR` at least. They are fewer than `count` where
    there are fewer such.

    Args:
        ranked: scores, the best first.
        count: how many to choose.
        always: one that is chosen whatever its score.
    """
    chosen = [score for score in ranked if score.candidate == always][: min(count, 1)]
    for score in ranked:
        if len(chosen) < count and all(_differ(score, other) for other in chosen):
            chosen.append(score)
    return sorted(chosen, key=ranked.index)


def _differ(first: Evaluated, second: Evaluated) -> bool:
    """Whether two candidates have different shapes."""
    sizes = [(of.candidate.layers.size, of.candidate.embed.size) for of in (first, second)]
    return any(max(pair) >= SHAPE_FACTOR * min(pair) for pair in zip(*sizes, strict=True))


def run_finals(
    finalists: Sequence[Evaluated],
    fitness: HeldOutLoss,
    train_blocks: Int[Tensor, "blocks tokens"],
    settings: FinalistSettings,
    journal: Journal,
    start: Callable[[Candidate], PreTrainedModel],
    on_score: Callable[[Evaluated], None] = lambda score: None,
) -> list[Evaluated]:
    """Start each finalist, train it on the same blocks, and score it on the tokens of the search.

    Processes under torchrun share the finalists.

    Args:
        finalists: candidates with their scores before training.
        fitness: holds the tokens that they are scored on.
        train_blocks: at least `steps * batch_size` blocks, read in order; repeated if fewer.
        journal: keeps every score; what it knows is not trained again.
        start: makes the model that a candidate is trained from.
        on_score: called with each score.

    Returns:
        The scores after training, in the order of the finalists.
    """
    scores = []
    for first in range(0, len(finalists), world_size()):
        wave = finalists[first : first + world_size()]
        known = [
            journal.find(score.candidate, fitness.blocks.numel(), settings.steps, started=True)
            for score in wave
        ]
        mine = None
        if rank() < len(wave) and known[rank()] is None:
            mine = _trained_score(wave[rank()], start, fitness, train_blocks, settings)
        found = gather(mine)
        journal.append([score for score in found if score is not None])
        for before, after in zip(known, found, strict=False):
            score = before or after
            assert score is not None
            scores.append(score)
            on_score(score)
    return scores


def _trained_score(
    finalist: Evaluated,
    start: Callable[[Candidate], PreTrainedModel],
    fitness: HeldOutLoss,
    train_blocks: Int[Tensor, "blocks tokens"],
    settings: FinalistSettings,
) -> Evaluated:
    clock = time.perf_counter()
    # A copy, since tensors that are kept whole may be the teacher's own.
    student = copy.deepcopy(start(finalist.candidate)).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate)
    warmup = max(1, settings.steps // 10)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / warmup)
        places = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
        batch = train_blocks[places % len(train_blocks)].to(student.device)
        hidden = student.base_model(batch, use_cache=False).last_hidden_state
        loss = next_token_loss(hidden, student.get_output_embeddings().weight, batch)
        (loss / (batch.shape[0] * (batch.shape[1] - 1))).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return replace(
        finalist,
        loss=mean_loss(student.eval(), fitness.blocks, fitness.batch_size),
        tokens=fitness.blocks.numel(),
        steps=settings.steps,
        started=True,
        seconds=time.perf_counter() - clock,
    )
