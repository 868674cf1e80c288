"""Selection by several objectives at once, all minimised: NSGA-II's fronts and crowding.

Source: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002),
sections III-A and III-B.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def nondominated_fronts(objectives: Float[np.ndarray, "points objectives"]) -> list[list[int]]:
    """Sort points into fronts: no point of a front dominates another, or one of an earlier front.

    A point dominates another that it is nowhere worse than and somewhere better than. Duplicates
    share a front. Points with a value that is no finite number are no rivals: they come last, in a
    front of their own.

    Returns:
        Fronts from the best to the worst, each with its points' indices in ascending order.
    """
    finite = np.isfinite(objectives).all(axis=1)
    points, place = np.unique(objectives[finite], axis=0, return_inverse=True)
    columns = np.ascontiguousarray(points.T)
    front = np.zeros(len(points), dtype=int)
    # Distinct points in lexicographic order: only an earlier one can dominate, and it is already no
    # worse in the first objective. A front's number is the longest chain of dominance behind it.
    for index in range(1, len(points)):
        no_worse = columns[1:, :index] <= columns[1:, index, None]
        dominating = np.logical_and.reduce(no_worse, axis=0)
        front[index] = 1 + front[:index].max(where=dominating, initial=-1)
    fronts = np.full(len(objectives), len(points))  # behind any front there can be
    fronts[finite] = front[place.ravel()]
    order = np.argsort(fronts, kind="stable")
    starts = np.flatnonzero(np.diff(fronts[order])) + 1
    return [part.tolist() for part in np.split(order, starts) if part.size]


def crowding_distances(
    objectives: Float[np.ndarray, "points objectives"],
) -> Float[np.ndarray, " points"]:
    """How far apart the neighbours of each point of one front are; larger is lonelier.

    The distance is summed over the objectives, each scaled to the front's range. Points at the end
    of a range are infinitely lonely; of equal ones, the first at its low end and the last at its
    high end. An objective in which all are equal says nothing. Points with a value that is no
    finite number have distance 0 and are nobody's neighbours.
    """
    finite = np.flatnonzero(np.isfinite(objectives).all(axis=1))
    distances = np.zeros(len(objectives))
    if len(finite) <= 2:
        distances[finite] = np.inf
        return distances
    for values in objectives[finite].T:
        order = np.argsort(values, kind="stable")
        ascending = values[order]
        span = ascending[-1] - ascending[0]
        if span > 0:
            distances[finite[order[1:-1]]] += (ascending[2:] - ascending[:-2]) / span
            distances[finite[order[[0, -1]]]] = np.inf
    return distances


def select(objectives: Float[np.ndarray, "points objectives"], count: int) -> list[int]:
    """The indices of the best points: by front, then the loneliest first, then by index.

    Returns:
        `count` indices, best first; all where there are fewer points.
    """
    chosen: list[int] = []
    for front in nondominated_fronts(objectives):
        if len(chosen) >= count:
            break
        loneliest = np.argsort(-crowding_distances(objectives[front]), kind="stable")
        chosen += [front[index] for index in loneliest]
    return chosen[:count]
