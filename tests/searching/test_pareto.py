"""Fronts against the definition by brute force, crowding against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from headstart.searching.pareto import crowding_distances, nondominated_fronts, select

INFINITY = float("inf")


def dominates(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = list(zip(one.tolist(), other.tolist(), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def fronts_by_definition(objectives: np.ndarray) -> list[list[int]]:
    """Peel off what nothing left dominates, until nothing is left."""
    left, fronts = list(range(len(objectives))), []
    while left:
        front = [i for i in left if not any(dominates(objectives[j], objectives[i]) for j in left)]
        fronts.append(front)
        left = [i for i in left if i not in front]
    return fronts


def crowding_by_definition(objectives: np.ndarray) -> list[float]:
    """The pseudocode of section III-B, sorting in Python; no objective may be constant."""
    distances = [0.0] * len(objectives)
    for values in objectives.T.tolist():
        order = sorted(range(len(values)), key=lambda i: (values[i], i))
        distances[order[0]] = distances[order[-1]] = INFINITY
        for before, here, after in zip(order, order[1:], order[2:], strict=False):
            distances[here] += (values[after] - values[before]) / (max(values) - min(values))
    return distances


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("largest", [2, 5, 50])
def test_fronts_agree_with_the_definition(num_objectives: int, largest: int) -> None:
    rng = np.random.default_rng(largest)
    for num_points in (1, 2, 7, 60):
        objectives = rng.integers(-largest, largest, (num_points, num_objectives)).astype(float)
        assert nondominated_fronts(objectives) == fronts_by_definition(objectives)


def test_a_chain_has_as_many_fronts_as_points_and_a_trade_off_has_one() -> None:
    rising = np.arange(6.0)
    assert nondominated_fronts(np.stack([rising, rising], axis=1)) == [[i] for i in range(6)]
    assert nondominated_fronts(np.stack([rising, -rising], axis=1)) == [list(range(6))]


def test_duplicates_share_a_front() -> None:
    objectives = np.array([[2, 2], [1, 1], [2, 2], [1, 1], [0.0, 1.5], [-0.0, 1.5]])
    assert nondominated_fronts(objectives) == [[1, 3, 4, 5], [0, 2]]


def test_points_without_numbers_come_last() -> None:
    bad = [[np.nan, 0], [0, np.inf], [-np.inf, 0], [np.nan, np.nan]]
    objectives = np.array([bad[0], [1, 1], bad[1], bad[2], [2, 2], bad[3]], dtype=float)
    assert nondominated_fronts(objectives) == [[1], [4], [0, 2, 3, 5]]
    assert select(objectives, 6) == [1, 4, 0, 2, 3, 5]
    assert nondominated_fronts(np.array(bad, dtype=float)) == [[0, 1, 2, 3]]
    assert select(np.array(bad, dtype=float), 3) == [0, 1, 2]


def test_no_points() -> None:
    assert nondominated_fronts(np.empty((0, 2))) == []
    assert crowding_distances(np.empty((0, 2))).tolist() == []
    assert select(np.empty((0, 2)), 3) == []


def test_crowding_by_hand() -> None:
    # The spans are 10 and 8. The second point has neighbours 0 and 4 apart in the first objective,
    # 8 and 3 in the second; the third 1 and 10, 7 and 0.
    objectives = np.array([[0, 8], [1, 7], [4, 3], [10, 0]], dtype=float)
    expected = [INFINITY, 4 / 10 + 5 / 8, 9 / 10 + 7 / 8, INFINITY]
    assert crowding_distances(objectives).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_crowding_agrees_with_the_pseudocode(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    for _ in range(20):
        objectives = rng.integers(0, 6, (30, num_objectives)).astype(float)
        objectives[0], objectives[1] = 0, 5  # no objective is constant
        expected = crowding_by_definition(objectives)
        assert crowding_distances(objectives).tolist() == pytest.approx(expected)


def test_crowding_does_not_depend_on_units() -> None:
    objectives = np.random.default_rng(0).random((20, 2))
    scaled = objectives * [1e9, 1e-3] + [5, -7]
    assert crowding_distances(scaled) == pytest.approx(crowding_distances(objectives), rel=1e-4)


def test_a_constant_objective_says_nothing() -> None:
    objectives = np.array([[3, 1], [0, 1], [1, 1], [9, 1]], dtype=float)
    assert crowding_distances(objectives).tolist() == [8 / 9, INFINITY, 3 / 9, INFINITY]
    assert crowding_distances(np.ones((3, 2))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_points", [1, 2])
def test_few_points_are_all_lonely(num_points: int) -> None:
    assert crowding_distances(np.ones((num_points, 2))).tolist() == [INFINITY] * num_points


def test_points_without_numbers_are_nobodys_neighbours() -> None:
    objectives = np.array([[0, 8], [np.nan, 7.5], [1, 7], [np.inf, 5], [4, 0]])
    assert crowding_distances(objectives).tolist() == [INFINITY, 0, 2.0, 0, INFINITY]


def test_selection_takes_whole_fronts_then_the_loneliest_of_the_next() -> None:
    # The first front is the last point; the second lies on a falling line.
    objectives = np.array([[1, 9], [2, 8], [3, 7], [6, 4], [9, 1], [12, 12], [0, 0]], dtype=float)
    assert select(objectives, 1) == [6]
    assert select(objectives, 3) == [6, 0, 4]
    assert select(objectives, 4) == [6, 0, 4, 3]  # 3: (9-3)/8 twice; 2: (6-2)/8; 1: (3-1)/8
    assert select(objectives, 6) == [6, 0, 4, 3, 2, 1]
    assert select(objectives, 99) == [6, 0, 4, 3, 2, 1, 5]
    assert select(objectives, 0) == []


def test_ties_go_to_the_lower_index() -> None:
    evenly_spaced = np.array([[0, 4], [2, 2], [3, 1], [1, 3], [4, 0]], dtype=float)
    assert select(evenly_spaced, 5) == [0, 4, 1, 2, 3]
    assert select(np.ones((4, 3)), 3) == [0, 1, 2]


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_selection_is_front_by_front(num_objectives: int) -> None:
    objectives = np.random.default_rng(1).integers(0, 9, (80, num_objectives)).astype(float)
    chosen = select(objectives, 80)
    for front in fronts_by_definition(objectives):
        part, chosen = chosen[: len(front)], chosen[len(front) :]
        assert sorted(part) == front
        distances = dict(zip(front, crowding_distances(objectives[front]), strict=True))
        assert part == sorted(front, key=lambda index: (-distances[index], index))


def test_ten_thousand_points() -> None:
    """The first front of many random points is where the running minimum falls."""
    objectives = np.random.default_rng(0).random((10_000, 2))
    order = np.argsort(objectives[:, 0])
    lowest = np.minimum.accumulate(objectives[order, 1])
    steps = order[objectives[order, 1] == lowest]
    assert nondominated_fronts(objectives)[0] == sorted(steps.tolist())
