"""An arm at several learning rates and seeds: trained one by one, reported as one."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.training.arms import ArmInputs, run_arm
from headstart.training.settings import Arm


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


def run_variants(arm: Arm, inputs: ArmInputs, folder: Path) -> dict[str, Any]:
    """Train every variant of an arm that is not trained yet, and choose its learning rate.

    Returns:
        What `run_arm` returns, of the learning rate whose last loss is lowest, and as the mean over
        its seeds. Added are `learning_rate`; `folder` below the arm's own, of the first seed;
        `sweep`, the last loss at every rate; `seeds`, the curve with every seed; and `loss_spread`,
        the standard deviation of the last losses over the seeds, None with one seed.
    """
    variants = variants_of(arm, inputs.settings.seeds)
    results = {name: run_arm(variant, inputs, folder / name) for name, variant in variants.items()}
    by_rate: dict[float, list[str]] = {}
    for name, variant in variants.items():
        by_rate.setdefault(variant.learning_rate, []).append(name)
    last = {
        rate: statistics.fmean(results[name]["curve"][-1]["loss"] for name in names)
        for rate, names in by_rate.items()
    }
    # One that diverged comes last.
    rate = min(last, key=lambda tried: (math.isnan(last[tried]), last[tried]))
    chosen = [results[name] for name in by_rate[rate]]
    points = zip(*(result["curve"] for result in chosen), strict=True)
    finals = [result["curve"][-1]["loss"] for result in chosen]
    return {
        **chosen[0],
        "learning_rate": rate,
        "folder": by_rate[rate][0],
        "seconds": statistics.fmean(result["seconds"] for result in chosen),
        "curve": [
            {**point[0], "loss": statistics.fmean(seed["loss"] for seed in point)}
            for point in points
        ],
        "sweep": [{"learning_rate": tried, "loss_final": loss} for tried, loss in last.items()],
        "seeds": [
            {"seed": variants[name].train.get("seed"), "curve": results[name]["curve"]}
            for name in by_rate[rate]
        ],
        "loss_spread": statistics.stdev(finals) if len(finals) > 1 else None,
    }
