"""How much of a better start survives training: five starts, with and without distillation.

    python benchmarks/ablation.py --output runs/ablation
    python benchmarks/ablation.py --output runs/ablation --data articles/ --sizes half \\
        --tokens 500000 --large-tokens 10000000 --large-seeds 0 1 2

Students of one architecture, about two and four times smaller than the demo's teacher, begin with
random weights; with the first units of every axis; with the most important ones; with the same,
refitted by least squares; and as that of the rotated teacher. All embeddings are untied, as
rotation needs them to be, so that at each size every arm has the same parameters. At the small
budget each arm is trained at three learning rates with the first seed, calibrated starts at lower
ones, and at the rate that ends lowest with all seeds, of which the mean is compared; the large
budget takes that rate over.

FLOPs charge an arm with the importance pass, calibration, training and the teacher's forward
passes; a sweep's other rates and evaluations are not charged. Killed and started again, it goes on;
more budgets, sizes, seeds or rates may be added later, and sizes may be trained by processes of
their own, as long as the teacher is there. The table is printed and kept as
`ablation.md`. The ratio is the budget over the tokens in which the best calibrated arm without
distillation reaches what the importance slice ends with, where it is least; a start that is there
before training counts as one step.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from headstart.calibration.costs import propagation_flops
from headstart.calibration.start import Init, calibrate
from headstart.demo import demo_corpus, demo_teacher
from headstart.losses.distillation import DistillationSettings
from headstart.model.checkpoint import Checkpoint, copy_files, write_checkpoint
from headstart.model.spec import Indices, SubnetSpec
from headstart.runs.comparison import match_of, matched_tokens
from headstart.runs.extraction import extract_student
from headstart.runs.result import charged
from headstart.searching.candidate import Orders
from headstart.searching.costs import importance_flops
from headstart.searching.importance import measure_importance
from headstart.system.device import default_device, load_frozen
from headstart.system.files import finished_folder, write_json, write_whole
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.variants import run_variants, variants_of


@dataclass(frozen=True)
class Size:
    """A student's shape, the same in every layer."""

    layers: int
    embed: int
    kv_groups: int
    mlp: int

    def spec(self, orders: Orders) -> SubnetSpec:
        """The first of each order."""
        layers = tuple(sorted(orders.layers[: self.layers]))
        return SubnetSpec(
            layers,
            _first(orders.embed, self.embed),
            tuple(_first(orders.kv_groups[layer], self.kv_groups) for layer in layers),
            tuple(_first(orders.mlp[layer], self.mlp) for layer in layers),
        )


SIZES = {"half": Size(20, 384, 2, 960), "quarter": Size(20, 192, 2, 896)}
"""67.8M and 33.2M parameters, the teacher having 134.5M."""
SCRATCH, IMPORTANCE = "scratch", "importance slice"
STARTS: dict[str, Init] = {
    "first-k slice": "slice",
    IMPORTANCE: "slice",
    "least squares": "least_squares",
    "rotate+least squares": "rotate+least_squares",
}
CALIBRATED = tuple(name for name, init in STARTS.items() if init != "slice")


Trained = dict[str, tuple[dict[str, Any], list[dict[str, float]]]]
"""Of each arm by name: what `run_variants` returns, and its curve with FLOPs."""


@dataclass(frozen=True)
class Budget:
    """How long all arms train, with which seeds, and at which rates if they are known."""

    tokens: int
    seeds: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]


def _first(order: Indices, number: int) -> Indices:
    return tuple(sorted(order[:number]))


def untied_teacher(folder: Path) -> Checkpoint:
    """The demo's teacher with an output matrix of its own, which computes the same."""
    target = folder / "teacher"
    if not target.is_dir():
        with finished_folder(target) as unfinished:
            tied = Checkpoint.open(demo_teacher())
            state, config = dict(tied.tensors()), tied.architecture.config
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
            config.tie_word_embeddings = False
            write_checkpoint(unfinished, state, config)
            copy_files(tied.folder, unfinished)
    return Checkpoint.open(target)


