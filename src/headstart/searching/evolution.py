"""Evolutionary search inside a bin, and its two baselines, random search and importance alone.

Proposals depend only on the seed, the generation, and the losses seen so far. A search that is
started again reads whole generations and their losses from the journal, breeds the last one again,
and evaluates only what is not there yet: one that was killed ends exactly like one that was not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headstart.searching.candidate import Candidate
from headstart.searching.journal import PROPORTIONAL, Evaluated
from headstart.searching.pareto import select
from headstart.searching.racing import Proposal, Race
from headstart.searching.space import Space
from headstart.searching.surrogate import MAX_KNOWN, Surrogate
from headstart.system.errors import UserError
from headstart.system.settings import check_least

Method = Literal["evolution", "random", "importance"]
MAX_ATTEMPTS = 50
"""Duplicate proposals before a slot goes to an immigrant, and again before it stays empty."""


@dataclass(frozen=True)
class EvolutionSettings:
    """How the population evolves; see `evolve`.

    Attributes:
        method: "evolution"; or as baselines under the same budget "random", which draws every
            candidate afresh, and "importance", which takes the shapes nearest to the teacher's
            proportions with their units in the axis order.
        population: candidates proposed in each generation.
        generations: including the first, which is random but for the shape nearest to the
            teacher's proportions.
        elites: best candidates so far, which breed the next generation.
        mutation: share of a generation that are mutated elites.
        crossover: share that are crossed elites. The rest are random immigrants, which
            also replace offspring that would be repeats.
        screening: candidates bred for each place in a later generation, of which only the one that
            looks best to a `Surrogate` is scored; 1 for no screening. A trade-off does without.
        seed: of every random choice.
        tradeoff: a measure that elites keep small beside their loss, chosen as in NSGA-II, so that
            the search ends with a Pareto front; "none" for the loss alone.
    """

    method: Method = "evolution"
    population: int = 16
    generations: int = 5
    elites: int = 4
    mutation: float = 0.5
    crossover: float = 0.3
    screening: int = 16
    seed: int = 0
    tradeoff: Literal["none", "parameters", "flops_per_token", "kv_cache_bytes_per_token"] = "none"

    def __post_init__(self) -> None:
        check_least(self, "search.evolution.", population=1, generations=1, elites=1, screening=1)
        if self.elites > self.population:
            raise UserError(
                f"search.evolution.elites is {self.elites}, more than the population of "
                f"{self.population}; use at most so many"
            )
        if min(self.mutation, self.crossover) < 0 or self.mutation + self.crossover > 1:
            raise UserError(
                f"search.evolution.mutation {self.mutation} and crossover {self.crossover} are "
                "shares of a generation; neither may be negative, nor their sum above 1"
            )


def evolve(
    space: Space,
    race: Race,
    settings: EvolutionSettings,
    burden: Callable[[Candidate], float] | None = None,
    on_generation: Callable[[int, int], None] = lambda generation, candidates: None,
    on_scored: Callable[[int, list[Evaluated]], None] = lambda generation, scores: None,
) -> list[Evaluated]:
    """Search a space for the candidate with the lowest loss.

    Args:
        space: proposes candidates inside the bin.
        race: scores them.
        burden: what elites keep small beside the loss; None for the loss alone.
        on_generation: called with a generation, from 0, and its candidates before they are scored.
        on_scored: called with a generation and the scores of its candidates.

    Returns:
        The last score of every candidate in the order in which they were proposed. They are fewer
        than asked for where the space has no more.
    """
    scores: dict[Candidate, Evaluated] = {}
    elites: list[Evaluated] = []
    known: list[Evaluated] = []
    by_importance = settings.method == "importance"
    budget = settings.population * settings.generations
    proportional = space.proportional(budget) if by_importance else []
    for generation in range(settings.generations):
        if by_importance:
            start = generation * settings.population
            chosen = proportional[start : start + settings.population]
            proposals = [(candidate, PROPORTIONAL) for candidate in chosen]
        else:
            parents = [] if settings.method == "random" else [elite.candidate for elite in elites]
            proposals, whole = race.journal.proposals(generation)
            if not whole and len(proposals) < settings.population:
                rng = random.Random(f"{settings.seed}, generation {generation}")
                best = [score.candidate for score in known]
                screen = Surrogate(space.totals, best) if known else None
                is_first = generation == 0 and settings.method == "evolution"
                given = space.proportional(1) if is_first else []
                proposals = _propose(space, settings, rng, parents, scores, screen, given)
        if not proposals:
            break
        on_generation(generation, len(proposals))
        generation_scores = race.run(generation, proposals)
        if settings.method == "evolution" and settings.screening > 1 and burden is None:
            known = ranked([*known, *generation_scores])[:MAX_KNOWN]
        scores.update((score.candidate, score) for score in generation_scores)
        finished = [score for score in generation_scores if score.tokens == race.all_tokens]
        elites = _elites([*elites, *finished], settings.elites, burden)
        on_scored(generation, generation_scores)
    return list(scores.values())


def ranked(scores: Sequence[Evaluated]) -> list[Evaluated]:
    """Scores on the most tokens first, then from the lowest loss; no number comes last."""
    return sorted(scores, key=lambda score: (-score.tokens, score.comparable_loss))


def _elites(
    scores: list[Evaluated], count: int, burden: Callable[[Candidate], float] | None
) -> list[Evaluated]:
    if burden is None or not scores:
        return ranked(scores)[:count]
    points = np.array([[score.loss, burden(score.candidate)] for score in scores])
    return [scores[place] for place in select(points, count)]


def _propose(
    space: Space,
    settings: EvolutionSettings,
    rng: random.Random,
    elites: list[Candidate],
    seen: Container[Candidate],
    screen: Surrogate | None,
    given: list[Candidate],
) -> list[Proposal]:
    """A generation's new candidates, each with its origin; fewer where the space runs dry.

    Those that are `given`, which are proportional, come first.
    """
    proposals: dict[Candidate, str] = dict.fromkeys(given, PROPORTIONAL)
    num_mutated = round(settings.population * settings.mutation)
    num_crossed = round(settings.population * settings.crossover)
    num_tries = settings.screening if elites and screen else 1
    for slot in range(len(proposals), settings.population):
        tries: dict[Candidate, str] = {}
        for attempt in range(2 * MAX_ATTEMPTS):
            breed = attempt < MAX_ATTEMPTS
            if len(tries) == num_tries or (tries and not breed):
                break
            if not elites:
                candidate, origin = space.sample(rng), "sample"
            elif breed and slot < num_mutated:
                candidate, origin = space.mutate(rng, rng.choice(elites)), "mutation"
            elif breed and slot < num_mutated + num_crossed:
                mother, father = rng.choice(elites), rng.choice(elites)
                candidate, origin = space.cross(rng, mother, father), "crossover"
            else:
                candidate, origin = space.sample(rng), "immigrant"
            if candidate not in seen and candidate not in proposals:
                tries[candidate] = origin
        if tries:
            best = screen.best(list(tries)) if screen else next(iter(tries))
            proposals[best] = tries[best]
    return list(proposals.items())
