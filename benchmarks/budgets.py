"""What a head start is worth, against the budget.

    python benchmarks/budgets.py --data articles.jsonl --output runs/budgets
    python benchmarks/budgets.py --data articles.jsonl --output runs/budgets --only scratch
    python benchmarks/budgets.py --data articles.jsonl --output runs/budgets-5 --ratio 5

The demo's teacher keeps 8,192 rows. Students are about 15 or 5 times smaller than it, and of the
shape in the bin that is nearest to the teacher's proportions, unless a start says otherwise. For
every start the learning rate is first chosen on the validation split, at a small budget, and then
each budget is trained to its end, with a rate that falls to zero. All figures are of the test
split. A factor is what the better scratch had paid for its loss at a budget over what the start
pays for the same, with everything charged; between two budgets of the start, loss falls in a
straight line with the logarithm of the tokens. A second seed takes the smaller budgets, and losses
are means over seeds. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from figure import write_figure
from headstart.calibration.start import Init
from headstart.recipe import recipe_from_dict
from headstart.runs.comparison import match_of, points_of
from headstart.runs.stages import run_recipe
from headstart.system.files import write_json

PAPER_TOKENS, PAPER_FLOPS = 9.2, 5.16
"""What "Where to Begin" (arXiv 2510.07227) reports."""
FIRST_SEED = 42
"""Transformers' own."""
BATCH = 4
"""Blocks in a step."""


@dataclass(frozen=True)
class Start:
    """One way to begin.

    Attributes:
        init: of the student; unused where weights are random.
        is_random: whether weights are.
        rates: of learning, of which one is chosen.
        kd: distillation, from the first step on.
        evolution: of the search for the shape; without one, the proportional shape is taken.
        scored_as: how that search scores candidates; a shape that is given needs no more.
        scored_tokens: on which it does.
        calibration_tokens: for the importance pass and `init`.
        hand_shaped: whether the model has the ratio's `hand_shape`.
        cached: whether distillation reads the teacher's likeliest tokens from a cache.
    """

    init: Init = "slice"
    is_random: bool = False
    rates: Sequence[float] = (1e-3, 2e-3)
    kd: Mapping[str, float] | None = None
    evolution: Mapping[str, Any] = field(
        default_factory=lambda: {
            "method": "importance", "population": 1, "generations": 1, "elites": 1,
        }
    )  # fmt: skip
    scored_as: Literal["slice", "refitted"] = "slice"
    scored_tokens: int = 4096
    calibration_tokens: int = 16_384
    hand_shaped: bool = False
    cached: bool = False


STARTS = {
    "scratch": Start(is_random=True),
    "scratch, hand-shaped": Start(is_random=True, hand_shaped=True),
    "slice": Start(),
    "slice + distillation": Start(kd={"alpha": 0.5, "beta": 0.5}),
    "slice + distillation from a cache": Start(
        kd={"alpha": 0.5, "beta": 0.5, "top_k": 64}, cached=True
    ),
    "slice, searched shape": Start(  # at a third of the default search's FLOPs
        evolution={"generations": 3}, scored_as="refitted", scored_tokens=2048,
        calibration_tokens=4096,
    ),
    "slice + search + distillation": Start(kd={"alpha": 0.5, "beta": 0.5}, evolution={}),
    "least squares": Start("least_squares"),
    "least squares, 65,536 tokens": Start("least_squares", calibration_tokens=65_536),
    "least squares + distillation": Start("least_squares", kd={"alpha": 0.5, "beta": 0.5}),
    "rotated": Start("rotate+least_squares"),
}  # fmt: skip
"""`slice + search + distillation` is the paper's method, with evolution over slices."""


