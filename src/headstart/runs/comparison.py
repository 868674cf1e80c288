"""When arms reach one another's losses: in tokens, in FLOPs, at every budget.

With one budget, the validation curve of a run is compared with the last validation loss of another.
With several, only what runs of these budgets end with is compared, on the test split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from headstart.training.settings import BEST

Point = Mapping[str, Any]
"""Of a curve: "tokens", "flops" and "loss"."""
MATCH_KEYS = (
    "tokens_to_match", "tokens_factor", "flops_to_match", "flops_factor", "is_bound",
    "loss_difference",
)  # fmt: skip


def compare(arms: Sequence[dict[str, Any]], target: str = BEST) -> None:
    """Add to each arm, which `result.json` describes, how it stands against the reference.

    Args:
        arms: of one run; each is given `reference`, the name of the arm it is compared with at the
            largest budget, or None; the keys of `match_of` there; `matches`, the same at every
            budget; and to each seed `tokens_to_match`.
        target: the reference; "best" for the arm with random weights that ends lowest at a budget.
    """
    for arm in arms:
        arm["matches"] = []
    for place in range(len(arms[0]["budgets"])):
        reference = _reference(arms, place, target)
        for arm in arms:
            arm["matches"].append(_match_at(arm, reference, place))
    for arm in arms:
        last = arm["matches"][-1]
        arm |= {key: last[key] for key in ("reference", *MATCH_KEYS)}
        for number, seed in enumerate(arm["seeds"]):
            points = seed.pop("curve")
            seed["loss_final"] = arm["budgets"][-1]["losses"][number]
            goal = last["target_loss"] if len(arm["budgets"]) == 1 else None
            seed["tokens_to_match"] = None if goal is None else matched_tokens(points, goal)


def _reference(arms: Sequence[Mapping[str, Any]], place: int, target: str) -> Any:
    """The arm that others are compared with at a budget, or None."""
    wanted = [
        arm for arm in arms if arm["name"] == target or (target == BEST and arm["init"] == "random")
    ]

    def last_loss(arm: Mapping[str, Any]) -> tuple[bool, float]:
        loss = arm["budgets"][place]["loss"]
        return math.isnan(loss), loss  # one that diverged comes last

    return min(wanted, key=last_loss, default=None)


def points_of(arm: Mapping[str, Any]) -> list[Point]:
    """What an arm is compared by, from before training on."""
    curve: list[Point] = arm["curve"]
    if len(arm["budgets"]) == 1:
        return curve
    return [{**curve[0], "loss": arm["loss_before"]}, *arm["budgets"]]


def _match_at(arm: Mapping[str, Any], reference: Any, place: int) -> dict[str, Any]:
    """How an arm stands against the reference's run of one budget."""
    budget = arm["budgets"][place]
    match: dict[str, Any] = {"tokens": budget["tokens"], "reference": None, "target_loss": None}
    if reference is None:
        return match | dict.fromkeys(MATCH_KEYS)
    goal = points_of(reference)[-1 if len(arm["budgets"]) == 1 else place + 1]
    match |= {"reference": reference["name"], "target_loss": goal["loss"]}
    match |= match_of(points_of(arm), goal, is_logarithmic=len(arm["budgets"]) > 1)
    return match | {"loss_difference": budget["loss"] - reference["budgets"][place]["loss"]}


def match_of(points: Sequence[Point], goal: Point, is_logarithmic: bool) -> dict[str, Any]:
    """When an arm reaches a loss, and what a reference had paid for it over what the arm has.

    Args:
        points: the arm's tokens, FLOPs and losses, from before training on.
        goal: the point at which the reference reaches its loss.
        is_logarithmic: whether loss falls in a straight line with the logarithm of the tokens
            between two points, or with the tokens themselves.

    Returns:
        tokens_to_match, tokens_factor, flops_to_match, flops_factor: None where never, or where a
        factor would divide by zero; and is_bound, whether the arm was there by its first point
        after training began, so that the factors are the least that they can be.
    """
    match: dict[str, Any] = dict.fromkeys(MATCH_KEYS[:4]) | {"is_bound": False}
    tokens = matched_tokens(points, goal["loss"], is_logarithmic)
    if tokens is None:
        return match
    flops = _flops_at(points, tokens)
    for unit, spent in (("tokens", tokens), ("flops", flops)):
        match[f"{unit}_to_match"] = spent
        match[f"{unit}_factor"] = goal[unit] / spent if spent else None
    return match | {"is_bound": 0 < tokens <= points[1]["tokens"]}


def _flops_at(points: Sequence[Point], tokens: float) -> float:
    """FLOPs spent at some tokens; they grow in proportion between two points."""
    for start, end in pairwise(points):
        if tokens <= end["tokens"]:
            share = (tokens - start["tokens"]) / (end["tokens"] - start["tokens"])
            return float(start["flops"] + share * (end["flops"] - start["flops"]))
    return float(points[-1]["flops"])


def matched_tokens(
    points: Sequence[Point], target: float, is_logarithmic: bool = False
) -> float | None:
    """The first token count at which a loss is reached: 0 if before training, and None if never.

    Until the first point after training began nothing is known: all tokens until then are counted,
    so that no start is said to be worth more than was seen.
    """
    if points[0]["loss"] <= target:
        return 0.0
    for number, (start, end) in enumerate(pairwise(points)):
        if end["loss"] <= target:
            if number == 0:
                return float(end["tokens"])
            share = (start["loss"] - target) / (start["loss"] - end["loss"])
            if is_logarithmic:
                return float(start["tokens"] * (end["tokens"] / start["tokens"]) ** share)
            return float(start["tokens"] + share * (end["tokens"] - start["tokens"]))
    return None
