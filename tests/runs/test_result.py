"""When one arm's curve reaches another's last loss, computed by hand."""

from __future__ import annotations

import pytest

from headstart.runs.result import match_of, matched_tokens, tokens_to_match


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
def test_tokens_to_match(losses, target, expected):
    assert tokens_to_match([0, 100, 300], losses, target) == expected


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
    match = match_of(arm, scratch)
    # From 7 at 100 tokens to 5 at 300, 6 is reached at 200 tokens, 50 + 2000 FLOPs.
    assert match["tokens_to_match"] == 200
    assert match["tokens_factor"] == 300 / 200
    assert match["flops_to_match"] == 2050
    assert match["flops_factor"] == 1500 / 2050
    assert match["loss_difference"] == -1.0

    before = match_of(points([5.5, 5.0, 4.0], 10, upfront=50), scratch)
    assert (before["tokens_to_match"], before["tokens_factor"]) == (0, None)
    assert (before["flops_to_match"], before["flops_factor"]) == (50, 30)

    never = match_of(points([9.0, 8.0, 7.0], 10), scratch)
    assert [never[key] for key in ("tokens_to_match", "tokens_factor")] == [None, None]
    assert [never[key] for key in ("flops_to_match", "flops_factor")] == [None, None]
    assert set(match_of(arm, None).values()) == {None}


@pytest.mark.parametrize("first_evaluation", [25, 100])
def test_no_factor_is_larger_than_what_was_seen(first_evaluation: int) -> None:
    """An arm falls from just above scratch's loss, so that a line reaches it at once."""
    budget = 300
    scratch = points([10.0, 8.0, 6.0], 5)
    arm = points([6.01, 5.0, 4.0], 10, upfront=50)
    arm[1] |= {"tokens": first_evaluation, "flops": 50 + 10 * first_evaluation}
    match = match_of(arm, scratch)
    assert match["tokens_to_match"] == first_evaluation
    assert match["tokens_factor"] == budget / first_evaluation
    assert match["flops_to_match"] == 50 + 10 * first_evaluation
    assert match["flops_factor"] == 1500 / (50 + 10 * first_evaluation)
    assert match["tokens_to_match_interpolated"] == pytest.approx(0.01 / 1.01 * first_evaluation)
    assert matched_tokens(arm, 6.0) == first_evaluation
    assert matched_tokens(arm, 6.01) == 0  # before training
    assert matched_tokens(arm, 3.0) is None
