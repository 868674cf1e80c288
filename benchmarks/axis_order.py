"""Which axis order is the better default: the teacher's own, or most important first?

    python benchmarks/axis_order.py

Cuts the same random in-bin shapes out of the demo's teacher in both orders, and prints the loss of
each before any training, on held-out text of the demo's corpus.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from headstart.cli import demo_recipe
from headstart.data import prepare
from headstart.evaluate import mean_loss
from headstart.pipeline import data_settings, teacher_folder
from headstart.recipe import load_recipe
from headstart.search.importance import activation_importance
from headstart.search.search import space_of
from headstart.search.space import Orders
from headstart.subnet.extract import build_student

NUM_SHAPES = 12
SEED = 0


def main() -> None:
    recipe = load_recipe(Path(demo_recipe()))
    folder = teacher_folder(recipe)
    blocks = prepare(data_settings(recipe.data), folder)
    calibration, held_out = (
        torch.from_numpy(blocks.split(split)[:count].astype("int64"))
        for split, count in (("train", 32), ("search", 8))
    )
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    importance = activation_importance(teacher, calibration.split(8))
    orders = {"teacher": Orders.of_teacher(teacher.config), "importance": importance.orders()}
    state = {k: v for k, v in teacher.state_dict().items() if k != "lm_head.weight"}
    space, rng = space_of(teacher.config, recipe.search), random.Random(SEED)

    print(f"{'layers':>6} {'embed':>6} {'groups':>6} {'mlp':>6}   teacher importance  (nats)")
    gains = []
    for _ in range(NUM_SHAPES):
        candidate = space.sample(rng)
        losses = {
            name: mean_loss(
                build_student(state, teacher.config, candidate.spec(order)), held_out, 8
            )
            for name, order in orders.items()
        }
        gains.append(losses["teacher"] - losses["importance"])
        sizes = " ".join(f"{size:6d}" for size in candidate.sizes.values())
        print(f"{sizes}   {losses['teacher']:7.3f}    {losses['importance']:7.3f}")
    wins = sum(gain > 0 for gain in gains)
    print(
        f"importance is lower in {wins} of {NUM_SHAPES} shapes, by {statistics.median(gains):.2f} "
        "nats in the median"
    )


if __name__ == "__main__":
    main()
