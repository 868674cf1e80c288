"""Which cheap score tells how low a student's loss will be after training?

    python benchmarks/shapes.py --data articles.jsonl --output runs/shapes

Takes shapes spread over the bin, scores each in every way that a search could afford, starts it as
the product does and trains it. Prints the rank correlation of every
score with the loss after training, and the loss of the student that each score would have chosen.
The teacher is the demo's with 8,192 rows. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics
from headstart.calibration.start import Init, calibrate
from headstart.losses.next_token import mean_loss, next_token_loss
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import build_student
from headstart.recipe import Recipe, recipe_from_dict
from headstart.runs.extraction import extract_student
from headstart.runs.run import Run, open_run
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.fitness import DivergenceFromTeacher, HeldOutLoss
from headstart.searching.orders import measure_orders
from headstart.searching.run import space_of
from headstart.searching.space import Space
from headstart.system.device import default_device, load_frozen
from headstart.system.files import write_json
from headstart.training.arms import ArmInputs, run_arm

SAMPLED = 4_000
CALIBRATION_TOKENS, FEWER_TOKENS = 16_384, (1024, 4096)
LAST_NORM_STEPS = 50
NUM_FINALISTS = 4
RATES: Mapping[Init, float] = {"slice": 2e-3, "least_squares": 1e-3}
"""Of learning, that validated best for the proportional shape (budgets.py)."""


def recipe_of(options: argparse.Namespace) -> Recipe:
    low, high = options.bin
    return recipe_from_dict(
        {
            "teacher": "demo",
            "output": str(options.output),
            "data": {"source": str(options.data), "block_length": 256, "max_tokens": 20_000_000},
            "vocabulary": {"size": options.rows},
            "search": {
                "init": options.init,
                "bin": {"low": low, "high": high},
                "tokens": 16_384,
                "calibration_tokens": CALIBRATION_TOKENS,
            },
            "pretrain": {
                "tokens": options.tokens,
                "validation_tokens": 16_384,
                "evaluations": 8,
                "arms": [
                    {"name": options.init, "learning_rate": options.rate or RATES[options.init]}
                ],
            },
            "train": {
                "per_device_train_batch_size": 2,
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {
                    "num_decay_steps": options.tokens // 512 // 5, "decay_type": "1-sqrt",
                },
                "warmup_steps": 20,
            },
        }
    )  # fmt: skip


def spread_shapes(space: Space, count: int) -> list[Candidate]:
    """The proportional shape; then in turn one that lies far from all before, in the logarithms of
    the sizes, and one that the search's own sampling draws."""
    rng = random.Random(0)
    pool = space.proportional(1) + [space.sample(rng) for _ in range(SAMPLED)]
    places = np.log([list(candidate.sizes().values()) for candidate in pool])
    chosen, distance, drawn = [0], np.full(len(pool), np.inf), iter(range(1, len(pool)))
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(places - places[chosen[-1]], axis=1))
        place = int(distance.argmax()) if len(chosen) % 2 else next(drawn)
        if distance[place] > 0:
            chosen.append(place)
    return [pool[place] for place in chosen]


@dataclass(frozen=True)
class DivergenceByMoments(DivergenceFromTeacher):
    """Scores candidates that are refitted by the moments of the teacher's activations.

    Attributes:
        statistics: these moments.
    """

    statistics: Statistics = field(kw_only=True)

    def student(self, candidate: Candidate) -> PreTrainedModel:
        spec = candidate.spec(self.teacher, self.orders)
        tensors = refitted(self.state.items(), self.teacher, spec, self.statistics)
        return build_student(tensors, self.teacher, spec)


