"""How soon a search finds the loss that whittle 0.6.0's random search ends with.

    python benchmarks/time_to_loss.py

Both search the demo's teacher for sub-networks of 22M to 24M parameters, and score each on the same
2,048 held-out tokens, in float32 on the CPU with the same number of threads. whittle draws
candidates at random, counts them, and evaluates as many in the bin as the demo's search proposes;
its time is what passes until its best one is scored. headstart then searches until its best is as
good on all tokens; its time includes the calibration pass. Loading the teacher, and one pass over
it as warm-up, is left out on both sides.

When a random search meets its best is luck, so the ratio is the median over several seeds.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.assets import demo_corpus, demo_teacher
from headstart.data import DataSettings, prepare
from headstart.evaluate import mean_loss
from headstart.search.bins import Bin
from headstart.search.evolution import EvolutionSettings, evolve
from headstart.search.fitness import HeldOutLoss
from headstart.search.importance import activation_importance
from headstart.search.journal import Evaluated, Journal
from headstart.search.racing import Race, RacingSettings
from headstart.search.space import Space
from peers.environment import ask_whittle, litgpt_checkpoint, num_threads

GOAL = 5
SEEDS = (0, 1, 2)
LOW, HIGH = 22_000_000, 24_000_000
CALIBRATION_TOKENS, FITNESS_TOKENS, BLOCK_TOKENS, BATCH_BLOCKS = 4096, 2048, 256, 8
POPULATION, GENERATIONS, ELITES = 6, 4, 3
"""The demo's, as are the tokens and the bin; whittle evaluates population times generations."""
MAX_GENERATIONS = 40
"""After these headstart has failed, and the ratio of that seed is 0."""
WHITTLE_SPACE = "small"
"""Width, heads, MLP and depth, the same in all layers. whittle's other space of this kind,
"hw_gpt_bench", needs about eight times as many draws for one in this bin."""
WHITTLE_SECONDS = 540.0
LOSS_TOLERANCE_NATS = 0.01


class Reached(Exception):
    """The search is as good as it has to be."""


def headstart_seconds(
    teacher: PreTrainedModel,
    calibration: Int[Tensor, "blocks tokens"],
    blocks: Int[Tensor, "blocks tokens"],
    target: float,
    seed: int,
) -> tuple[float, float, int]:
    """Calibrate and search until a loss on all tokens is at or below the target.

    Returns:
        Seconds, infinite if that did not happen; the best loss; candidates scored on all tokens.
    """
    state = {k: v for k, v in teacher.state_dict().items() if k != "lm_head.weight"}
    evolution = EvolutionSettings(
        population=POPULATION, generations=MAX_GENERATIONS, elites=ELITES, seed=seed
    )
    whole: list[float] = []

    def on_score(one: Evaluated, tokens: int, replayed: bool) -> None:
        if one.tokens == blocks.numel():
            whole.append(one.loss)
            if one.loss <= target:
                raise Reached

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "search.jsonl", {})
        start = time.perf_counter()
        batches = calibration.split(BATCH_BLOCKS)  # type: ignore[no-untyped-call]
        orders = activation_importance(teacher, batches).orders()
        space = Space.build(teacher.config, "coarse-uniform", Bin(LOW, HIGH))
        fitness = HeldOutLoss(state, teacher.config, orders, blocks, BATCH_BLOCKS)
        race = Race(fitness, lambda one: 0, journal, RacingSettings(), ELITES, on_score)
        try:
            evolve(space, race, evolution)
        except Reached:
            return time.perf_counter() - start, min(whole), len(whole)
    return math.inf, min(whole), len(whole)


def main() -> None:
    torch.set_num_threads(num_threads())
    folder = demo_teacher()
    settings = DataSettings(source=str(demo_corpus()), block_length=BLOCK_TOKENS)
    prepared = prepare(settings, folder)
    calibration = prepared.first("train", CALIBRATION_TOKENS)
    blocks = prepared.first("search", FITNESS_TOKENS)
    checkpoint = litgpt_checkpoint(folder, "SmolLM2-135M")
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    loss_whole = mean_loss(teacher, blocks, BATCH_BLOCKS)  # the warm-up, too

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
            bin=(LOW, HIGH),
            candidates=POPULATION * GENERATIONS,
            seconds=WHITTLE_SECONDS,
            batch_size=BATCH_BLOCKS,
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
        seconds, loss, scored = headstart_seconds(teacher, calibration, blocks, best["loss"], seed)
        ratios.append(best["seconds"] / seconds)
        print(
            f"{seed:4} {theirs['drawn']:7} {len(theirs['evaluated']):6} {best['loss']:6.2f} "
            f"{best['seconds']:7.1f} {scored:7} {loss:6.2f} {seconds:7.1f} {ratios[-1]:6.1f}x",
            flush=True,
        )
    print(f"ratio: {statistics.median(ratios):.1f}x (goal {GOAL}x)")


if __name__ == "__main__":
    main()
