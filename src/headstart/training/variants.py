"""An arm at several learning rates and seeds: trained one by one, reported as one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.system.files import read_json
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.settings import Arm, PretrainSettings


def variants_of(arm: Arm, seeds: tuple[int, ...]) -> dict[str, Arm]:
    """The single runs of an arm, by their folder below the arm's own; "" if there is only one.

    >>> list(variants_of(Arm("a", learning_rates=(1e-3, 2e-3)), seeds=(0, 1)))
    ['lr-0.001/seed-0', 'lr-0.001/seed-1', 'lr-0.002/seed-0', 'lr-0.002/seed-1']
    """
    variants = {}
    for rate in arm.learning_rates or (arm.learning_rate,):
        for seed in seeds or (None,):
            parts = [f"lr-{rate:g}"] if arm.learning_rates else []
            if seed is not None:
                parts.append(f"seed-{seed}")
            train = arm.train if seed is None else {**arm.train, "seed": seed}
            single = replace(arm, learning_rate=rate, learning_rates=(), train=train)
            variants["/".join(parts)] = single
    return variants


def are_trained(arm: Arm, settings: PretrainSettings, folder: Path) -> bool:
    """Whether every variant of an arm has reached every budget."""
    results = [read_json(folder / name / "arm.json") for name in variants_of(arm, settings.seeds)]
    needed = len(settings.budget_tokens)
    return all(result is not None and len(result["budgets"]) == needed for result in results)


def run_variants(arm: Arm, inputs: ArmInputs, folder: Path) -> dict[str, Any]:
    """Train every variant of an arm that is not trained yet, and choose its learning rate.

    Every budget has the rate that ends lowest there on the validation split.

    Returns:
        What `run_arm` returns, at the rate of the largest budget, and as the mean over its seeds.
        Added are `learning_rate`; `folder` below the arm's own, of the first seed; `sweep`, the
        last validation loss at every rate; `seeds`, the curve with every seed; and `loss_spread`,
        the standard deviation of their last test losses, None with one seed. Each entry of
        `budgets` has, as means over the seeds, `loss` and `standard_error` on the test split and
        `validation_loss`; and `learning_rate`, `losses`, those of the seeds, and `spread`, their
        standard deviation, None with one seed.
    """
    variants = variants_of(arm, inputs.settings.seeds)
    results = {name: run_arm(variant, inputs, folder / name) for name, variant in variants.items()}
    by_rate: dict[float, list[str]] = {}
    for name, variant in variants.items():
        by_rate.setdefault(variant.learning_rate, []).append(name)
    reached = [
        _best_rate(
            {
                rate: [results[name]["budgets"][place] for name in names]
                for rate, names in by_rate.items()
            }
        )
        for place in range(len(inputs.settings.budget_tokens))
    ]
    rate = reached[-1]["learning_rate"]
    chosen = [results[name] for name in by_rate[rate]]
    points = zip(*(result["curve"] for result in chosen), strict=True)
    return {
        **chosen[0],
        "learning_rate": rate,
        "folder": by_rate[rate][0],
        "seconds": _mean(chosen, "seconds"),
        "before": {
            key: _mean([result["before"] for result in chosen], key) for key in chosen[0]["before"]
        },
        "curve": [{**point[0], "loss": _mean(point, "loss")} for point in points],
        "sweep": [
            {
                "learning_rate": tried,
                "loss_final": _mean(
                    [results[name]["budgets"][-1] for name in names], "validation_loss"
                ),
            }
            for tried, names in by_rate.items()
        ],
        "seeds": [
            {"seed": variants[name].train.get("seed"), "curve": results[name]["curve"]}
            for name in by_rate[rate]
        ],
        "budgets": reached,
        "loss_spread": reached[-1]["spread"],
    }


def _best_rate(by_rate: Mapping[float, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What was reached at the end of one budget at the rate that validates best.

    Args:
        by_rate: for each rate, what each seed reached.
    """
    validated = {rate: _mean(of_seeds, "validation_loss") for rate, of_seeds in by_rate.items()}
    # One that diverged comes last.
    rate = min(validated, key=lambda tried: (math.isnan(validated[tried]), validated[tried]))
    of_seeds = by_rate[rate]
    losses = [of_seed["loss"] for of_seed in of_seeds]
    return {
        **{
            key: _mean(of_seeds, key)
            for key in ("loss", "standard_error", "validation_loss", "seconds")
        },
        "tokens": of_seeds[0]["tokens"],
        "learning_rate": rate,
        "losses": losses,
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
    }


def _mean(entries: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(entry[key] for entry in entries)
