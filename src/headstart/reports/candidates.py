"""What a search's file says of its candidates: their sizes, their losses and which is better.

The file is `search.json`, or the `search` object of `result.json`; docs/result.md documents both.
"""

from __future__ import annotations

import math
from typing import Any

from headstart.model.count import MEASURES

Search = dict[str, Any]
Candidate = dict[str, Any]

_FITNESS = {"loss": "loss", "kl": "divergence from the teacher"}


def fitness_text(search: Search) -> str:
    """What candidates were scored by."""
    return _FITNESS[search.get("fitness", "loss")]


def measure_text(search: Search) -> str:
    """What the bin is in."""
    return MEASURES[search.get("measure", "parameters")]


def amount_of(candidate: Candidate) -> float:
    """A candidate's size in the measure of the bin."""
    amount: float = candidate["amount" if "amount" in candidate else "parameters"]
    return amount


def loss_of(candidate: Candidate, key: str = "loss") -> float:
    """A candidate's loss; infinite without one or where it is no number, which JSON has as null."""
    loss: float | None = candidate.get(key)
    return loss if loss is not None and math.isfinite(loss) else math.inf


def raced_out(search: Search) -> list[bool]:
    """For each candidate, whether its loss was taken on fewer tokens than that of others."""
    candidates = search["candidates"]
    most = max(candidate.get("tokens", 0) for candidate in candidates)
    return [candidate.get("tokens", most) < most for candidate in candidates]


def front_of(search: Search) -> list[Candidate]:
    """The Pareto front along the bin's measure, smallest first; empty where there is none."""
    front = [search["candidates"][index] for index in search.get("front") or []]
    front = sorted(front, key=lambda candidate: (amount_of(candidate), loss_of(candidate)))
    losses = [loss_of(candidate) for candidate in front]
    # A front in another measure does not fall along the bin's, and a line would mislead.
    return front if losses == sorted(losses, reverse=True) else []


def best_of(search: Search, count: int) -> list[int]:
    """The places of the best candidates, best first.

    A loss after training outranks one before, and those that were raced out come last.
    """
    candidates, dropped = search["candidates"], raced_out(search)

    def key(place: int) -> tuple[bool, float, float]:
        candidate = candidates[place]
        return dropped[place], loss_of(candidate, "trained_loss"), loss_of(candidate)

    return sorted(range(len(candidates)), key=key)[:count]
