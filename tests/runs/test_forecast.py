"""Forecasts of losses that are known."""

from __future__ import annotations

import numpy as np
import pytest

from headstart.runs.forecast import Law, catch_up_tokens, fitted, forecast_of

BUDGETS = [5e5, 1e6, 2e6, 4e6, 8e6, 16e6]


def budgets_of(law: Law, noise: float = 0.0) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    return [
        {"tokens": tokens, "loss": float(law.loss(tokens)) + noise * rng.normal()}
        for tokens in BUDGETS
    ]


@pytest.mark.parametrize("law", [Law(3.0, 60.0, 0.25), Law(0.0, 30.0, 0.12), Law(4.5, 900.0, 0.5)])
def test_a_law_is_found_again_and_trusted(law: Law) -> None:
    found = forecast_of(budgets_of(law))
    assert found is not None and found["is_trusted"]
    assert found["exponent"] == pytest.approx(law.exponent, rel=0.01)
    assert found["floor"] == pytest.approx(law.floor, abs=0.05)
    far = 100 * BUDGETS[-1]
    again = Law(found["floor"], found["scale"], found["exponent"])
    assert again.loss(far) == pytest.approx(law.loss(far), abs=0.02)
    assert [point["tokens"] for point in found["checked"]] == BUDGETS[3:]
    for point in found["checked"]:
        assert point["forecast"] == pytest.approx(point["loss"], abs=0.01)


def test_a_curve_that_follows_no_law_is_not_trusted() -> None:
    losses = [7.0, 6.9, 6.7, 6.2, 5.4, 5.0]  # falls faster and faster at first
    points = [{"tokens": at, "loss": loss} for at, loss in zip(BUDGETS, losses, strict=True)]
    found = forecast_of(points)
    assert found is not None and not found["is_trusted"]
    misses = [abs(point["forecast"] - point["loss"]) for point in found["checked"]]
    assert max(misses) > 0.05


def test_few_budgets_are_no_forecast() -> None:
    assert forecast_of(budgets_of(Law(3.0, 60.0, 0.25))[:3]) is None
    assert forecast_of(budgets_of(Law(3.0, 60.0, 0.25))[:4]) is not None


def test_where_the_reference_catches_up() -> None:
    """A head start of 1 nat that wears off, worked out by hand: 2 + 40 D^-0.25 = 3 + 20 D^-0.25
    where D^0.25 = 20, that is at 160,000 tokens."""
    slow, fast = Law(3.0, 20.0, 0.25), Law(2.0, 40.0, 0.25)
    found = catch_up_tokens(vars(slow), vars(fast), largest=1_000)
    assert found == pytest.approx(160_000, rel=0.01)
    assert catch_up_tokens(vars(Law(2.0, 20.0, 0.25)), vars(fast), largest=1_000) is None


def test_a_floor_is_never_negative() -> None:
    law = fitted([1e6, 2e6, 4e6], [5.0, 4.0, 3.0])
    assert law.floor >= 0 and law.scale > 0