class Scores:
    """Every way to score a candidate before it is trained."""

    def __init__(self, run: Run) -> None:
        settings, self.run = run.recipe.search, run
        self.calibration_blocks = run.text.sample("train", settings.calibration_tokens)
        source = calibrate(run.teacher, "least_squares", self.calibration_blocks)
        self.teacher = run.teacher.architecture
        self.model = load_frozen(run.teacher.folder, default_device())
        identity = {"teacher_hash": run.teacher.hash, "data": run.text.fingerprint}
        self.orders: Orders = measure_orders(self.model, settings, run.text, identity)
        held_out = run.text.sample("search", settings.tokens)
        parts = (self.model, self.teacher, self.orders, held_out, 8)
        assert source.statistics is not None
        self.by_moments = DivergenceByMoments(*parts, statistics=source.statistics)
        self.sliced = HeldOutLoss(*parts)
        self.held_out = held_out

    def started(
        self, candidate: Candidate, init: Init, folder: Path, num_tokens: int = CALIBRATION_TOKENS
    ) -> Path:
        """The student as a run with so many calibration tokens would start it, in a folder of its
        own."""
        student = folder / (init if num_tokens == CALIBRATION_TOKENS else f"{init}-{num_tokens}")
        if not student.exists():
            spec = candidate.spec(self.teacher, self.orders)
            blocks = self.run.text.sample("train", num_tokens)
            extract_student(calibrate(self.run.teacher, init, blocks, spec), spec, student)
        return student

    def of(self, candidate: Candidate, folder: Path) -> dict[str, float]:
        """Lower is better in each, were it to tell anything.

        Args:
            candidate: a shape.
            folder: of its students.
        """
        blocks = self.held_out
        targets = blocks[:, 1:].numel()
        sizes = {**self.teacher.sizes, **candidate.sizes()}
        sliced = self.sliced.student(candidate)
        count = self.teacher.count(blocks.shape[1], sizes)
        layer_by_layer = {
            f"refitted layer by layer, {num_tokens:,} tokens": mean_loss(
                load_frozen(
                    self.started(candidate, "least_squares", folder, num_tokens), default_device()
                ),
                blocks,
                8,
            )
            for num_tokens in (*FEWER_TOKENS, CALIBRATION_TOKENS)
        }
        shares = [candidate.sizes()[axis] / self.teacher.sizes[axis] for axis in SEARCHED]
        return {
            "slice": mean_loss(sliced, blocks, 8),
            "slice, last norm refitted": self._with_last_norm(sliced),
            "refitted by moments": mean_loss(self.by_moments.student(candidate), blocks, 8),
            **layer_by_layer,
            "refitted by moments, KL": self.by_moments(candidate, 0, len(blocks)) / targets,
            "distance from proportions": float(np.std(shares)),
            "- parameters outside embeddings": -count.non_embedding_parameters,
            "- width": -sizes["embed"],
            "- depth": -sizes["layers"],
            "log MLP ratio, distance": abs(
                math.log(sizes["mlp"] / sizes["embed"])
                - math.log(self.teacher.sizes["mlp"] / self.teacher.sizes["embed"])
            ),
        }

    def _with_last_norm(self, student: Any) -> float:
        """The loss after the last norm's gains alone were trained on calibration text."""
        gains = student.base_model.norm.weight
        whole = gains.detach().clone()
        with torch.no_grad():
            hidden = [
                student.base_model(part, use_cache=False).last_hidden_state / whole
                for part in self.calibration_blocks.split(8)
            ]
        matrix = student.get_output_embeddings().weight.detach()
        trained = torch.nn.Parameter(whole.clone())
        optimizer = torch.optim.Adam([trained], lr=0.02 * float(whole.abs().mean()))
        parts = list(zip(hidden, self.calibration_blocks.split(8), strict=True))
        for step in range(LAST_NORM_STEPS):
            normed, batch = parts[step % len(parts)]
            loss = next_token_loss(normed * trained, matrix, batch) / batch[:, 1:].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            gains.copy_(trained)
            loss = mean_loss(student, self.held_out, 8)
            gains.copy_(whole)
        return loss


SEARCHED = ("layers", "embed", "kv_groups", "mlp")


