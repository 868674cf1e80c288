"""The search finds what is good, never pays twice, and a kill changes nothing."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from cProfile import Profile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from tests.searching.conftest import CONFIG

from headstart.model.architecture import Architecture
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate
from headstart.searching.evolution import EvolutionSettings, evolve, ranked
from headstart.searching.grid import GridSettings
from headstart.searching.journal import Evaluated, Journal
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.space import Space, SpaceName
from headstart.searching.units import Units

GRID = GridSettings(embed_step=16, mlp_step=16)
BIN, NARROW = Bin(40_000, 90_000), Bin(60_000, 62_000)
TARGET = {"layers": 2, "embed": 56, "kv_groups": 4, "mlp": 144}
"""Of the best candidate; far from the teacher's proportions, with which every search begins."""
TEACHER = Architecture.of(CONFIG)
TOTALS = TEACHER.sizes
SETTINGS = EvolutionSettings(population=6, generations=4, elites=2, seed=1)
NO_RACING = RacingSettings(rungs=1)
IDENTITY = {"teacher": "t"}
BLOCK_LENGTH = 4

every_space = pytest.mark.parametrize(
    "name", ["coarse-uniform", "fine-uniform", "coarse-layerwise", "fine-layerwise"]
)
with_and_without_racing = pytest.mark.parametrize("racing", [NO_RACING, RacingSettings(rungs=3)])


def space(name: SpaceName = "fine-uniform", bin: Bin = BIN) -> Space:
    return Space.build(TEACHER, name, bin, GRID)


def mean(units: tuple[Units, ...]) -> float:
    return sum(of_layer.size for of_layer in units) / len(units)


def distance(candidate: Candidate) -> float:
    """From the target's sizes, less a prize for the last units of two axes."""
    sizes = {
        "layers": candidate.layers.size,
        "embed": candidate.embed.size,
        "kv_groups": mean(candidate.kv_groups),
        "mlp": mean(candidate.mlp),
    }
    prize = sum(candidate.layers.added + candidate.mlp[0].added) / 1000
    return sum(abs(sizes[axis] - TARGET[axis]) / TOTALS[axis] for axis in TARGET) + 2 - prize


def parameters(candidate: Candidate) -> int:
    return int(TEACHER.amount({**TOTALS, **candidate.sizes()}, "parameters", 8))


def chance(candidate: Candidate, more: int = 0) -> random.Random:
    """Of this candidate alone, the same in every process."""
    return random.Random(f"{candidate.to_json()} {more}")


class Killed(BaseException):
    pass


class Fitness:
    """A made-up loss, the same on every block but for a little noise; remembers its calls."""

    num_blocks, block_length = 16, BLOCK_LENGTH

    def __init__(
        self,
        kill_after: int | None = None,
        loss: Callable[[Candidate], float] = distance,
        noise: float = 0.02,
    ) -> None:
        self.kill_after, self.loss, self.noise = kill_after, loss, noise
        self.calls: list[tuple[Candidate, int, int]] = []

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        if len(self.calls) == self.kill_after:
            raise Killed
        self.calls.append((candidate, start, stop))
        loss = self.loss(candidate)
        if self.noise:
            loss += chance(candidate, start).gauss(0, self.noise)
        return loss * (stop - start) * (BLOCK_LENGTH - 1)


def run(
    path: Path,
    fitness: Fitness,
    settings: EvolutionSettings = SETTINGS,
    where: Space | None = None,
    racing: RacingSettings = NO_RACING,
    **more: Any,
) -> list[Evaluated]:
    race = Race(fitness, parameters, Journal(path, IDENTITY), racing, settings.elites)
    return evolve(where or space(), race, settings, **more)


def timeless(scores: list[Evaluated]) -> str:
    """As text, in which one NaN equals another."""
    return repr([replace(score, seconds=0) for score in scores])


