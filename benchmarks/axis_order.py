"""Which axis order is the best default: the teacher's own, or most important first, by which kind?

    python benchmarks/axis_order.py

Cuts the same random in-bin shapes out of the demo's teacher in each order, and prints the loss of
each before any training, on held-out text of the demo's corpus.
"""

from __future__ import annotations

import random
import statistics
from typing import get_args

from headstart.losses.next_token import mean_loss
from headstart.model.cut import build_student
from headstart.searching.candidate import Orders
from headstart.searching.importance import UnitImportance, measure_importance
from headstart.searching.space import Space
from real_teacher import BIN, CALIBRATION_TOKENS, load

NUM_SHAPES = 12
NUM_TOKENS = 2048
SEED = 0


def main() -> None:
    teacher = load()
    calibration = teacher.blocks.sample("train", CALIBRATION_TOKENS).split(8)
    orders = {"teacher": Orders.of_teacher(teacher.architecture.sizes)}
    for units in get_args(UnitImportance):
        orders[units] = measure_importance(teacher.model, calibration, units).orders()
    fitness = teacher.fitness(NUM_TOKENS)
    space = Space.build(teacher.architecture, "coarse-uniform", BIN)
    rng = random.Random(SEED)

    header = " ".join(f"{name:>10}" for name in orders)
    print(f"{'layers':>6} {'embed':>6} {'groups':>6} {'mlp':>6}   {header}  (nats)")
    losses: dict[str, list[float]] = {name: [] for name in orders}
    for _ in range(NUM_SHAPES):
        candidate = space.sample(rng)
        for name, order in orders.items():
            spec = candidate.spec(teacher.architecture, order)
            student = build_student(fitness.state.items(), teacher.architecture, spec)
            losses[name].append(mean_loss(student, fitness.blocks, fitness.batch_size))
        sizes = candidate.sizes()
        shape = " ".join(f"{sizes[axis]:6d}" for axis in ("layers", "embed", "kv_groups", "mlp"))
        print(
            f"{shape}   {' '.join(f'{found[-1]:10.3f}' for found in losses.values())}", flush=True
        )
    for name in list(orders)[1:]:
        pairs = zip(losses["teacher"], losses[name], strict=True)
        gains = [before - after for before, after in pairs]
        wins = sum(gain > 0 for gain in gains)
        gain = statistics.median(gains)
        print(f"{name} is lower in {wins} of {NUM_SHAPES} shapes, by {gain:.2f} nats in the median")


if __name__ == "__main__":
    main()