@dataclass(frozen=True)
class Ratio:
    """What is measured at one size of student.

    Attributes:
        bin: of parameters.
        hand_shape: layers, width, heads and neurons of a Llama that somebody would choose.
        sweep: budget at which rates are chosen.
        budgets: the smallest and the largest of each start, in tokens; those between double.
        short: budgets below it are a run of their own, since the smallest of a run decides how long
            it warms up.
    """

    bin: tuple[str, str]
    hand_shape: tuple[int, int, int, int]
    sweep: int
    budgets: Mapping[str, tuple[int, int]]
    short: int = 0

    def budgets_of(self, name: str, is_first_seed: bool) -> list[int]:
        """Ascending."""
        budget, largest = self.budgets[name]
        if not is_first_seed:
            largest = min(largest, OTHER_SEEDS_TOKENS)
        budgets = []
        while budget <= largest:
            budgets.append(budget)
            budget *= 2
        return budgets


RATIOS = {
    "15": Ratio(
        ("6.5M", "7.5M"), (6, 256, 4, 704), 250_000,
        {
            "scratch": (250_000, 8_000_000),
            "scratch, hand-shaped": (250_000, 1_000_000),
            "slice": (125_000, 2_000_000),
            "slice + distillation from a cache": (125_000, 1_000_000),
            "slice, searched shape": (250_000, 2_000_000),
            "slice + search + distillation": (125_000, 500_000),
            "least squares": (31_250, 4_000_000),
            "least squares, 65,536 tokens": (125_000, 2_000_000),
            "least squares + distillation": (125_000, 1_000_000),
            "rotated": (125_000, 500_000),
        },
        short=125_000,
    ),
    "5": Ratio(
        ("21M", "23M"), (11, 384, 6, 1024), 250_000,
        {
            "scratch": (250_000, 2_000_000),
            "slice": (125_000, 2_000_000),
            "slice + distillation": (125_000, 250_000),
            "slice + distillation from a cache": (125_000, 250_000),
            "least squares": (62_500, 500_000),
            "least squares + distillation": (62_500, 250_000),
        },
    ),
}  # fmt: skip
OTHER_SEEDS_TOKENS = 1_000_000
"""The largest budget that seeds after the first are trained to."""


def hand_shape(ratio: Ratio, folder: Path) -> str:
    """A config file of the shape that somebody would choose."""
    layers, width, heads, neurons = ratio.hand_shape
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width,
        "intermediate_size": neurons, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "tie_word_embeddings": True, "vocab_size": 8192,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    return str(folder)


def result_of(
    name: str,
    start: Start,
    folder: Path,
    options: argparse.Namespace,
    batch: int = BATCH,
    **pretrain: Any,
) -> Any:
    """The content of result.json of one run with so many blocks in a step, trained now or found."""
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    ratio = RATIOS[options.ratio]
    low, high = ratio.bin
    arm = {"name": name, "init": "random" if start.is_random else "subnet", **pretrain.pop("arm")}
    if start.kd:
        cache = {"cache": str(options.output / "teacher-cache")} if start.cached else {}
        arm["kd"] = {**start.kd, **cache}
    if start.hand_shaped:
        arm["shape"] = hand_shape(ratio, options.output / "hand-shape")
    recipe = {
        "teacher": "demo",
        "output": str(folder),
        "data": {"source": str(options.data), "block_length": 256, "max_tokens": 20_000_000},
        "vocabulary": {"size": 8192},
        "search": {
            "init": start.init,
            "bin": {"low": low, "high": high},
            "calibration_tokens": start.calibration_tokens,
            "evolution": dict(start.evolution),
            "scored_as": start.scored_as,
            "tokens": start.scored_tokens,
            "racing": {"rungs": 3 if start.scored_as == "slice" else 1},
        },
        "pretrain": {
            "validation_tokens": 16_384,
            "test_tokens": 65_536,
            "evaluations": 8,
            "arms": [arm],
            **pretrain,
        },
        "train": {"per_device_train_batch_size": batch},
    }
    run_recipe(recipe_from_dict(recipe))
    return json.loads((folder / "result.json").read_text())


