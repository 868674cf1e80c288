"""Does evolution find better sub-networks than random search on the same number of tokens?

    python benchmarks/evolution.py

In each of the four spaces, both searches score as many candidates of 22M to 24M parameters of the
demo's teacher on the same held-out tokens, for several seeds. The ratio is random search's best
loss over evolution's, median over seeds, in the space where it is least.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

from headstart.searching.evolution import EvolutionSettings, evolve, ranked
from headstart.searching.journal import Journal
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.space import Space, SpaceName
from real_teacher import BIN, RealTeacher, load

SEEDS = range(11)
NUM_TOKENS = 512
EVOLUTION = EvolutionSettings(population=8, generations=5, elites=3)


def best_loss(teacher: RealTeacher, space: Space, settings: EvolutionSettings) -> float:
    """The lowest loss that a search finds."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "search.jsonl", {})
        fitness = teacher.fitness(NUM_TOKENS)
        race = Race(fitness, teacher.parameters, journal, RacingSettings(rungs=1), 1)
        return ranked(evolve(space, race, settings))[0].loss


def main() -> None:
    teacher = load()
    num_candidates = EVOLUTION.population * EVOLUTION.generations
    print(f"{num_candidates} candidates on {NUM_TOKENS:,} tokens, {len(SEEDS)} seeds, nats")
    print(f"{'space':18} {'random':>8} {'evolution':>10} {'gain':>7}   gain of each seed")
    ratios = []
    for name in get_args(SpaceName):
        space = Space.build(teacher.architecture, name, BIN)
        losses: dict[str, list[float]] = {"random": [], "evolution": []}
        for method, found in losses.items():
            for seed in SEEDS:
                settings = replace(EVOLUTION, method=method, seed=seed)
                found.append(best_loss(teacher, space, settings))
                print(f"{name} {method} {seed}: {found[-1]:.4f}", file=sys.stderr)
        pairs = list(zip(losses["random"], losses["evolution"], strict=True))
        gains = [random - evolved for random, evolved in pairs]
        ratios.append(statistics.median(random / evolved for random, evolved in pairs))
        medians = [statistics.median(found) for found in losses.values()]
        each = " ".join(f"{gain:+.3f}" for gain in gains)
        gain = statistics.median(gains)
        print(f"{name:18} {medians[0]:8.3f} {medians[1]:10.3f} {gain:+7.3f}   {each}", flush=True)
    print(f"ratio: {min(ratios):.3f}x (goal 1.000x)")


if __name__ == "__main__":
    main()
