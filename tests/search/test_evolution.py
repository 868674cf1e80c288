"""The search finds what is good, never pays twice, and a kill changes nothing."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest

from headstart.search.evolution import (
    Evaluated,
    EvolutionSettings,
    Journal,
    evolve,
    ranked,
)
from headstart.search.space import Candidate, Space

TOTALS = (6, 8, 4, 12)
TARGET = (4, 5, 2, 9)
SIZES = list(itertools.product(*(range(1, total + 1) for total in TOTALS)))
SHAPES = np.array([row for row in SIZES if 200 <= math.prod(row) <= 400])
SETTINGS = EvolutionSettings(population=6, generations=4, elites=2, seed=1)
IDENTITY = {"teacher": "t", "settings": {"seed": 1, "sizes": (1, 2)}}

both_granularities = pytest.mark.parametrize("fine", [False, True], ids=["coarse", "fine"])


def space(fine: bool) -> Space:
    return Space(SHAPES, TOTALS, fine)


COARSE = space(fine=False)


def distance(candidate: Candidate) -> float:
    """From the target shape, and from the last units of each axis."""
    sizes = list(candidate.sizes.values())
    units = sum(candidate.layers + candidate.mlp) / 100
    return sum(abs(a - b) / t for a, b, t in zip(sizes, TARGET, TOTALS, strict=True)) - units


def count(candidate: Candidate) -> int:
    return math.prod(candidate.sizes.values())


class Evaluator:
    """A fitness that remembers its calls, and fails after `kill_after` of them."""

    def __init__(
        self, kill_after: int | None = None, loss: Callable[[Candidate], float] = distance
    ) -> None:
        self.kill_after, self.loss = kill_after, loss
        self.calls: list[Candidate] = []

    def __call__(self, candidate: Candidate) -> float:
        if len(self.calls) == self.kill_after:
            raise KeyboardInterrupt
        self.calls.append(candidate)
        return self.loss(candidate)


def run(
    path: Path,
    evaluate: Callable[[Candidate], float],
    settings: EvolutionSettings = SETTINGS,
    space: Space = COARSE,
    **more: Any,
) -> list[Evaluated]:
    return evolve(space, evaluate, count, settings, Journal(path, IDENTITY), **more)


def timeless(history: list[Evaluated]) -> str:
    """As text, in which one NaN equals another."""
    return repr([replace(one, seconds=0) for one in history])


def timeless_journal(path: Path) -> str:
    return repr([{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()])


def a_candidate(size: int) -> Candidate:
    return Candidate(*[tuple(range(size))] * 4)


@both_granularities
def test_generations_are_whole_and_nothing_is_evaluated_twice(fine: bool, tmp_path: Path) -> None:
    settings = EvolutionSettings(population=10, generations=6, mutation=0.4, crossover=0.2)
    evaluate = Evaluator()
    history = run(tmp_path / "j", evaluate, settings, space(fine))
    assert [one.candidate for one in history] == evaluate.calls
    assert len(set(evaluate.calls)) == len(evaluate.calls)
    rows = set(map(tuple, SHAPES.tolist()))
    for one in history:
        assert tuple(one.candidate.sizes.values()) in rows
        assert (one.loss, one.parameters) == (distance(one.candidate), count(one.candidate))
    assert Counter(one.generation for one in history) == dict.fromkeys(range(6), 10)
    first, second = (Counter(one.origin for one in history if one.generation == g) for g in (0, 1))
    assert first == {"sample": 10}
    assert second == {"mutation": 4, "crossover": 2, "immigrant": 4}


def test_only_the_elites_breed(tmp_path: Path) -> None:
    parents: list[tuple[int, Candidate]] = []  # evaluations so far, parent
    evaluate = Evaluator()

    class Watched(Space):
        def mutate(self, rng: random.Random, parent: Candidate) -> Candidate:
            parents.append((len(evaluate.calls), parent))
            return super().mutate(rng, parent)

        def cross(self, rng: random.Random, mother: Candidate, father: Candidate) -> Candidate:
            parents.extend((len(evaluate.calls), parent) for parent in (mother, father))
            return super().cross(rng, mother, father)

    settings = replace(SETTINGS, population=12, elites=3)
    run(tmp_path / "j", evaluate, settings, Watched(SHAPES, TOTALS, fine=False))
    for num_seen in (12, 24, 36):
        elites = sorted(evaluate.calls[:num_seen], key=distance)[:3]
        assert {parent for seen, parent in parents if seen == num_seen} == set(elites)
    assert {seen for seen, _ in parents} == {12, 24, 36}


@both_granularities
def test_a_killed_search_ends_like_one_that_was_not(fine: bool, tmp_path: Path) -> None:
    def loss(candidate: Candidate) -> float:
        return math.nan if len(candidate.layers) == 5 else distance(candidate)

    whole = run(tmp_path / "whole", Evaluator(loss=loss), space=space(fine))
    assert any(math.isnan(one.loss) for one in whole)
    for kill_after in range(len(whole) + 1):
        path = tmp_path / str(kill_after)
        if kill_after < len(whole):
            with pytest.raises(KeyboardInterrupt):
                run(path, Evaluator(kill_after, loss), space=space(fine))
        else:
            run(path, Evaluator(loss=loss), space=space(fine))
        resumed, replays = Evaluator(loss=loss), Mock()
        history = run(path, resumed, space=space(fine), on_evaluated=replays)
        assert resumed.calls == [one.candidate for one in whole[kill_after:]]
        expected = [call(one, position < kill_after) for position, one in enumerate(history)]
        assert replays.mock_calls == expected
        assert timeless(history) == timeless(whole)
        assert timeless_journal(path) == timeless_journal(tmp_path / "whole")


def test_a_journal_cut_anywhere_is_mended(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Evaluator())
    text = (tmp_path / "whole").read_text()
    line_ends = [position for position, letter in enumerate(text) if letter == "\n"]
    for cut in sorted({*range(0, len(text), 61), *line_ends, *(end + 1 for end in line_ends)}):
        path = tmp_path / "cut"
        path.write_text(text[:cut])
        resumed = Evaluator()
        history = run(path, resumed)
        kept = max(0, text[:cut].count("\n") - 1)  # the first line is the identity
        assert resumed.calls == [one.candidate for one in whole[kept:]]
        assert timeless(history) == timeless(whole)
        assert timeless_journal(path) == timeless_journal(tmp_path / "whole")


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({**IDENTITY, "teacher": "u"}, "teacher is 't' there, 'u' here"),
        ({**IDENTITY, "settings": {"seed": 2}}, "settings is .* there"),
        ({**IDENTITY, "data": "d"}, "data is None there, 'd' here"),
        ({"teacher": "t"}, "settings is .* there, None here"),
    ],
)
def test_the_journal_of_another_search_is_refused(
    other: dict[str, Any], key: str, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "journal"
    run(path, Evaluator())
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"journal of another search \({key}"):
        Journal(path, other)
    assert path.read_text() == before
    assert len(Journal(path, IDENTITY).evaluated) == len(before.splitlines()) - 1


def test_a_loss_that_is_no_number_comes_last() -> None:
    losses = [3.0, math.nan, 1.0, math.inf, 2.0, math.nan]
    history = [
        Evaluated(0, "sample", a_candidate(size + 1), 1, loss, 0)
        for size, loss in enumerate(losses)
    ]
    assert [history.index(one) for one in ranked(history)] == [2, 4, 0, 1, 3, 5]


def test_a_search_of_nothing_but_nan_ends(tmp_path: Path) -> None:
    history = run(tmp_path / "j", Evaluator(loss=lambda candidate: math.nan))
    assert len(history) == SETTINGS.population * SETTINGS.generations


def test_immigrants_take_the_place_of_offspring_that_run_out(tmp_path: Path) -> None:
    settings = replace(SETTINGS, population=12, elites=1, mutation=0, crossover=1)
    history = run(tmp_path / "j", Evaluator(), settings)
    origins = Counter((one.generation, one.origin) for one in history)
    assert origins == {(0, "sample"): 12, **{(g, "immigrant"): 12 for g in (1, 2, 3)}}


@pytest.mark.parametrize("num_shapes", [1, 3, 20])
def test_a_space_that_runs_dry_ends_the_search(num_shapes: int, tmp_path: Path) -> None:
    tiny = Space(SHAPES[:num_shapes], TOTALS, fine=False)
    settings = replace(SETTINGS, population=16, generations=6)
    history = run(tmp_path / "j", Evaluator(), settings, tiny)
    assert {tuple(one.candidate.sizes.values()) for one in history} == set(
        map(tuple, SHAPES[:num_shapes].tolist())
    )
    assert len(history) == num_shapes


@both_granularities
def test_search_improves_on_its_first_generation_and_on_chance(fine: bool, tmp_path: Path) -> None:
    gains, leads = [], []
    for seed in range(10):
        settings = EvolutionSettings(seed=seed)
        history = run(tmp_path / str(seed), Evaluator(), settings, space(fine))
        best = ranked(history)[0].loss
        rng = random.Random(seed)
        by_chance = min(distance(space(fine).sample(rng)) for _ in history)
        gains.append(min(one.loss for one in history if one.generation == 0) - best)
        leads.append(by_chance - best)
    assert min(gains) >= 0
    assert median(gains) > 0.1
    assert median(leads) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "population is 0"),
        ({"generations": 0}, "generations is 0"),
        ({"elites": -1}, "elites is -1"),
        ({"mutation": 0.7, "crossover": 0.4}, "mutation 0.7 and crossover 0.4"),
        ({"mutation": -0.1}, "mutation -0.1"),
    ],
)
def test_settings_errors_name_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvolutionSettings(**settings)
