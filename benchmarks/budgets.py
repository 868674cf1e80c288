"""What a head start is worth, against the budget.

    python benchmarks/budgets.py --data articles.jsonl --output runs/budgets
    python benchmarks/budgets.py --data articles.jsonl --output runs/budgets --only scratch

The demo's teacher keeps 8,192 rows, and the student has the shape in the bin that is nearest to
the teacher's proportions: no search chooses it. For every start the learning rate is first chosen
on the validation split, at a small budget, and then each budget is trained to its end, with a rate
that falls to zero. All figures are of the test split. A factor is what scratch had paid for its
loss at a budget over what the start pays for the same, with everything charged; between two budgets
of the start, loss falls in a straight line with the logarithm of the tokens. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figure import write_figure
from headstart.calibration.start import Init
from headstart.recipe import recipe_from_dict
from headstart.runs.comparison import match_of, points_of
from headstart.runs.stages import run_recipe
from headstart.system.formats import parse_count

SCRATCH = "scratch"


@dataclass(frozen=True)
class Start:
    """One way to begin.

    Attributes:
        init: of the student; for scratch it only gives the shape.
        rates: of learning, of which one is chosen.
        budgets: in tokens.
    """

    init: Init
    rates: Sequence[float]
    budgets: Sequence[str]


STARTS = {
    SCRATCH: Start("slice", (1e-3, 2e-3, 4e-3), ("250K", "500K", "1M", "2M", "4M", "8M")),
    "least squares": Start(
        "least_squares", (5e-4, 1e-3, 2e-3), ("125K", "250K", "500K", "1M", "2M")
    ),
    "slice": Start("slice", (1e-3, 2e-3, 4e-3), ("125K", "250K", "500K", "1M", "2M")),
}
SWEEP_BUDGET = "500K"
PAPER_TOKENS, PAPER_FLOPS = 9.2, 5.16
"""What "Where to Begin" (arXiv 2510.07227) reports."""


def result_of(name: str, folder: Path, options: argparse.Namespace, **pretrain: Any) -> Any:
    """The content of result.json of one run, trained now or found."""
    start, (low, high) = STARTS[name], options.bin
    arm = {"name": name, "init": "random" if name == SCRATCH else "subnet", **pretrain.pop("arm")}
    recipe = {
        "teacher": "demo",
        "output": str(folder),
        "data": {"source": str(options.data), "block_length": 256, "max_tokens": 20_000_000},
        "vocabulary": {"size": options.rows},
        "search": {
            "init": start.init,
            "bin": {"low": low, "high": high},
            "tokens": 4096,
            "calibration_tokens": options.calibration_tokens,
            "evolution": {"method": "importance", "population": 1, "generations": 1, "elites": 1},
            "finalists": {"count": 0},
        },
        "pretrain": {
            "validation_tokens": 16_384,
            "test_tokens": 65_536,
            "evaluations": 8,
            "arms": [arm],
            **pretrain,
        },
        "train": {"per_device_train_batch_size": 4},
    }
    if not (folder / "result.json").is_file():
        run_recipe(recipe_from_dict(recipe))
    return json.loads((folder / "result.json").read_text())


def arm_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One start at all of its budgets, at the rate that validates best at a small one."""
    start, folder = STARTS[name], options.output / name.replace(" ", "-")
    if options.rate is None:
        rates = {"learning_rates": list(start.rates)}
        swept = result_of(name, folder / "sweep", options, arm=rates, budgets=[SWEEP_BUDGET])
        (arm,) = swept["arms"]
        tried = ", ".join(f"{t['learning_rate']:g}: {t['loss_final']:.3f}" for t in arm["sweep"])
        print(f"{name}: validation loss at {SWEEP_BUDGET} tokens by rate {tried}", flush=True)
        rate = arm["learning_rate"]
    else:
        rate = options.rate
    largest = parse_count(options.largest)
    budgets = [budget for budget in start.budgets if parse_count(budget) <= largest]
    result = result_of(name, folder / "main", options, arm={"learning_rate": rate}, budgets=budgets)
    return {**result["arms"][0], "teacher": result["teacher"], "student": result["student"]}


def print_tables(arms: dict[str, dict[str, Any]], figure: Path | None) -> None:
    """What every run ends with, and what each start saves at each of scratch's budgets."""
    print("\n| start | rate | before | budget | test loss | standard error | FLOPs |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for name, arm in arms.items():
        for budget in arm["budgets"]:
            cells = (
                name, f"{arm['learning_rate']:g}", f"{arm['loss_before']:.3f}",
                f"{budget['tokens']:,}", f"{budget['loss']:.3f}",
                f"{budget['standard_error']:.3f}", f"{budget['flops']:.3g}",
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |")
    if SCRATCH not in arms:
        return
    others = [name for name in arms if name != SCRATCH]
    heads = [f"{name}: tokens | {name}: FLOPs" for name in others]
    print(f"\n| scratch's budget | its loss | {' | '.join(heads)} |")
    print(f"| --: | --: |{' --: |' * 2 * len(others)}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for goal in arms[SCRATCH]["budgets"]:
        cells = [f"{goal['tokens']:,}", f"{goal['loss']:.3f}"]
        for name in others:
            match = match_of(points_of(arms[name]), goal, is_logarithmic=True)
            for unit in ("tokens", "flops"):
                factor = match[f"{unit}_factor"]
                bound = "at least " if match["is_bound"] else ""
                cells.append(f"{bound}{factor:.2f}x" if factor else "–")
                line = lines.setdefault(f"{name}, {unit.replace('flops', 'FLOPs')}", [])
                if factor and not match["is_bound"]:
                    line.append((goal["tokens"], factor))
        print(f"| {' | '.join(cells)} |")
    drawn = {name: line for name, line in lines.items() if line}
    if figure and drawn:
        x_title, y_title = "tokens that scratch trains on", "times fewer for the same loss"
        levels = {f"{level:g}x": level for level in (1, PAPER_FLOPS, PAPER_TOKENS)}
        write_figure(figure, drawn, x_title, y_title, levels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="text, as for headstart")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS), metavar="START")
    parser.add_argument("--largest", default="8M", help="budget, in tokens")
    parser.add_argument("--rows", type=int, default=8192, help="of the vocabulary")
    parser.add_argument("--bin", nargs=2, default=("6.5M", "7.5M"), metavar=("LOW", "HIGH"))
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--rate", type=float, help="of learning, instead of choosing one")
    parser.add_argument("--figure", type=Path, help="SVG file to draw the factors into")
    options = parser.parse_args()
    print_tables({name: arm_of(name, options) for name in options.only}, options.figure)


if __name__ == "__main__":
    main()
