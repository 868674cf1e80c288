"""What a search has found, as `search.json` keeps it; docs/search.md documents the format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from headstart.model.count import Measure
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate
from headstart.searching.journal import Evaluated
from headstart.searching.pareto import nondominated_fronts
from headstart.searching.settings import SearchSettings


def outcome_of(
    scores: Sequence[Evaluated],
    finals: Sequence[Evaluated],
    winner: Candidate,
    settings: SearchSettings,
    bin: Bin,
    amount: Callable[[Candidate, Measure], int],
    search_flops: int,
) -> dict[str, Any]:
    """Settings, costs, candidates, winner and front.

    Args:
        scores: the last score of every candidate, in the order in which they were proposed.
        finals: those of the last round, if there was one.
        amount: (candidate, measure) -> what it comes to.
        search_flops: of all scores and finals.
    """
    trained = {final.candidate: {"trained_loss": final.json_loss} for final in finals}
    place = [score.candidate for score in scores].index(winner)
    front: list[int] = []
    tradeoff = settings.evolution.tradeoff
    if tradeoff != "none":
        points = [[score.loss, amount(score.candidate, tradeoff)] for score in scores]
        front = nondominated_fronts(np.array(points))[0]
    return {
        "loss": scores[place].loss,
        "parameters": scores[place].parameters,
        "bin": [bin.low, bin.high],
        "measure": bin.measure,
        "init": settings.init,
        "scored_as": settings.scored_as,
        "space": settings.space,
        "order": settings.order,
        "layer_order": settings.layer_order,
        "fitness": settings.fitness,
        "settings": asdict(settings),
        "search_flops": search_flops,
        "search_tokens": sum(score.tokens for score in (*scores, *finals)),
        "search_seconds": sum(score.seconds for score in (*scores, *finals)),
        "candidates": [
            {
                "generation": score.generation,
                "origin": score.origin,
                "parameters": score.parameters,
                "amount": amount(score.candidate, bin.measure),
                "loss": score.json_loss,
                "tokens": score.tokens,
                "sizes": score.candidate.sizes(),
                **trained.get(score.candidate, {}),
            }
            for score in scores
        ],
        "winner": place,
        "front": front,
    }
