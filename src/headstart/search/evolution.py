"""Evolutionary search inside a parameter bin, with a journal from which it goes on after a kill.

Proposals depend only on the seed and on the losses seen so far. A search that is started again
therefore replays its own proposals, reads their losses from the journal, and evaluates only what
is not there yet: one that was killed ends exactly like one that was not.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.files import write_whole
from headstart.search.space import Candidate, Space

JOURNAL_FORMAT = "headstart-search/1"
MAX_ATTEMPTS = 50
"""Duplicate proposals before a slot goes to an immigrant, and again before it stays empty."""


@dataclass(frozen=True)
class EvolutionSettings:
    """How the population evolves; see `evolve`.

    Attributes:
        population: candidates proposed in each generation.
        generations: including the first, which is random.
        elites: best candidates so far, which breed the next generation.
        mutation: share of a generation that are mutated elites.
        crossover: share that are crossed elites. The rest are random immigrants, which
            also replace offspring that would be repeats.
        seed: of every random choice.
    """

    population: int = 16
    generations: int = 5
    elites: int = 4
    mutation: float = 0.5
    crossover: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "generations", "elites"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"search.evolution.{name} is {getattr(self, name)}; use at least 1"
                )
        if min(self.mutation, self.crossover) < 0 or self.mutation + self.crossover > 1:
            raise ValueError(
                f"search.evolution.mutation {self.mutation} and crossover {self.crossover} are "
                "shares of a generation; neither may be negative, nor their sum above 1"
            )


@dataclass(frozen=True)
class Evaluated:
    """A candidate with its loss.

    Attributes:
        generation: in which it was first proposed.
        origin: "sample", "mutation", "crossover" or "immigrant".
        candidate: its ranks.
        parameters: of the sub-network.
        loss: held-out nats per token.
        seconds: that the evaluation took.
    """

    generation: int
    origin: str
    candidate: Candidate
    parameters: int
    loss: float
    seconds: float


class Journal:
    """An append-only JSONL file of evaluated candidates.

    The first line identifies the search; every other line is one candidate. A last line that a
    kill cut short is dropped when the journal is opened again.

    Raises:
        ValueError: the file belongs to another search.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.evaluated: dict[Candidate, Evaluated] = {}
        identity = json.loads(json.dumps({"format": JOURNAL_FORMAT, **identity}))
        text = path.read_text() if path.exists() else ""
        whole, _, _ = text.rpartition("\n")
        lines = whole.splitlines()
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity) + "\n")
            return
        found = json.loads(lines[0])
        for key in sorted(found.keys() | identity.keys()):
            if found.get(key) != identity.get(key):
                raise ValueError(
                    f"{path} is the journal of another search ({key} is {found.get(key)!r} there, "
                    f"{identity.get(key)!r} here); choose another --output or delete it"
                )
        if whole + "\n" != text:
            write_whole(path, whole + "\n")
        for line in lines[1:]:
            entry = json.loads(line)
            entry["candidate"] = Candidate.from_json(entry["candidate"])
            entry.pop("sizes")
            self.evaluated[entry["candidate"]] = Evaluated(**entry)

    def append(self, evaluated: Evaluated) -> None:
        self.evaluated[evaluated.candidate] = evaluated
        entry = {
            **asdict(evaluated),
            "sizes": evaluated.candidate.sizes,
            "candidate": evaluated.candidate.to_json(),
        }
        with self.path.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def evolve(
    space: Space,
    evaluate: Callable[[Candidate], float],
    count_parameters: Callable[[Candidate], int],
    settings: EvolutionSettings,
    journal: Journal,
    on_evaluated: Callable[[Evaluated, bool], None] = lambda evaluated, replayed: None,
) -> list[Evaluated]:
    """Search a space for the candidate with the lowest loss.

    Args:
        space: proposes candidates inside the bin.
        evaluate: candidate -> held-out loss in nats per token.
        count_parameters: candidate -> parameters of the sub-network.
        settings: population and operators.
        journal: keeps every loss; candidates that it holds already are not evaluated again.
        on_evaluated: called for each candidate, with whether it came from the journal.

    Returns:
        All distinct candidates in the order in which they were proposed.
    """
    rng = random.Random(settings.seed)
    seen: dict[Candidate, Evaluated] = {}
    for generation in range(settings.generations):
        elites = ranked(list(seen.values()))[: settings.elites]
        for candidate, origin in _propose(space, settings, rng, elites, set(seen)):
            replayed = candidate in journal.evaluated
            if not replayed:
                start = time.perf_counter()
                loss = evaluate(candidate)
                seconds = time.perf_counter() - start
                num_parameters = count_parameters(candidate)
                journal.append(
                    Evaluated(generation, origin, candidate, num_parameters, loss, seconds)
                )
            seen[candidate] = journal.evaluated[candidate]
            on_evaluated(seen[candidate], replayed)
    return list(seen.values())


def ranked(evaluated: list[Evaluated]) -> list[Evaluated]:
    """Candidates from the lowest loss to the highest; a loss that is no number comes last."""
    return sorted(evaluated, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf)


def _propose(
    space: Space,
    settings: EvolutionSettings,
    rng: random.Random,
    elites: list[Evaluated],
    seen: set[Candidate],
) -> list[tuple[Candidate, str]]:
    """A generation's new candidates, each with its origin; fewer where the space runs dry."""
    proposals: dict[Candidate, str] = {}
    num_mutated = round(settings.population * settings.mutation)
    num_crossed = round(settings.population * settings.crossover)
    for slot in range(settings.population):
        for attempt in range(2 * MAX_ATTEMPTS):
            breed = attempt < MAX_ATTEMPTS
            if not elites:
                candidate, origin = space.sample(rng), "sample"
            elif breed and slot < num_mutated:
                candidate, origin = space.mutate(rng, rng.choice(elites).candidate), "mutation"
            elif breed and slot < num_mutated + num_crossed:
                mother, father = rng.choice(elites).candidate, rng.choice(elites).candidate
                candidate, origin = space.cross(rng, mother, father), "crossover"
            else:
                candidate, origin = space.sample(rng), "immigrant"
            if candidate not in seen and candidate not in proposals:
                proposals[candidate] = origin
                break
    return list(proposals.items())
