"""How an arm's loss would go on beyond its budgets, and how far that can be trusted.

Losses L at budgets of D tokens are fitted by L = floor + scale * D ** -exponent, as in Hoffmann et
al., "Training Compute-Optimal Large Language Models" (arXiv 2203.15556), at one model size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEAST_POINTS = 3
"""That determine the three numbers of a fit."""
TOLERANCE_NATS = 0.05
"""By which a forecast of the larger half of the budgets may be off, and be trusted."""
EXPONENTS = np.geomspace(0.01, 3.0, 2_000)
HORIZON = 1_000.0
"""How many times the largest budget a forecast looks ahead."""


@dataclass(frozen=True)
class Law:
    """A fitted loss: floor + scale * tokens ** -exponent, in nats."""

    floor: float
    scale: float
    exponent: float

    def loss(self, tokens: Any) -> Any:
        """The loss at a budget, or at an array of them."""
        return self.floor + self.scale * np.asarray(tokens, float) ** -self.exponent


def fitted(tokens: Sequence[float], losses: Sequence[float]) -> Law:
    """The law with the least squares of differences, whose floor and scale are not negative."""
    wanted, best = np.asarray(losses, float), (np.inf, Law(0.0, 0.0, 1.0))
    largest = float(max(tokens))
    for exponent in EXPONENTS:
        falling = (np.asarray(tokens, float) / largest) ** -exponent  # about 1, for the arithmetic
        spread = falling - falling.mean()
        scale = max(0.0, float(spread @ (wanted - wanted.mean()) / (spread @ spread)))
        floor = float(wanted.mean() - scale * falling.mean())
        if floor < 0:
            floor, scale = 0.0, float(falling @ wanted / (falling @ falling))
        error = float(np.square(floor + scale * falling - wanted).sum())
        if error < best[0]:
            best = error, Law(floor, float(scale * largest**exponent), float(exponent))
    return best[1]


def forecast_of(budgets: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What an arm's budgets say of larger ones, checked on the larger half of them.

    Args:
        budgets: of one arm, ascending, with "tokens" and "loss".

    Returns:
        `floor`, `scale` and `exponent` of the law fitted to all; `checked`, for each budget of the
        larger half its `tokens`, `loss` and `forecast` from the smaller half alone; and
        `is_trusted`. None where the smaller half has fewer than three.
    """
    known = max(LEAST_POINTS, len(budgets) // 2)
    if len(budgets) <= known:
        return None
    tokens, losses = ([budget[key] for budget in budgets] for key in ("tokens", "loss"))
    early = fitted(tokens[:known], losses[:known])
    checked = [
        {"tokens": at, "loss": loss, "forecast": float(early.loss(at))}
        for at, loss in zip(tokens[known:], losses[known:], strict=True)
    ]
    is_trusted = all(abs(of["forecast"] - of["loss"]) <= TOLERANCE_NATS for of in checked)
    return {**asdict(fitted(tokens, losses)), "checked": checked, "is_trusted": is_trusted}


def look_ahead(arms: Sequence[dict[str, Any]]) -> None:
    """Add to each arm of `result.json` its `forecast`, and `catch_up` with its reference.

    `catch_up` has the `tokens` of the budget at which the reference is forecast to end as low, None
    if that is not within `horizon_tokens`. It is None itself where a forecast is not trusted, or
    the arm is not ahead.
    """
    for arm in arms:
        arm["forecast"] = forecast_of(arm["budgets"])
    by_name = {arm["name"]: arm for arm in arms}
    for arm in arms:
        arm["catch_up"] = None
        if arm["reference"] in (None, arm["name"]) or arm["loss_difference"] >= 0:
            continue
        ours, theirs = arm["forecast"], by_name[arm["reference"]]["forecast"]
        if all(forecast and forecast["is_trusted"] for forecast in (ours, theirs)):
            largest = arm["budgets"][-1]["tokens"]
            tokens = catch_up_tokens(ours, theirs, largest)
            arm["catch_up"] = {"tokens": tokens, "horizon_tokens": HORIZON * largest}


def catch_up_tokens(
    arm: Mapping[str, Any], reference: Mapping[str, Any], largest: float
) -> float | None:
    """The budget at which a reference is forecast to end as low as an arm that is ahead of it.

    Args:
        arm: its forecast.
        reference: the reference's.
        largest: budget that was measured, in tokens.

    Returns:
        Tokens; None if that is not within `HORIZON` times the largest budget.
    """
    laws = [Law(law["floor"], law["scale"], law["exponent"]) for law in (arm, reference)]
    budgets = np.geomspace(largest, HORIZON * largest, 100_000)
    ahead = laws[1].loss(budgets) - laws[0].loss(budgets)
    behind = np.flatnonzero(ahead <= 0)
    return float(budgets[behind[0]]) if len(behind) else None
