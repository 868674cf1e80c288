"""Which vocabulary is best for a student of the demo's size?

    python benchmarks/vocabulary.py --output runs/vocabulary
    python benchmarks/vocabulary.py --output runs/vocabulary --sizes 16384

For each size, the demo's teacher is trimmed, searched in the demo's bin, cut and trained, with two
seeds at each learning rate, of which the one that ends lowest is shown. All are evaluated on the
whole validation split, which is the same text for all, so bits per byte compare. The table shows
each after the FLOPs, and after the seconds, that the cheapest arm had spent at its end; between
evaluations the curve is a straight line. Seconds count training and evaluations alone, so let
nothing else compute meanwhile. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from headstart.model.checkpoint import Checkpoint
from headstart.recipe import load_recipe
from headstart.runs.stages import run_recipe
from headstart.system.files import shipped
from headstart.text.prepare import prepare

SIZES = (49152, 32768, 16384, 8192)
SEEDS = (0, 1)
RATES = (1e-3, 2e-3)
SETTINGS = {
    "data.validation_fraction": "0.015",  # so that all of it can be evaluated
    "pretrain.validation_tokens": "1000000",
    "pretrain.evaluations": "4",
    "pretrain.seeds": str(list(SEEDS)),
}


def measured(size: int, rates: list[float], output: Path) -> dict[str, Any]:
    """Run the demo's recipe with a vocabulary of some size, or find that done."""
    folder = output / str(size)
    arms = f"[{{name: subnet, learning_rates: {rates}}}]"
    flags = {**SETTINGS, "vocabulary.size": str(size), "output": str(folder), "pretrain.arms": arms}
    recipe = load_recipe(shipped("demo.yaml"), [f"--{key}={value}" for key, value in flags.items()])
    if not (folder / "result.json").is_file():
        run_recipe(recipe)
    result = json.loads((folder / "result.json").read_text())
    teacher = json.loads((folder / "student" / "subnet.json").read_text())["teacher"]
    split = prepare(recipe.data, Checkpoint.open(teacher).folder).manifest["splits"]["validation"]
    bits = split["tokens"] / split["text_bytes"] / math.log(2)
    return {
        "size": size,
        "bytes_per_token": split["text_bytes"] / split["tokens"],
        "teacher": result["teacher"]["bits_per_byte"],
        "sizes": result["student"]["sizes"],
        "parameters": result["student"]["parameters"],
        "arms": {arm["name"]: _curves(arm, bits) for arm in result["arms"]},
    }


def _curves(arm: dict[str, Any], bits: float) -> dict[str, Any]:
    """An arm's evaluations in bits per byte, against FLOPs of training and against seconds."""
    curve = arm["curve"]
    return {
        "flops": [point["flops"] - curve[0]["flops"] for point in curve],
        "seconds": [arm["seconds"] * point["tokens"] / arm["tokens"] for point in curve],
        "bits_per_byte": [bits * point["loss"] for point in curve],
        "spread": bits * arm["loss_spread"],
        "rate": arm["learning_rate"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the best is shown")
    options = parser.parse_args()
    found = [measured(size, list(options.rates), options.output) for size in options.sizes]
    print("| rows | bytes a token | teacher | shape | parameters |")
    print("| --: | --: | --: | :-- | --: |")
    for run in found:
        shape = "{layers} x {embed}, {mlp} neurons, {kv_groups} groups".format(**run["sizes"])
        print(
            f"| {run['size']:,} | {run['bytes_per_token']:.3f} | {run['teacher']:.3f} | {shape} "
            f"| {run['parameters']:,} |"
        )
    for name in found[0]["arms"]:
        arms = [run["arms"][name] for run in found]
        least = {spent: min(arm[spent][-1] for arm in arms) for spent in ("flops", "seconds")}
        print(
            f"\n{name}, bits per byte after {least['flops']:.3g} FLOPs and "
            f"{least['seconds']:.0f} seconds of training, {len(SEEDS)} seeds\n\n"
            "| rows | rate | before | equal FLOPs | equal seconds | at the end | ± over seeds |\n"
            "| --: | --: | --: | --: | --: | --: | --: |"
        )
        for run, arm in zip(found, arms, strict=True):
            losses = arm["bits_per_byte"]
            equal = [float(np.interp(least[spent], arm[spent], losses)) for spent in least]
            cells = (losses[0], *equal, losses[-1], arm["spread"])
            columns = [f"{run['size']:,}", f"{arm['rate']:g}", *(f"{cell:.3f}" for cell in cells)]
            print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
