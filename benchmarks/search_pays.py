"""Does the search pay, at equal tokens and at equal FLOPs?

    python benchmarks/search_pays.py --data articles.jsonl --output runs/search-pays

Students of one bin, chosen in several ways, all with the same start and rate: the shape nearest to
the teacher's proportions, the product's search, the best by the same score of 64 shapes near those
proportions without evolution, and three drawn at random. Prints the test loss after equal tokens;
and, for every budget of a search, the loss that the proportional shape ends with when it trains
until it has cost as many FLOPs, between two budgets in a straight line with the logarithm of the
FLOPs. A killed run goes on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from budgets import RATIOS, Start, result_of
from headstart.calibration.start import Init
from shapes import RATES

RANDOM_SEEDS = (0, 1, 2)
PROPORTIONAL = "proportional"


def choices(init: Init) -> dict[str, Start]:
    """Every way to choose a student, by its name."""
    one = {"population": 1, "generations": 1, "elites": 1}
    near = {"method": "importance", "population": 64, "generations": 1, "elites": 8}
    return {
        PROPORTIONAL: Start(init),
        "searched": Start(init, evolution={}, scored_as="refitted"),
        "near the proportions": Start(init, evolution=near, scored_as="refitted"),
        **{
            f"random {seed}": Start(init, evolution={"method": "random", "seed": seed, **one})
            for seed in RANDOM_SEEDS
        },
    }


def entry_at(budgets: Sequence[Mapping[str, Any]], tokens: int) -> Mapping[str, Any]:
    """Of several budgets, the one of so many tokens, which are rounded up to whole steps."""
    return next(budget for budget in budgets if budget["tokens"] >= tokens)


def loss_at(budgets: Sequence[Mapping[str, Any]], flops: float) -> float:
    """The loss after so many FLOPs; NaN outside of what was measured."""
    for start, end in pairwise(budgets):
        if start["flops"] <= flops <= end["flops"]:
            share = math.log(flops / start["flops"]) / math.log(end["flops"] / start["flops"])
            return float(start["loss"] + share * (end["loss"] - start["loss"]))
    return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="text, as for headstart")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--ratio", choices=RATIOS, default="15", help="teacher to student, about")
    parser.add_argument("--init", choices=RATES, default="slice", help="of the students")
    parser.add_argument("--rate", type=float, help="of learning, instead of the start's own")
    parser.add_argument("--budgets", nargs="+", type=int, default=[250_000])
    options = parser.parse_args()
    found = {}
    for name, start in choices(options.init).items():
        budgets = options.budgets
        if name == PROPORTIONAL:  # which is asked what it reaches with the searches' FLOPs
            budgets = [*budgets, *(budgets[-1] << doublings for doublings in (1, 2, 3))]
        folder = options.output / name.replace(" ", "-")
        arm = {"learning_rate": options.rate or RATES[options.init]}
        found[name] = result_of(name, start, folder, options, arm=arm, budgets=budgets)
    heads = " | ".join(f"{budget:,} tokens | at equal FLOPs" for budget in options.budgets)
    print(f"\n| choice | layers x width, neurons | search FLOPs | before | {heads} |")
    print(f"| :-- | :-- | --: | --: |{' --: | --: |' * len(options.budgets)}")
    proportional = found[PROPORTIONAL]["arms"][0]["budgets"]
    for name, result in found.items():
        (arm,), sizes = result["arms"], result["student"]["sizes"]
        cells = [name, f"{sizes['layers']} x {sizes['embed']}, {sizes['mlp']:,}"]
        cells += [f"{result['costs']['search_flops']:.2g}", f"{arm['loss_before']:.3f}"]
        for tokens in options.budgets:
            budget = entry_at(arm["budgets"], tokens)
            rival = loss_at(proportional, budget["flops"])
            cells += [f"{budget['loss']:.3f}", f"{PROPORTIONAL} {rival:.3f}"]
        print(f"| {' | '.join(cells)} |")
    for tokens in options.budgets:
        drawn = [
            entry_at(found[f"random {seed}"]["arms"][0]["budgets"], tokens)["loss"]
            for seed in RANDOM_SEEDS
        ]
        print(f"\nmedian of the random ones after {tokens:,} tokens: {median(drawn):.3f}")


if __name__ == "__main__":
    main()
