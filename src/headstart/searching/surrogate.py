"""A quick guess of how candidates will rank, from those that were scored.

Kernel ridge regression of the rank on what a candidate keeps of each axis, how far its units stray
from the axis order, and how unevenly layers share them. Ranks, because a few broken candidates
have losses far from all others, and because racing compares losses on different numbers of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from headstart.searching.candidate import Candidate
from headstart.searching.units import Units

MAX_KNOWN = 256
"""Scored candidates that a guess rests on at most, the best ones."""
LENGTH = 0.5
"""How far apart candidates are, in whole axes, that still say something about each other."""
RIDGE = 0.01
"""Variance of a rank that the features do not explain, relative to that which they do."""


class Surrogate:
    """Guesses ranks from the candidates scored so far.

    Args:
        totals: the teacher's size of each axis.
        ranked: scored candidates, the best first.
    """

    def __init__(self, totals: dict[str, int], ranked: Sequence[Candidate]) -> None:
        self._totals = totals
        known = ranked[:MAX_KNOWN]
        self._known = np.array([_features(candidate, totals) for candidate in known])
        ranks = np.linspace(-0.5, 0.5, len(known))
        kernel = _kernel(self._known, self._known)
        self._weights = np.linalg.solve(kernel + RIDGE * np.eye(len(known)), ranks)

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one of which most is hoped, the first of equals."""
        features = np.array([_features(candidate, self._totals) for candidate in candidates])
        guesses = _kernel(features, self._known) @ self._weights
        # The last bits differ between machines, which must agree on what to score.
        return candidates[int(guesses.round(6).argmin())]


def _kernel(
    left: Float[np.ndarray, "a features"], right: Float[np.ndarray, "b features"]
) -> Float[np.ndarray, "a b"]:
    distance = np.linalg.norm(left[:, None] - right[None], axis=-1)
    kernel: Float[np.ndarray, "a b"] = np.exp(-((distance / LENGTH) ** 2) / 2)
    return kernel


def _features(candidate: Candidate, totals: dict[str, int]) -> list[float]:
    axes = {
        "layers": (candidate.layers,),
        "embed": (candidate.embed,),
        "kv_groups": candidate.kv_groups,
        "mlp": candidate.mlp,
    }
    features = [candidate.head_dim / totals["head_dim"]]
    for axis, units in axes.items():
        sizes = [of_layer.size for of_layer in units]
        mean = sum(sizes) / len(sizes)
        variance = sum((size - mean) ** 2 for size in sizes) / len(sizes)
        strays = sum(_stray(of_layer, totals[axis]) for of_layer in units) / len(units)
        features += [mean / totals[axis], math.sqrt(variance) / mean, strays]
    return features


def _stray(units: Units, total: int) -> float:
    """0 for units that follow the axis order, 1 for those furthest from it."""
    if not units.dropped:
        return 0.0
    moved = sum(units.added) - sum(units.dropped)
    return math.sqrt(moved / (units.size * (total - units.size)))