def students(
    size: Size, teacher: Checkpoint, calibration: Int[Tensor, "blocks tokens"], folder: Path
) -> dict[str, Checkpoint]:
    """The extracted student of each start, by name; subnet.json says what it cost."""
    folders = {name: folder / name.replace(" ", "-") for name in STARTS}
    for name, init in STARTS.items():
        if folders[name].is_dir():
            continue
        orders, flops = Orders.of_teacher(teacher.architecture.sizes), 0
        if name != "first-k slice":
            model = load_frozen(teacher.folder, default_device())
            orders = measure_importance(model, calibration.split(4)).orders()
            kinds = ("activation", "block_influence")
            flops = importance_flops(
                teacher.architecture, kinds, calibration.numel(), calibration.shape[1]
            )
        if init == "rotate+least_squares":  # whose channels are in order
            orders = replace(orders, embed=Orders.of_teacher(teacher.architecture.sizes).embed)
        spec = size.spec(orders)
        source = calibrate(teacher, init, calibration, spec=spec)
        flops += source.flops
        if source.blocks is not None:
            cut_from = source.teacher.architecture
            sizes = spec.sizes(cut_from.sizes)
            flops += propagation_flops(cut_from, sizes, *calibration.shape)
        extract_student(source, spec, folders[name], provenance={"calibration_flops": flops})
    return {name: Checkpoint.open(folders[name]) for name in STARTS}


def train(arm: Arm, inputs: ArmInputs, folder: Path) -> dict[str, Any]:
    """Train what is left of an arm: every rate with the first seed, the best one with all."""
    seeds = inputs.settings.seeds
    swept = _train(arm, replace(inputs, settings=replace(inputs.settings, seeds=seeds[:1])), folder)
    best = replace(arm, learning_rates=(swept["learning_rate"],))
    return {**_train(best, inputs, folder), "sweep": swept["sweep"]}


def _train(arm: Arm, inputs: ArmInputs, folder: Path) -> dict[str, Any]:
    """Train all variants of an arm; of what is finished only the curves are kept."""
    for name, single in variants_of(arm, inputs.settings.seeds).items():
        run_arm(single, inputs, folder / name)
        for kind in ("model", "checkpoint-*", "best-*"):
            for weights in (folder / name).glob(kind):
                shutil.rmtree(weights)
    return run_variants(arm, inputs, folder)


def charged_curve(result: dict[str, Any], arm: Arm, inputs: ArmInputs) -> list[dict[str, float]]:
    """An arm's curve with FLOPs, all that the arm needed among them."""
    origin = json.loads((inputs.student.folder / "subnet.json").read_text())
    costs = {"calibration_flops": origin["calibration_flops"], "search_flops": 0}
    return charged(arm, result, inputs, costs)[0]


def compare(
    budget: Budget,
    size_name: str,
    options: argparse.Namespace,
    teacher: Checkpoint,
    blocks: TokenBlocks,
) -> Trained:
    """Train all arms of one size and budget."""
    output = Path(options.output)
    calibration = blocks.sample("train", options.calibration_tokens)
    cut = students(SIZES[size_name], teacher, calibration, output / "students" / size_name)
    settings = PretrainSettings(
        tokens=budget.tokens,
        validation_tokens=options.validation_tokens,
        evaluations=options.evaluations,
        seeds=budget.seeds,
    )
    trained: Trained = {}
    for start in (SCRATCH, *STARTS):
        for kd in (None, DistillationSettings()):
            name = f"{start}{' + kd' if kd else ''}"
            arm = Arm(
                name,
                init="random" if start == SCRATCH else "subnet",
                learning_rates=budget.rates.get(
                    name, tuple(options.low_rates if start in CALIBRATED else options.rates)
                ),
                kd=kd,
            )
            inputs = ArmInputs(
                cut.get(start, cut[IMPORTANCE]),
                teacher,
                blocks,
                settings,
                {"per_device_train_batch_size": options.batch_size, "report_to": "none"},
            )
            folder = output / size_name / str(budget.tokens) / name.replace(" ", "-")
            result = train(arm, inputs, folder)
            trained[name] = (result, charged_curve(result, arm, inputs))
    return trained


