"""When one arm's curve reaches another's last loss, computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headstart.runs.comparison import compare, match_of, matched_tokens


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([9, 7, 5], 9.5, 0),  # before training
        ([9, 7, 5], 9, 0),
        ([9, 7, 5], 7, 100),  # an evaluation hits it
        ([9, 7, 5], 5, 300),
        ([9, 7, 5], 8, 50),  # between two evaluations
        ([9, 7, 5], 6.5, 150),
        ([9, 7, 5], 4.9, None),  # never
        ([9, 5, 8], 7, 50),  # rises again: the first crossing counts
        ([7, 9, 5], 6, 250),  # rises at first
        ([9, 7, 7], 7, 100),  # a plateau divides by nothing
        ([9, 9, 7], 8, 200),
    ],
)
def test_matched_tokens(losses, target, expected):
    at = [
        {"tokens": tokens, "loss": loss} for tokens, loss in zip([0, 100, 300], losses, strict=True)
    ]
    found = matched_tokens(at, target)
    # Nothing is known before the first evaluation after a step.
    assert found == (max(expected, 100) if expected else expected)


def points(
    losses: list[float], flops_per_token: float, upfront: float = 0
) -> list[dict[str, float]]:
    tokens = [0, 100, 300]
    return [
        {"tokens": t, "flops": upfront + t * flops_per_token, "loss": loss}
        for t, loss in zip(tokens, losses, strict=True)
    ]


def test_match_by_hand() -> None:
    scratch = points([10.0, 8.0, 6.0], 5)
    arm = points([9.0, 7.0, 5.0], 10, upfront=50)
    match = match_of(arm, scratch[-1], is_logarithmic=False)
    # From 7 at 100 tokens to 5 at 300, 6 is reached at 200 tokens, 50 + 2000 FLOPs.
    assert match["tokens_to_match"] == 200
    assert match["tokens_factor"] == 300 / 200
    assert match["flops_to_match"] == 2050
    assert match["flops_factor"] == 1500 / 2050
    assert not match["is_bound"]

    before = match_of(points([5.5, 5.0, 4.0], 10, upfront=50), scratch[-1], False)
    assert (before["tokens_to_match"], before["tokens_factor"]) == (0, None)
    assert (before["flops_to_match"], before["flops_factor"]) == (50, 30)

    never = match_of(points([9.0, 8.0, 7.0], 10), scratch[-1], False)
    assert [never[key] for key in ("tokens_to_match", "tokens_factor")] == [None, None]
    assert [never[key] for key in ("flops_to_match", "flops_factor")] == [None, None]


@pytest.mark.parametrize("first_evaluation", [25, 100])
def test_no_factor_is_larger_than_what_was_seen(first_evaluation: int) -> None:
    """An arm falls from just above scratch's loss, so that a line reaches it at once."""
    budget = 300
    scratch = points([10.0, 8.0, 6.0], 5)
    arm = points([6.01, 5.0, 4.0], 10, upfront=50)
    arm[1] |= {"tokens": first_evaluation, "flops": 50 + 10 * first_evaluation}
    match = match_of(arm, scratch[-1], is_logarithmic=False)
    assert match["is_bound"]
    assert match["tokens_to_match"] == first_evaluation
    assert match["tokens_factor"] == budget / first_evaluation
    assert match["flops_to_match"] == 50 + 10 * first_evaluation
    assert match["flops_factor"] == 1500 / (50 + 10 * first_evaluation)
    assert matched_tokens(arm, 6.0) == first_evaluation
    assert matched_tokens(arm, 6.01) == 0  # before training
    assert matched_tokens(arm, 3.0) is None


def entry(name: str, init: str, before: float, losses: list[float], flops: int) -> dict[str, Any]:
    """An arm with budgets of 1,000, 2,000 and 4,000 tokens; a cut one has paid 500 FLOPs before."""
    upfront = 0 if init == "random" else 500
    budgets = [
        {"tokens": tokens, "flops": upfront + flops * tokens, "loss": loss, "losses": [loss]}
        for tokens, loss in zip((1000, 2000, 4000), losses, strict=True)
    ]
    curve = [{"tokens": 0, "flops": upfront, "loss": before + 1}]  # of another split
    of_seed = {"seed": None, "curve": curve}
    return {
        "name": name, "init": init, "loss_before": before, "curve": curve, "budgets": budgets,
        "seeds": [of_seed],
    }  # fmt: skip


def test_budgets_are_compared_by_what_their_runs_end_with() -> None:
    """Each with the random arm that is better at that budget."""
    wide = entry("wide", "random", 9.0, [7.0, 6.5, 5.0], flops=10)
    deep = entry("deep", "random", 9.0, [7.5, 6.0, 5.5], flops=20)
    start = entry("start", "subnet", 6.5, [5.5, 5.25, 4.75], flops=10)
    arms = [wide, deep, start]
    compare(arms)
    first, second, last = start["matches"]
    assert [match["reference"] for match in start["matches"]] == ["wide", "deep", "wide"]
    assert [match["target_loss"] for match in start["matches"]] == [7.0, 6.0, 5.0]
    # Before training it is at 6.5, which is below 7.
    assert (first["tokens_to_match"], first["tokens_factor"]) == (0, None)
    assert first["flops_factor"] == 10 * 1000 / 500
    # It ends its smallest budget below 6: of the tokens before, nothing is known.
    assert second["is_bound"] and second["tokens_factor"] == 2000 / 1000
    assert second["flops_factor"] == 20 * 2000 / (500 + 10 * 1000)
    # From 5.25 at 2,000 to 4.75 at 4,000, 5 is half-way in the logarithm of the tokens.
    tokens = 2000 * 2**0.5
    assert last["tokens_to_match"] == pytest.approx(tokens)
    assert last["tokens_factor"] == pytest.approx(4000 / tokens)
    assert last["flops_factor"] == pytest.approx(10 * 4000 / (500 + 10 * tokens))
    assert last["loss_difference"] == -0.25
    assert start["tokens_factor"] == last["tokens_factor"] and start["reference"] == "wide"
    assert deep["matches"][2]["tokens_to_match"] is None
    assert deep["matches"][1]["tokens_factor"] == 1.0


def test_a_named_target_is_the_reference_at_every_budget() -> None:
    arms = [
        entry("wide", "random", 9.0, [7.0, 6.5, 5.0], flops=10),
        entry("start", "subnet", 6.5, [5.5, 5.25, 4.75], flops=10),
        entry("deep", "random", 9.0, [7.5, 6.0, math.nan], flops=20),
    ]
    compare(arms, target="deep")
    assert {match["reference"] for match in arms[0]["matches"]} == {"deep"}
    assert arms[1]["matches"][-1]["tokens_factor"] is None  # nothing reaches what is no number
    diverged = entry("deep", "random", 9.0, [7.5, 6.0, math.nan], flops=20)
    arms = [diverged, entry("wide", "random", 9.0, [7.0, 6.5, 5.0], flops=10)]
    compare(arms)
    assert [match["reference"] for match in arms[0]["matches"]] == ["wide", "deep", "wide"]
    alone = [entry("start", "subnet", 6.5, [5.5, 5.25, 4.75], flops=10)]
    compare(alone)
    assert alone[0]["reference"] is None and alone[0]["matches"][0]["target_loss"] is None
