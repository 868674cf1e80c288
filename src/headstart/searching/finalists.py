"""The last round of a search: the best candidates are trained a little, and scored again.

A loss before training says how much of the teacher survived the cut; a loss after a few steps says
more about how well a candidate will learn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from headstart.losses.next_token import mean_loss, next_token_loss
from headstart.searching.fitness import HeldOutLoss
from headstart.searching.journal import Evaluated, Journal
from headstart.system.distributed import gather, rank, world_size
from headstart.system.errors import UserError
from headstart.system.settings import check_least


@dataclass(frozen=True)
class FinalistSettings:
    """How finalists are trained.

    Attributes:
        count: candidates, each of another depth and width; 0 for no last round.
        steps: optimizer steps of AdamW.
        learning_rate: reached after a tenth of the steps, then constant.
        batch_size: blocks of training text in a step.
    """

    count: int = 0
    steps: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 4

    def __post_init__(self) -> None:
        check_least(self, "search.finalists.", count=0, steps=1, batch_size=1)
        if self.learning_rate <= 0:
            raise UserError(
                f"search.finalists.learning_rate is {self.learning_rate}; it must be above 0"
            )


def choose_finalists(ranked: Sequence[Evaluated], count: int) -> list[Evaluated]:
    """The best candidates of different depth and width, so that the round has a choice to make.

    They are fewer than `count` where there are fewer shapes. `ranked` has the best first.
    """
    by_shape: dict[tuple[int, int], Evaluated] = {}
    for score in ranked:
        candidate = score.candidate
        by_shape.setdefault((candidate.layers.size, candidate.embed.size), score)
    return list(by_shape.values())[:count]


def run_finals(
    finalists: Sequence[Evaluated],
    fitness: HeldOutLoss,
    train_blocks: Int[Tensor, "blocks tokens"],
    settings: FinalistSettings,
    journal: Journal,
    on_score: Callable[[Evaluated], None] = lambda score: None,
) -> list[Evaluated]:
    """Train each finalist on the same blocks and score it on the tokens of the search.

    Processes under torchrun share the finalists.

    Args:
        finalists: candidates with their scores before training.
        fitness: cuts candidates out, and holds the tokens they are scored on.
        train_blocks: at least `steps * batch_size` blocks, read in order; repeated if fewer.
        journal: keeps every score; what it knows is not trained again.
        on_score: called with each score.

    Returns:
        The scores after training, in the order of the finalists.
    """
    scores = []
    for start in range(0, len(finalists), world_size()):
        wave = finalists[start : start + world_size()]
        known = [journal.find(score.candidate, score.tokens, settings.steps) for score in wave]
        mine = None
        if rank() < len(wave) and known[rank()] is None:
            mine = _trained_score(wave[rank()], fitness, train_blocks, settings)
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
    fitness: HeldOutLoss,
    train_blocks: Int[Tensor, "blocks tokens"],
    settings: FinalistSettings,
) -> Evaluated:
    clock = time.perf_counter()
    # A copy, since tensors that are kept whole are the teacher's own.
    student = copy.deepcopy(fitness.student(finalist.candidate)).float().requires_grad_(True)
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
        steps=settings.steps,
        seconds=time.perf_counter() - clock,
    )