def arm_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One start at all of its budgets, at the rate that validates best at a small one."""
    start, ratio = STARTS[name], RATIOS[options.ratio]
    folder = options.output / re.sub("[^a-z0-9]+", "-", name)
    rate = options.rate
    if rate is None:
        rates = {"learning_rates": list(start.rates)}
        swept = result_of(
            name, start, folder / "sweep", options, options.batch, arm=rates, budgets=[ratio.sweep]
        )
        (arm,) = swept["arms"]
        tried = ", ".join(f"{t['learning_rate']:g}: {t['loss_final']:.3f}" for t in arm["sweep"])
        print(f"{name}: validation loss at {ratio.sweep:,} tokens by rate {tried}", flush=True)
        rate = arm["learning_rate"]
    arms = []
    for seed in options.seeds:
        is_first = seed == FIRST_SEED
        every = ratio.budgets_of(name, is_first)
        short, long = (
            [b for b in every if (b < ratio.short) is is_short] for is_short in (True, False)
        )
        runs = {"main" if is_first else f"seed-{seed}": long, "short": short if is_first else []}
        found = [
            result_of(
                name, start, folder / run, options, options.batch,
                arm={"learning_rate": rate}, budgets=budgets,
                **({} if is_first else {"seeds": [seed]}),
            )["arms"][0]
            for run, budgets in runs.items() if budgets
        ]  # fmt: skip
        if found:
            budgets = [budget for arm in reversed(found) for budget in arm["budgets"]]
            arms.append({**found[0], "budgets": budgets})
    return over_seeds(arms)


def over_seeds(arms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first seed's entry, with each budget's loss as the mean over the seeds that have it, and
    their `losses`."""
    first, *_ = arms
    budgets = []
    for budget in first["budgets"]:
        losses = [
            entry["loss"]
            for arm in arms
            for entry in arm["budgets"]
            if entry["tokens"] == budget["tokens"]
        ]
        budgets.append({**budget, "loss": fmean(losses), "losses": losses})
    return {**first, "budgets": budgets}


def best_scratch(arms: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """At each of the first scratch's budgets, the entry of the scratch that ends lowest there."""
    entries = [
        budget for name, arm in arms.items() if STARTS[name].is_random for budget in arm["budgets"]
    ]
    return [
        min((e for e in entries if e["tokens"] == tokens), key=lambda entry: entry["loss"])
        for tokens in sorted({entry["tokens"] for entry in entries})
    ]


def print_tables(arms: Mapping[str, dict[str, Any]], figure: Path | None) -> None:
    """What every run ends with, and what each start saves at each of scratch's budgets."""
    print("\n| start | parameters | rate | before | budget | test loss | of seeds | FLOPs |")
    print("| :-- | --: | --: | --: | --: | --: | --: | --: |")
    for name, arm in arms.items():
        for budget in arm["budgets"]:
            cells = (
                name, f"{arm['parameters']:,}", f"{arm['learning_rate']:g}",
                f"{arm['loss_before']:.3f}", f"{budget['tokens']:,}", f"{budget['loss']:.3f}",
                " ".join(f"{loss:.3f}" for loss in budget["losses"]), f"{budget['flops']:.3g}",
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |")
    others = [name for name in arms if not STARTS[name].is_random]
    goals = best_scratch(arms)
    if not goals:
        return
    heads = [f"{name}: tokens | FLOPs" for name in others]
    print(f"\n| scratch's budget | its loss | {' | '.join(heads)} |")
    print(f"| --: | --: |{' --: |' * 2 * len(others)}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for goal in goals:
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
    parser.add_argument("--ratio", choices=RATIOS, default="15", help="teacher to student, about")
    parser.add_argument("--only", nargs="+", choices=STARTS, metavar="START")
    parser.add_argument("--rate", type=float, help="of learning, instead of choosing one")
    parser.add_argument("--batch", type=int, default=BATCH, help="blocks of 256 tokens in a step")
    parser.add_argument("--seeds", nargs="+", type=int, default=[FIRST_SEED, 1])
    parser.add_argument("--figure", type=Path, help="SVG file to draw the factors into")
    options = parser.parse_args()
    names = options.only or [name for name in STARTS if name in RATIOS[options.ratio].budgets]
    print_tables({name: arm_of(name, options) for name in names}, options.figure)


if __name__ == "__main__":
    main()
