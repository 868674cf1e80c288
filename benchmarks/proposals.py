"""How fast candidates inside a parameter bin are proposed, next to whittle 0.6.0.

    python benchmarks/proposals.py

The teacher has the shape of Pythia-6.9B, the bins are 5 % around Pythia-410M, 1B and 2.8B, and no
weights are involved on either side. headstart proposes an equal mix of samples, mutations and
crossovers in each of its four spaces, every one in the bin. whittle draws a random candidate
(`RandomSampler.sample`) and counts it (`RandomSampler.get_parameters`), which is all it has to find
one in a bin: from its space with sizes for each layer ("medium") next to our layer-wise spaces, and
from the one with the same sizes in all layers ("small") next to our uniform ones.

The ratio is the time of one candidate of whittle, wherever it lies, to that of one proposal in the
bin: the smallest of all spaces and bins. It does not charge whittle with the candidates that miss
the bin; their share is in the table. Both sides run in plain Python on one core.
"""

from __future__ import annotations

import random
import statistics
import time

from transformers import GPTNeoXConfig

from headstart.model.architecture import Architecture
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate
from headstart.searching.space import Space, SpaceName
from peers.environment import ask_whittle

GOAL = 50
REFERENCES = {"410M": 405_334_016, "1B": 1_011_781_632, "2.8B": 2_775_208_960}
"""Parameters of Pythia-410M, 1B and 2.8B."""
TOLERANCE = 0.05
WHITTLE_SPACES: dict[SpaceName, str] = {
    "coarse-uniform": "small",
    "fine-uniform": "small",
    "coarse-layerwise": "medium",
    "fine-layerwise": "medium",
}
WHITTLE_CANDIDATES, PROPOSALS, REPEATS = 200, 600, 5
"""Candidates and proposals in each repeat; the median repeat counts."""
PARENTS = 32
SEED = 0


TEACHER = Architecture.of(
    GPTNeoXConfig(
        vocab_size=50432,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=16384,
        tie_word_embeddings=False,
    )
)
"""The shape of Pythia-6.9B."""


def count_parameters(candidate: Candidate) -> int:
    """Parameters of one of headstart's candidates, outside the clock."""
    return int(TEACHER.amount({**TEACHER.sizes, **candidate.sizes()}, "parameters", 1))


def proposals_per_second(space: Space, low: int, high: int) -> float:
    """The median rate of a third samples, a third mutations and a third crossovers."""
    rng = random.Random(SEED)
    parents = [space.sample(rng) for _ in range(PARENTS)]
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        proposed = []
        for _ in range(PROPOSALS // 3):
            mother, father = rng.choice(parents), rng.choice(parents)
            proposed += [
                space.sample(rng),
                space.mutate(rng, mother),
                space.cross(rng, mother, father),
            ]
        rates.append(len(proposed) / (time.perf_counter() - start))
        missed = [count for count in map(count_parameters, proposed) if not low <= count <= high]
        if missed:
            raise RuntimeError(f"{len(missed)} proposals missed the bin {low:,} to {high:,}")
    return statistics.median(rates)


def main() -> None:
    bins = {
        name: (round(count * (1 - TOLERANCE)), round(count * (1 + TOLERANCE)))
        for name, count in REFERENCES.items()
    }
    whittle = {
        space: ask_whittle(
            "proposals",
            model="pythia-6.9b",
            space=space,
            bins=list(bins.values()),
            candidates=WHITTLE_CANDIDATES,
            repeats=REPEATS,
            seed=SEED,
        )
        for space in sorted(set(WHITTLE_SPACES.values()))
    }
    for space, answer in whittle.items():
        sampling, counting = (answer[f"seconds_{step}"] * 1e3 for step in ("sampling", "counting"))
        print(f"whittle {space:6}  {sampling:.3f} ms to draw and {counting:.3f} ms to count one")
    print()
    print(f"{'space':16} {'bin':>5} {'in-bin/s':>9} {'whittle/s':>9} {'of them in bin':>14} ratio")
    ratios = []
    for kind, space in WHITTLE_SPACES.items():
        theirs = whittle[space]
        seconds = theirs["seconds_sampling"] + theirs["seconds_counting"]
        for position, (name, (low, high)) in enumerate(bins.items()):
            ours = proposals_per_second(Space.build(TEACHER, kind, Bin(low, high)), low, high)
            share = theirs["in_bins"][position] / theirs["candidates"]
            ratios.append(ours * seconds)
            print(
                f"{kind:16} {name:>5} {ours:9,.0f} {1 / seconds:9,.1f} {share:14.1%} "
                f"{ratios[-1]:.1f}x"
            )
    print(f"ratio: {min(ratios):.1f}x (goal {GOAL}x)")


if __name__ == "__main__":
    main()
