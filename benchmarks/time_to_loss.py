"""How soon a search finds the loss that whittle 0.6.0's random search ends with.

    python benchmarks/time_to_loss.py

Both search the demo's teacher for sub-networks in the demo's bin, and score each on the same
held-out tokens, in float32 on the CPU with the same number of threads. whittle draws candidates at
random, counts them, and evaluates as many in the bin as the demo's search proposes; its time is
what passes until its best one is scored. headstart, with the demo's settings, then searches until
its best is as good on all tokens; its time includes the calibration pass. Loading the teacher, and
one pass over it as warm-up, is left out on both sides.

When a random search meets its best is luck, so the ratio is the median over several seeds.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.demo import demo_teacher
from headstart.losses.next_token import mean_loss
from headstart.model.architecture import Architecture
from headstart.recipe import load_recipe
from headstart.searching.evolution import evolve
from headstart.searching.fitness import HeldOutLoss, fitting_batch_size, put_in_order, state_of
from headstart.searching.importance import measure_importance
from headstart.searching.journal import Evaluated, Journal
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.settings import SearchSettings
from headstart.searching.space import Space
from headstart.system.files import shipped
from headstart.text.prepare import prepare
from peers.environment import ask_whittle, litgpt_checkpoint, num_threads

GOAL = 5
SEEDS = (0, 1, 2, 3, 4)
MAX_GENERATIONS = 40
"""After these headstart has failed, and the ratio of that seed is 0."""
WHITTLE_SPACE = "small"
"""Width, heads, MLP and depth, the same in all layers. whittle's other space of this kind,
"hw_gpt_bench", needs about eight times as many draws for one in this bin."""
WHITTLE_SECONDS = 540.0
WHITTLE_BATCH_BLOCKS = 8
LOSS_TOLERANCE_NATS = 0.01


class Reached(Exception):
    """The search is as good as it has to be."""


def headstart_seconds(
    teacher: PreTrainedModel,
    demo: SearchSettings,
    calibration: Int[Tensor, "blocks tokens"],
    blocks: Int[Tensor, "blocks tokens"],
    target: float,
    seed: int,
) -> tuple[float, float, int]:
    """Calibrate and search until a loss on all tokens is at or below the target.

    Returns:
        Seconds, infinite if that did not happen; the best loss; candidates scored on all tokens.
    """
    model = copy.deepcopy(teacher)
    evolution = replace(demo.evolution, generations=MAX_GENERATIONS, seed=seed)
    bin = demo.bin.resolve(blocks.shape[1])
    architecture = Architecture.of(teacher.config)
    batch_size = fitting_batch_size(architecture.sizes, blocks.shape[1], teacher.device, 4)
    whole: list[float] = []

    def on_score(one: Evaluated, tokens: int, replayed: bool) -> None:
        if one.tokens == blocks.numel():
            whole.append(one.loss)
            if one.loss <= target:
                raise Reached

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "search.jsonl", {})
        start = time.perf_counter()
        batches = calibration.split(batch_size)  # type: ignore[no-untyped-call]
        orders = measure_importance(teacher, batches).orders()
        orders = put_in_order(state_of(model), architecture, orders)
        space = Space.build(architecture, demo.space, bin, demo.grid, demo.unit_noise)
        fitness = HeldOutLoss(model, architecture, orders, blocks, batch_size)
        racing = RacingSettings(rungs=3)
        race = Race(fitness, lambda one: 0, journal, racing, evolution.elites, on_score)
        try:
            evolve(space, race, evolution)
        except Reached:
            return time.perf_counter() - start, min(whole), len(whole)
    return math.inf, min(whole), len(whole)


def main() -> None:
    torch.set_num_threads(num_threads())
    recipe = load_recipe(shipped("demo.yaml"))
    demo, folder = recipe.search, demo_teacher()
    prepared = prepare(recipe.data, folder)
    calibration = prepared.sample("train", demo.calibration_tokens)
    blocks = prepared.sample("search", demo.tokens)
    bin = demo.bin.resolve(blocks.shape[1])
    checkpoint = litgpt_checkpoint(folder, "SmolLM2-135M")
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    loss_whole = mean_loss(teacher, blocks, WHITTLE_BATCH_BLOCKS)  # the warm-up, too

    print(f"{num_threads()} threads; seconds until the loss of whittle's best was reached")
    print(f"{'':5} {'whittle':26} {'headstart':23}")
    print("seed   drawn in bin   loss seconds   whole   loss seconds   ratio")
    ratios = []
    for seed in SEEDS:
        theirs = ask_whittle(
            "search",
            checkpoint=str(checkpoint),
            blocks=blocks.numpy(),
            space=WHITTLE_SPACE,
            bin=(bin.low, bin.high),
            candidates=demo.evolution.population * demo.evolution.generations,
            seconds=WHITTLE_SECONDS,
            batch_size=WHITTLE_BATCH_BLOCKS,
            seed=seed,
        )
        if abs(theirs["loss_whole"] - loss_whole) > LOSS_TOLERANCE_NATS:
            raise RuntimeError(
                f"the teacher's loss is {loss_whole:.3f} here and {theirs['loss_whole']:.3f} in "
                "whittle; they do not score the same model on the same tokens"
            )
        best = theirs["best"]
        if best is None:
            raise RuntimeError(f"whittle met no candidate in the bin in {WHITTLE_SECONDS:.0f} s")
        seconds, loss, scored = headstart_seconds(
            teacher, demo, calibration, blocks, best["loss"], seed
        )
        ratios.append(best["seconds"] / seconds)
        print(
            f"{seed:4} {theirs['drawn']:7} {len(theirs['evaluated']):6} {best['loss']:6.2f} "
            f"{best['seconds']:7.1f} {scored:7} {loss:6.2f} {seconds:7.1f} {ratios[-1]:6.1f}x",
            flush=True,
        )
    print(f"ratio: {statistics.median(ratios):.1f}x (goal {GOAL}x)")


if __name__ == "__main__":
    main()