def timeless_journal(path: Path) -> str:
    return repr([{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()])


@every_space
def test_generations_are_whole_and_nothing_is_scored_twice(name: SpaceName, tmp_path: Path) -> None:
    settings = EvolutionSettings(population=10, generations=6, mutation=0.4, crossover=0.2)
    fitness = Fitness()
    scores = run(tmp_path / "j", fitness, settings, space(name))
    scored_candidates = [candidate for candidate, _, _ in fitness.calls]
    assert [score.candidate for score in scores] == scored_candidates
    assert len(set(scored_candidates)) == len(scored_candidates)
    for score in scores:
        assert BIN.low <= score.parameters == parameters(score.candidate) <= BIN.high
        assert score.tokens == 16 * BLOCK_LENGTH
    assert Counter(score.generation for score in scores) == dict.fromkeys(range(6), 10)
    first, second = (
        Counter(score.origin for score in scores if score.generation == generation)
        for generation in (0, 1)
    )
    assert first == {"proportional": 1, "sample": 9}
    assert second == {"mutation": 4, "crossover": 2, "immigrant": 4}


class WatchedSpace(Space):
    """Tells who breeds, and after how many scores."""

    parents: list[tuple[int, Candidate]]
    scores: list[Evaluated]

    def mutate(self, rng: random.Random, parent: Candidate) -> Candidate:
        self.parents.append((len(self.scores), parent))
        return super().mutate(rng, parent)

    def cross(self, rng: random.Random, mother: Candidate, father: Candidate) -> Candidate:
        self.parents.extend((len(self.scores), parent) for parent in (mother, father))
        return super().cross(rng, mother, father)


def watched(
    tmp_path: Path, settings: EvolutionSettings, racing: RacingSettings, **more: Any
) -> tuple[list[Evaluated], list[set[Candidate]]]:
    """All scores, and the parents of each generation after the first."""
    where = WatchedSpace(**vars(space()))
    object.__setattr__(where, "parents", [])
    object.__setattr__(where, "scores", [])
    scores = run(
        tmp_path / "j",
        Fitness(),
        settings,
        where,
        racing,
        on_scored=lambda generation, scores: where.scores.extend(scores),
        **more,
    )
    by_generation: dict[int, set[Candidate]] = {}
    for num_scores, parent in where.parents:
        by_generation.setdefault(num_scores, set()).add(parent)
    assert sorted(by_generation) == [
        settings.population * generation for generation in range(1, settings.generations)
    ]
    return scores, list(by_generation.values())


@with_and_without_racing
def test_only_the_elites_breed(racing: RacingSettings, tmp_path: Path) -> None:
    """The best of all that were scored on all tokens."""
    settings = replace(SETTINGS, population=24, elites=3, seed=3)
    scores, parents = watched(tmp_path, settings, racing)
    token_counts = {score.tokens for score in scores}
    assert token_counts == {64} if racing.rungs == 1 else {BLOCK_LENGTH, 64} <= token_counts
    for generation, breeding in enumerate(parents, start=1):
        whole = [score for score in scores[: 24 * generation] if score.tokens == 64]
        elites = sorted(whole, key=lambda score: score.loss)[:3]
        assert breeding == {score.candidate for score in elites}


def front_numbers(points: list[tuple[float, float]]) -> list[int]:
    """By definition: peel off what nobody left dominates, again and again."""
    numbers: dict[int, int] = {}
    while len(numbers) < len(points):
        left = [place for place in range(len(points)) if place not in numbers]
        peeled = [
            place
            for place in left
            if not any(
                points[other] != points[place]
                and all(a <= b for a, b in zip(points[other], points[place], strict=True))
                for other in left
            )
        ]
        numbers |= dict.fromkeys(peeled, max(numbers.values(), default=-1) + 1)
    return [numbers[place] for place in range(len(points))]


def test_elites_of_a_tradeoff_come_from_the_first_fronts(tmp_path: Path) -> None:
    settings = replace(SETTINGS, population=30, elites=6, tradeoff="parameters")
    scores, parents = watched(tmp_path, settings, NO_RACING, burden=parameters)
    elites: list[Evaluated] = []
    breeds_large = False
    for generation, breeding in enumerate(parents, start=1):
        pool = elites + scores[30 * (generation - 1) : 30 * generation]
        fronts = front_numbers([(score.loss, score.parameters) for score in pool])
        elites = [score for score in pool if score.candidate in breeding]
        assert sorted(fronts[pool.index(score)] for score in elites) == sorted(fronts)[:6]
        by_loss = sorted(pool, key=lambda score: score.loss)[:6]
        breeds_large |= {score.candidate for score in by_loss} != breeding
    assert breeds_large  # it is not the six lowest losses that were chosen


@with_and_without_racing
@every_space
def test_a_killed_search_ends_like_one_that_was_not(
    name: SpaceName, racing: RacingSettings, tmp_path: Path
) -> None:
    """At twenty random moments, of which half cut a line of the journal short."""

    def loss(candidate: Candidate) -> float:
        return math.nan if chance(candidate).random() < 0.25 else distance(candidate)

    where, fitness = space(name), Fitness(loss=loss)
    whole = run(tmp_path / "whole", fitness, where=where, racing=racing)
    assert any(math.isnan(score.loss) for score in whole)
    rng = random.Random(name)
    for moment in range(20):
        path, kill_after = tmp_path / str(moment), rng.randrange(len(fitness.calls))
        with pytest.raises(Killed):
            run(path, Fitness(kill_after, loss), where=where, racing=racing)
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 1 + kill_after
        if moment % 2:
            lines[-1] = lines[-1][: rng.randrange(len(lines[-1]))]
            path.write_bytes(b"".join(lines))
        num_held = max(0, path.read_bytes().count(b"\n") - 1)
        resumed = Fitness(loss=loss)
        scores = run(path, resumed, where=where, racing=racing)
        assert resumed.calls == fitness.calls[num_held:]
        assert timeless(scores) == timeless(whole)
        assert ranked(scores)[0].candidate == ranked(whole)[0].candidate
        assert timeless_journal(path) == timeless_journal(tmp_path / "whole")


def test_a_killed_tradeoff_ends_like_one_that_was_not(tmp_path: Path) -> None:
    settings = replace(SETTINGS, elites=4, tradeoff="parameters")
    whole = run(tmp_path / "whole", Fitness(), settings, burden=parameters)
    for kill_after in (5, 11, 20):
        with pytest.raises(Killed):
            run(tmp_path / "j", Fitness(kill_after), settings, burden=parameters)
        scores = run(tmp_path / "j", Fitness(), settings, burden=parameters)
        assert timeless(scores) == timeless(whole)
        (tmp_path / "j").unlink()


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    scores = [
        timeless(run(tmp_path / str(place), Fitness(), replace(SETTINGS, seed=seed)))
        for place, seed in enumerate((1, 1, 2))
    ]
    assert scores[0] == scores[1] != scores[2]


def test_full_scores_rank_first_and_no_number_last() -> None:
    scores = [
        Evaluated(0, "sample", Candidate(Units(1), Units(1), size, (), ()), 1, loss, tokens, 0)
        for size, (loss, tokens) in enumerate(
            [(3.0, 8), (math.nan, 8), (1.0, 8), (math.inf, 8), (0.5, 4), (math.nan, 4), (2.0, 8)]
        )
    ]
    assert [scores.index(score) for score in ranked(scores)] == [2, 6, 0, 1, 3, 4, 5]


@with_and_without_racing
def test_a_search_of_nothing_but_nan_ends(racing: RacingSettings, tmp_path: Path) -> None:
    scores = run(tmp_path / "j", Fitness(loss=lambda candidate: math.nan), racing=racing)
    assert len(scores) == SETTINGS.population * SETTINGS.generations


def test_random_search_takes_the_samples_as_they_come(tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="random")
    scores = run(tmp_path / "j", Fitness(), settings)
    assert {score.origin for score in scores} == {"sample"}
    expected = dict[Candidate, None]()
    for generation in range(4):
        rng = random.Random(f"{SETTINGS.seed}, generation {generation}")
        while len(expected) < 6 * (generation + 1):
            expected[space().sample(rng)] = None
    assert [score.candidate for score in scores] == list(expected)


@every_space
def test_the_first_generation_has_the_shape_nearest_to_the_teachers(
    name: SpaceName, tmp_path: Path
) -> None:
    where = space(name)
    first, *others = run(tmp_path / "j", Fitness(), where=where)
    assert (first.origin, first.generation) == ("proportional", 0)
    assert [first.candidate] == where.proportional(1)
    assert "proportional" not in {score.origin for score in others}
    alone = run(tmp_path / "1", Fitness(), replace(SETTINGS, population=1, elites=1), where)
    assert alone[0].candidate == first.candidate


def test_importance_alone_takes_the_shapes_nearest_to_the_teachers(tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="importance")
    scores = run(tmp_path / "j", Fitness(), settings)
    assert {score.origin for score in scores} == {"proportional"}
    assert [score.generation for score in scores] == sorted([0, 1, 2, 3] * 6)
    assert [score.candidate for score in scores] == space().proportional(24)
    few = space(bin=NARROW)
    scores = run(tmp_path / "few", Fitness(), replace(settings, population=50), few)
    assert 0 < len(scores) == len(few.proportional(1000)) < 200


def test_immigrants_take_the_place_of_offspring_that_run_out(tmp_path: Path) -> None:
    settings = replace(SETTINGS, population=12, elites=1, mutation=0, crossover=1)
    scores = run(tmp_path / "j", Fitness(), settings, space("coarse-uniform"))
    origins = Counter((score.generation, score.origin) for score in scores)
    first = {(0, "proportional"): 1, (0, "sample"): 11}
    assert origins == {**first, **{(g, "immigrant"): 12 for g in (1, 2, 3)}}


@with_and_without_racing
def test_a_space_that_runs_dry_ends_the_search(racing: RacingSettings, tmp_path: Path) -> None:
    few = space("coarse-uniform", NARROW)
    num_shapes = few.rows.num_shapes()
    assert 5 < num_shapes < 60
    settings = replace(SETTINGS, population=40, generations=6)
    scores = run(tmp_path / "j", Fitness(), settings, few, racing)
    assert len({score.candidate for score in scores}) == len(scores) == num_shapes
    again = run(tmp_path / "j", Fitness(0), settings, few, racing)
    assert timeless(again) == timeless(scores)


def test_no_candidate_is_asked_for_once_a_generation_found_none(tmp_path: Path) -> None:
    """Else a search of thousands of generations in a small space would never end."""
    shape = space("coarse-uniform", NARROW).sample(random.Random(0))

    class OnlyOne:
        totals, samples = TOTALS, 0

        def sample(self, rng: random.Random) -> Candidate:
            self.samples += 1
            return shape

        def proportional(self, count: int) -> list[Candidate]:
            return [shape][:count]

        def mutate(self, rng: random.Random, parent: Candidate) -> Candidate:
            return parent

        def cross(self, rng: random.Random, mother: Candidate, father: Candidate) -> Candidate:
            return mother

    few: Any = OnlyOne()
    settings = EvolutionSettings(population=2, elites=2, generations=10_000)
    assert [score.candidate for score in run(tmp_path / "j", Fitness(), settings, few)] == [shape]
    assert few.samples < 1000


@every_space
def test_search_improves_on_its_first_generation_and_on_chance(
    name: SpaceName, tmp_path: Path
) -> None:
    gains, leads = [], []
    for seed in range(10):
        settings = EvolutionSettings(seed=seed)
        best, by_chance = (
            ranked(run(tmp_path / f"{seed}-{method}", Fitness(), variant, space(name)))[0].loss
            for method, variant in (("e", settings), ("r", replace(settings, method="random")))
        )
        only_first = replace(settings, generations=1)
        first = run(tmp_path / f"{seed}-1", Fitness(), only_first, space(name))
        gains.append(ranked(first)[0].loss - best)
        leads.append(by_chance - best)
    assert min(gains) >= 0
    assert median(gains) > 0.05
    assert median(leads) > 0


@with_and_without_racing
@every_space
def test_screening_finds_better_ones(
    name: SpaceName, racing: RacingSettings, tmp_path: Path
) -> None:
    leads = []
    for seed in range(10):
        screened = EvolutionSettings(population=8, seed=seed)
        best = [
            min(
                score.loss
                for score in run(tmp_path / f"{seed}-{index}", Fitness(), how, space(name), racing)
            )
            for index, how in enumerate((screened, replace(screened, screening=1)))
        ]
        leads.append(best[1] - best[0])
    assert median(leads) > 0


@with_and_without_racing
def test_a_generation_in_the_journal_is_not_bred_again(
    racing: RacingSettings, tmp_path: Path
) -> None:
    first = run(tmp_path / "j", Fitness(), racing=racing)
    nowhere: Any = object()
    assert timeless(run(tmp_path / "j", Fitness(0), where=nowhere, racing=racing)) == timeless(
        first
    )


def count_calls(search: Callable[[], Any]) -> int:
    """How many functions are called, of Python or of C."""
    profile = Profile()
    profile.runcall(search)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.exhaustive
@with_and_without_racing
def test_cost_grows_no_faster_than_the_search(racing: RacingSettings, tmp_path: Path) -> None:
    """Of searching, and of going on from the journal, whatever came before a generation."""
    where, costs = space("fine-layerwise"), []
    for generations in (5, 10, 20):
        settings = EvolutionSettings(population=100, generations=generations, elites=10)
        fitness = Fitness(
            loss=lambda candidate: distance(candidate) + hash(candidate) % 9973 / 1e5, noise=0
        )

        def search() -> None:
            journal = Journal(tmp_path / str(generations), IDENTITY)  # noqa: B023
            race = Race(fitness, lambda candidate: 1, journal, racing, 10)  # noqa: B023
            evolve(where, race, settings)  # noqa: B023

        anew, num_calls = count_calls(search), len(fitness.calls)
        costs.append((anew, count_calls(search)))
        assert len(fitness.calls) == num_calls >= 100 * generations
    for five, ten, twenty in zip(*costs, strict=True):
        assert twenty - ten < 2.5 * (ten - five)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "population is 0"),
        ({"generations": 0}, "generations is 0"),
        ({"elites": -1}, "elites is -1"),
        ({"screening": 0}, "screening is 0"),
        ({"mutation": 0.7, "crossover": 0.4}, "mutation 0.7 and crossover 0.4"),
        ({"mutation": -0.1}, "mutation -0.1"),
    ],
)
def test_settings_errors_name_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvolutionSettings(**settings)