def headline(trained: Trained) -> float:
    """The budget over the tokens in which the best calibrated arm matches the importance slice, at
    least those of one step."""
    _, target = trained[IMPORTANCE]
    arms = (trained[name] for name in CALIBRATED)
    matches = [
        max(found, result["tokens_per_step"])  # one may match before training
        for result, curve in arms
        if (found := matched_tokens(curve, target[-1]["loss"])) is not None
    ]
    return float(target[-1]["tokens"] / min(matches, default=float("inf")))


def rows(size_name: str, trained: Trained) -> list[str]:
    """The table's rows of one size and budget."""
    targets = [trained[name][1] for name in (SCRATCH, IMPORTANCE)]
    return [_row(size_name, name, *found, targets) for name, found in trained.items()]


def _row(
    size_name: str,
    name: str,
    result: dict[str, Any],
    curve: list[dict[str, float]],
    targets: list[list[dict[str, float]]],
) -> str:
    spread = result["loss_spread"]
    cells = [size_name, f"{curve[-1]['tokens']:,}", name, f"{result['learning_rate']:g}"]
    cells += [f"{curve[0]['loss']:.3f}", f"{curve[-1]['loss']:.3f}"]
    cells.append("" if spread is None else f"{spread:.3f}")
    for target in targets:
        match = match_of(curve, target[-1], is_logarithmic=False)
        for unit, form in (("tokens", "{:,.0f}"), ("flops", "{:.2e}")):
            spent, factor = match[f"{unit}_to_match"], match[f"{unit}_factor"]
            amount = "never" if spent is None else form.format(spent)
            cells.append(amount if factor is None else f"{amount} ({factor:.2f}x)")
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "size", "budget", "arm", "learning rate", "before", "final", "spread",
    "tokens to scratch's final", "FLOPs to it", "tokens to the importance slice's", "FLOPs to it",
)  # fmt: skip


PINNED = (
    "batch_size", "block_length", "calibration_tokens", "validation_tokens", "evaluations",
)  # fmt: skip


def pin(options: argparse.Namespace, teacher: Checkpoint, blocks: TokenBlocks) -> None:
    """Refuse to go on in a folder whose runs were of another kind."""
    ours = {key: getattr(options, key) for key in PINNED}
    ours |= {"text": blocks.fingerprint, "teacher": teacher.hash}
    kept = Path(options.output) / "options.json"
    if not kept.is_file():
        write_json(kept, ours)
    theirs = json.loads(kept.read_text())
    if theirs != ours:
        raise ValueError(f"{options.output} holds runs with {theirs}; choose another --output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", default="runs/ablation")
    parser.add_argument("--data", default="", help="text; the demo's corpus by default")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", type=int, default=24_576, help="the small budget")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--large-tokens", type=int, default=65_536, help="0 for none")
    parser.add_argument("--large-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument(
        "--low-rates",
        nargs="+",
        type=float,
        default=[1e-4, 3e-4, 1e-3],
        help="of calibrated starts, which have more to lose",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="blocks in a step")
    parser.add_argument("--block-length", type=int, default=256, help="tokens")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--validation-tokens", type=int, default=4_096)
    parser.add_argument("--evaluations", type=int, default=6)
    options = parser.parse_args()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    teacher = untied_teacher(Path(options.output))
    source = options.data or str(demo_corpus())
    blocks = prepare(DataSettings(source, block_length=options.block_length), teacher.folder)
    pin(options, teacher, blocks)
    table = [f"| {' | '.join(COLUMNS)} |", f"|{' :-- |' * len(COLUMNS)}"]
    ratios = []
    rates: dict[str, dict[str, tuple[float, ...]]] = {size_name: {} for size_name in options.sizes}
    for tokens, seeds in (
        (options.tokens, options.seeds),
        (options.large_tokens, options.large_seeds),
    ):
        for size_name in options.sizes if tokens else ():
            budget = Budget(tokens, tuple(seeds), rates[size_name])
            trained = compare(budget, size_name, options, teacher, blocks)
            rates[size_name] = {name: (one["learning_rate"],) for name, (one, _) in trained.items()}
            table += rows(size_name, trained)
            ratios.append(headline(trained))
            write_whole(Path(options.output) / "ablation.md", "\n".join(table) + "\n")
    print("\n".join(table))
    print(f"ratio: {min(ratios):.2f}x (goal 1.00x)")


if __name__ == "__main__":
    main()