def measured(candidate: Candidate, scores: Scores, folder: Path) -> dict[str, Any]:
    """Everything about one shape, or what was found before."""
    run = scores.run

    def trained() -> dict[str, Any]:
        student = Checkpoint.open(scores.started(candidate, run.recipe.search.init, folder))
        inputs = ArmInputs(student, run.teacher, run.text, run.recipe.pretrain, run.recipe.train)
        arm = run_arm(run.recipe.pretrain.arms[0], inputs, folder / "arm")
        parameters = student.architecture.count(256).parameters
        sizes = candidate.sizes()
        return {"sizes": sizes, "parameters": parameters, "curve": arm["curve"]}

    found = remembered(folder / "found.json", trained)
    scored = remembered(folder / "scores.json", lambda: scores.of(candidate, folder))
    return {**found, "scores": scored}


def remembered(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, or what is made and then put there."""
    if not file.is_file():
        write_json(file, make())
    return json.loads(file.read_text())


def ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def all_scores(found: Sequence[Mapping[str, Any]], step_tokens: int) -> dict[str, list[float]]:
    """Every score of every shape, those of short trainings and of sums of ranks among them."""
    table = {name: [shape["scores"][name] for shape in found] for name in found[0]["scores"]}
    for place, point in enumerate(found[0]["curve"][:-1]):
        steps = point["tokens"] // step_tokens
        name = f"after {steps} steps" if steps else "as started"
        table[name] = [shape["curve"][place]["loss"] for shape in found]
    for pair in (
        ("refitted by moments", "- parameters outside embeddings"),
        ("refitted by moments", "- width"),
        ("refitted by moments", "distance from proportions"),
        ("slice", "distance from proportions"),
        ("slice", "- parameters outside embeddings"),
        ("slice", f"refitted layer by layer, {FEWER_TOKENS[0]:,} tokens"),
    ):
        table[" + ".join(pair) + " (ranks)"] = list(sum(ranks(table[name]) for name in pair))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="text, as for headstart")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", type=int, default=8192, help="of the vocabulary")
    parser.add_argument("--bin", nargs=2, default=("6.5M", "7.5M"), metavar=("LOW", "HIGH"))
    parser.add_argument("--tokens", type=int, default=256_000, help="of training, for each shape")
    parser.add_argument("--init", choices=RATES, default="least_squares", help="of the students")
    parser.add_argument("--rate", type=float, help="of learning, instead of the start's own")
    parser.add_argument("--shapes", type=int, default=24)
    options = parser.parse_args()
    with open_run(recipe_of(options)) as run:
        scores = Scores(run)
        space = space_of(run.teacher.architecture, run.recipe.search, 256)
        shapes = spread_shapes(space, options.shapes)
        found = []
        for number, candidate in enumerate(shapes):
            folder = options.output / f"shape-{number:02}"
            found.append(measured(candidate, scores, folder))
            print(number, found[-1]["sizes"], f"{found[-1]['curve'][-1]['loss']:.3f}", flush=True)
    last = [shape["curve"][-1]["loss"] for shape in found]
    print("\n| layers | width | groups | neurons | parameters | started | after |")
    print("| --: | --: | --: | --: | --: | --: | --: |")
    for place in np.argsort(last):
        shape = found[place]
        sizes = [f"{shape['sizes'][axis]:,}" for axis in SEARCHED]
        losses = [f"{shape['curve'][0]['loss']:.3f}", f"{last[place]:.3f}"]
        print(f"| {' | '.join([*sizes, format(shape['parameters'], ','), *losses])} |")
    print(f"\n| score | rank correlation | its first | best of its first {NUM_FINALISTS} |")
    print("| :-- | --: | --: | --: |")
    for name, values in all_scores(found, 512).items():
        order = np.argsort(values)
        best = min(last[place] for place in order[:NUM_FINALISTS])
        print(
            f"| {name} | {correlation(values, last):.2f} | +{last[order[0]] - min(last):.3f} "
            f"| +{best - min(last):.3f} |"
        )


if __name__ == "__main__":
    main()
