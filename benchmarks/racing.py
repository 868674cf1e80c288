"""What racing saves: tokens of a search with racing against one that scores everyone on all tokens.

    python benchmarks/racing.py

Both are whole evolutionary searches from the same seed, on the demo's teacher, 22M to 24M
parameters. Losses of single blocks are kept and shared between the two, so that the benchmark
itself takes no longer than it must; tokens are counted as if they were not. The ratio is the tokens
of the full search over those of the race, median over seeds; beside it stands how much higher the
race's winner is than the full search's on all tokens.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from headstart.losses.next_token import summed_loss
from headstart.searching.candidate import Candidate
from headstart.searching.evolution import EvolutionSettings, evolve, ranked
from headstart.searching.fitness import HeldOutLoss
from headstart.searching.journal import Journal
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.space import Space
from real_teacher import BIN, load

SEEDS = range(5)
NUM_TOKENS = 4096
EVOLUTION = EvolutionSettings(population=12, generations=5, elites=4)
GOAL_LOSS_DIFFERENCE = 0.01


@dataclass
class SharedLosses:
    """A fitness that remembers each block's loss, and counts the tokens that were asked for."""

    fitness: HeldOutLoss
    known: dict[Candidate, list[float]] = field(default_factory=dict)
    tokens: int = 0

    @property
    def num_blocks(self) -> int:
        return self.fitness.num_blocks

    @property
    def block_length(self) -> int:
        return self.fitness.block_length

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        self.tokens += (stop - start) * self.block_length
        losses = self.known.setdefault(candidate, [])
        if len(losses) < stop:
            student = self.fitness.student(candidate)
            missing: list[torch.Tensor] = list(self.fitness.blocks[len(losses) : stop].split(1))
            losses += [summed_loss(student, block, 1) for block in missing]
        return sum(losses[start:stop])


def main() -> None:
    teacher = load()
    space = Space.build(teacher.architecture, "coarse-uniform", BIN)
    losses = SharedLosses(teacher.fitness(NUM_TOKENS))
    print(f"{'seed':>4} {'tokens, full':>13} {'raced':>9} {'loss, full':>11} {'raced':>9}")
    ratios, differences = [], []
    for seed in SEEDS:
        tokens, best = [], []
        for racing in (RacingSettings(rungs=1), RacingSettings(rungs=3)):
            losses.tokens = 0
            with tempfile.TemporaryDirectory() as folder:
                journal = Journal(Path(folder) / "search.jsonl", {})
                race = Race(losses, teacher.parameters, journal, racing, EVOLUTION.elites)
                scores = evolve(space, race, replace(EVOLUTION, seed=seed))
            tokens.append(losses.tokens)
            best.append(ranked(scores)[0].loss)
        ratios.append(tokens[0] / tokens[1])
        differences.append(best[1] - best[0])
        print(f"{seed:4} {tokens[0]:13,} {tokens[1]:9,} {best[0]:11.4f} {best[1]:9.4f}", flush=True)
    difference = statistics.median(differences)
    print(f"race's winner, median: {difference:+.4f} nats (goal at most {GOAL_LOSS_DIFFERENCE})")
    print(f"ratio: {statistics.median(ratios):.2f}x (goal 3.00x)")
    if difference > GOAL_LOSS_DIFFERENCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
