"""Sets of units on one axis, and how layers share a total of them.

Sets are written relative to the axis order, shares as levels of a `Ladder`.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from headstart.model.spec import Indices, format_indices, parse_indices
from headstart.system.errors import UserError


class Units(NamedTuple):
    """The first `size` ranks of an axis, but for a few: `added` ones stand in for `dropped` ones.

    Any set of ranks can be written so, and a set that follows the axis order is just its size.

    >>> Units(4, dropped=(1,), added=(6,)).ranks()
    (0, 2, 3, 6)
    """

    size: int
    dropped: Indices = ()
    added: Indices = ()

    def ranks(self) -> Indices:
        """The kept ranks, ascending."""
        if not self.dropped:
            return tuple(range(self.size))
        gone = set(self.dropped)
        return (*(rank for rank in range(self.size) if rank not in gone), *self.added)

    def __str__(self) -> str:
        if not self.dropped:
            return str(self.size)
        return f"{self.size} -{format_indices(self.dropped)} +{format_indices(self.added)}"

    @staticmethod
    def parse(text: str) -> Units:
        """Read what `str` writes.

        >>> Units.parse("4 -1 +6,8-9")
        Units(size=4, dropped=(1,), added=(6, 8, 9))
        """
        found = re.fullmatch(r"(\d+)(?: -(\S+) \+(\S+))?", text)
        if not found:
            raise UserError(f"{text!r} is not a set of units such as '4' or '4 -1 +6'")
        if found[2] is None:
            return Units(int(found[1]))
        return Units(int(found[1]), parse_indices(found[2]), parse_indices(found[3]))


def spread(rng: random.Random, num_layers: int, total: int, top: int) -> list[int]:
    """Share levels among layers, from nearly even to rough."""
    levels = even(num_layers, total)
    if num_layers == 1 or not top:
        return levels
    rough = rng.random() * top
    for _ in range(num_layers):
        giver, taker = int(rng.random() * num_layers), int(rng.random() * num_layers)
        moved = min(int(rng.random() * rough + 0.5), levels[giver], top - levels[taker])
        if giver != taker:
            levels[giver] -= moved
            levels[taker] += moved
    return levels


def even(num_layers: int, total: int) -> list[int]:
    """Levels as even as they can be; the more important layers get the larger share."""
    share, more = divmod(total, num_layers)
    return [share + 1] * more + [share] * (num_layers - more)


def filled(rng: random.Random, levels: list[int], total: int, top: int) -> list[int]:
    """Raise or lower levels between 0 and `top`, all about alike, until they sum to a total."""
    missing = total - sum(levels)
    assert 0 <= total <= top * len(levels)
    while missing:
        share = max(1, abs(missing) // len(levels))
        start = rng.randrange(len(levels))
        for offset in range(len(levels)):
            place = (start + offset) % len(levels)
            room = top - levels[place] if missing > 0 else levels[place]
            moved = min(share, room, abs(missing))
            moved = moved if missing > 0 else -moved
            levels[place] += moved
            missing -= moved
            if not missing:
                break
    return levels


def resized(units: Units, size: int) -> Units:
    """The same choice of units at another size, as far as it still says anything."""
    if size == units.size or not units.dropped:
        return Units(size, units.dropped, units.added)
    dropped = [rank for rank in units.dropped if rank < size]
    added = [rank for rank in units.added if rank >= size]
    exchanges = min(len(dropped), len(added))
    return Units(size, tuple(dropped[len(dropped) - exchanges :]), tuple(added[:exchanges]))


def exchanged(rng: random.Random, units: Units, total: int, count: int, reach: float) -> Units:
    """Exchange up to `count` kept ranks for others, near the edge of what the order would keep.

    Half of the time an earlier exchange is undone instead, where there is one.
    """
    size, dropped, added = units.size, set(units.dropped), set(units.added)
    if size == total:
        return units
    inward, outward = max(1.0, reach * size / 2), max(1.0, reach * (total - size) / 2)
    for _ in range(count):
        if dropped and rng.random() < 0.5:
            dropped.discard(rng.choice(sorted(dropped)))
            added.discard(rng.choice(sorted(added)))
            continue
        out = size - 1 - int(rng.expovariate(1 / inward))
        into = size + int(rng.expovariate(1 / outward))
        if out >= 0 and into < total and out not in dropped and into not in added:
            dropped.add(out)
            added.add(into)
    return Units(size, tuple(sorted(dropped)), tuple(sorted(added)))
