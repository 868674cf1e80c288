"""Racing: candidates are scored on few tokens first, and only the promising ones on more.

Every rung has `factor` times the tokens of the one before, and begins with the same tokens. A
candidate goes on while it is among the best that any generation has brought to its rung, so a poor
one costs little, and a good one is compared with the elites on the very same tokens.

Source: successive halving (Jamieson and Talwalkar, arXiv 1502.07943), with the survivors of earlier
generations as its standing competition.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headstart.searching.candidate import Candidate
from headstart.searching.journal import Evaluated, Journal
from headstart.system.distributed import gather, rank, world_size
from headstart.system.settings import check_least


@dataclass(frozen=True)
class RacingSettings:
    """How candidates race.

    Attributes:
        rungs: token budgets, the last of which is all tokens; 1 scores everyone on all of them.
        factor: how many times the tokens of a rung the next one has.
        keep: how many of the best so far a candidate must be among to go on; 0 for as many as
            there are elites.
    """

    rungs: int = 1
    factor: int = 4
    keep: int = 0

    def __post_init__(self) -> None:
        check_least(self, "search.racing.", rungs=1, factor=2, keep=0)


def rung_blocks(num_blocks: int, settings: RacingSettings) -> list[int]:
    """Blocks read by the end of each rung, ascending; fewer rungs where there are few blocks.

    >>> rung_blocks(32, RacingSettings(rungs=3, factor=4)), rung_blocks(3, RacingSettings(rungs=3))
    ([2, 8, 32], [1, 3])
    """
    counts = {num_blocks}
    for rung in range(1, settings.rungs):
        counts.add(max(1, round(num_blocks / settings.factor**rung)))
    return sorted(counts)


class Fitness(Protocol):
    """Scores candidates, see `headstart.searching.fitness`."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_length(self) -> int: ...

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        """Nats of all targets in the blocks from `start` to before `stop`."""
        ...


Proposal = tuple[Candidate, str]


class Race:
    """Scores generations of candidates and remembers how good the best were at each rung.

    Processes under torchrun share the candidates of each rung.

    Args:
        fitness: scores a candidate on some blocks.
        count_parameters: candidate -> parameters of the sub-network.
        journal: keeps every score; what it knows is not scored again.
        keep: how many go on, see `RacingSettings.keep`.
        on_score: called with each score, the tokens that it added, and whether it came from the
            journal.
    """

    def __init__(
        self,
        fitness: Fitness,
        count_parameters: Callable[[Candidate], int],
        journal: Journal,
        settings: RacingSettings,
        keep: int,
        on_score: Callable[[Evaluated, int, bool], None] = lambda score, tokens, replayed: None,
    ) -> None:
        self.fitness, self.count_parameters, self.journal = fitness, count_parameters, journal
        self.rungs = rung_blocks(fitness.num_blocks, settings)
        self.keep = settings.keep or keep
        self.on_score = on_score
        self.best: list[list[float]] = [[] for _ in self.rungs]

    @property
    def all_tokens(self) -> int:
        """Tokens that a candidate is scored on who runs the whole race."""
        return self.fitness.num_blocks * self.fitness.block_length

    def run(self, generation: int, proposals: Sequence[Proposal]) -> list[Evaluated]:
        """Score a generation.

        Returns:
            The last score of each proposal, in order.
        """
        scores: dict[int, Evaluated] = {}
        alive = list(range(len(proposals)))
        for rung, best in enumerate(self.best):
            wave = world_size()
            for start in range(0, len(alive), wave):
                self._score_wave(generation, rung, proposals, alive[start : start + wave], scores)
            losses = {place: scores[place].comparable_loss for place in alive}
            self.best[rung] = heapq.nsmallest(self.keep, [*best, *losses.values()])
            bar = max(self.best[rung], default=math.inf)
            alive = [place for place in alive if losses[place] <= bar and losses[place] < math.inf]
            if not alive:
                break
        return [scores[place] for place in range(len(proposals))]

    def _score_wave(
        self,
        generation: int,
        rung: int,
        proposals: Sequence[Proposal],
        places: list[int],
        scores: dict[int, Evaluated],
    ) -> None:
        """Score at most one candidate on each process, and share what was found."""
        start, stop = (self.rungs[rung - 1] if rung else 0), self.rungs[rung]
        tokens = stop * self.fitness.block_length
        found = {place: self.journal.find(proposals[place][0], tokens) for place in places}
        known = {place: score for place, score in found.items() if score is not None}
        missing = [place for place in places if place not in known]
        mine: Evaluated | None = None
        if rank() < len(missing):
            place = missing[rank()]
            mine = self._score(generation, proposals[place], start, stop, scores.get(place))
        if missing:
            new = [score for score in gather(mine) if score is not None]
            self.journal.append(new)
            known.update(zip(missing, new, strict=True))
        added_tokens = (stop - start) * self.fitness.block_length
        for place in places:
            scores[place] = known[place]
            self.on_score(known[place], added_tokens, place not in missing)

    def _score(
        self, generation: int, proposal: Proposal, start: int, stop: int, before: Evaluated | None
    ) -> Evaluated:
        candidate, origin = proposal
        clock = time.perf_counter()
        targets_per_block = self.fitness.block_length - 1
        total = self.fitness(candidate, start, stop)
        if before is not None:
            total += before.loss * start * targets_per_block
        return Evaluated(
            generation=generation,
            origin=origin,
            candidate=candidate,
            parameters=self.count_parameters(candidate),
            loss=total / (stop * targets_per_block),
            tokens=stop * self.fitness.block_length,
            seconds=time.perf_counter() - clock + (before.seconds if before else 0.0),
        )
