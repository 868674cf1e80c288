"""The four search spaces: how candidates inside a bin are sampled, mutated and crossed.

Coarse spaces keep the first ranks of each axis, fine ones any. In uniform spaces all layers keep
the same ranks, in layer-wise ones each its own. Every operator picks a row of the table of shapes
in the bin (`Rows`) first and fits the candidate to it, so it lands in the bin by construction.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from headstart.model.architecture import Architecture
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate
from headstart.searching.grid import GridSettings, Ladder, Rows, ladders_of, rows_in_bin
from headstart.searching.units import Units, even, exchanged, filled, resized, spread
from headstart.system.errors import UserError

SpaceName = Literal["coarse-uniform", "fine-uniform", "coarse-layerwise", "fine-layerwise"]

MAX_EXCHANGES = 16
"""Ranks of depth or width that one operator exchanges at most."""
MAX_LAYER_EXCHANGES = 2
"""The same for the groups or neurons of one layer."""


@dataclass(frozen=True)
class Space:
    """A search space inside one bin.

    Attributes:
        rows: the shapes in the bin.
        kv_groups: the sizes that groups may take.
        mlp: the sizes that neurons may take.
        totals: the teacher's size of each axis.
        uniform: whether all layers are alike.
        fine: whether candidates choose which units to keep as well as how many.
        unit_noise: fine spaces only: how far from the axis order exchanged units may lie, as a
            fraction of the axis, and how many are exchanged in a fresh candidate.
    """

    rows: Rows
    kv_groups: Ladder
    mlp: Ladder
    totals: dict[str, int]
    uniform: bool
    fine: bool
    unit_noise: float = 0.5

    @staticmethod
    def build(
        architecture: Architecture,
        name: SpaceName,
        bin: Bin,
        grid: GridSettings | None = None,
        unit_noise: float = 0.5,
    ) -> Space:
        """A teacher's search space, from its config alone.

        Raises:
            UserError: the grid is malformed, or no candidate can meet the bin.
        """
        grid = grid or GridSettings()
        uniform = name.endswith("uniform")
        if grid.layer_periods and name.startswith("fine"):
            raise UserError(
                f"search.space {name} removes any layers, and search.grid.layer_periods keeps them "
                "together; choose a coarse space, or leave it out"
            )
        rows = rows_in_bin(architecture, grid, bin, uniform)
        ladders = ladders_of(architecture, grid)
        return Space(
            rows=rows,
            kv_groups=ladders["kv_groups"],
            mlp=ladders["mlp"],
            totals=dict(architecture.sizes),
            uniform=uniform,
            fine=name.startswith("fine"),
            unit_noise=unit_noise,
        )

    @cached_property
    def _cells(self) -> dict[tuple[int, int, int], tuple[int, int]]:
        """(embed, layers, head_dim) -> its rows, from the first to before the last."""
        rows = self.rows
        keys = np.stack([rows.embed, rows.layers, rows.head_dim], axis=1)
        starts = [0, *(np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1).tolist()]
        ends = [*starts[1:], len(keys)]
        return {
            (embed, layers, head_dim): (start, end)
            for (embed, layers, head_dim), start, end in zip(
                keys[starts].tolist(), starts, ends, strict=True
            )
        }

    @cached_property
    def _cell_array(self) -> Int[np.ndarray, "cells 3"]:
        return np.asarray(list(self._cells))

    @cached_property
    def _by_width(self) -> dict[int, dict[int, list[int]]]:
        """embed -> layers -> head sizes, of the cells in the bin."""
        tree: dict[int, dict[int, list[int]]] = {}
        for embed, layers, head_dim in self._cells:
            tree.setdefault(embed, {}).setdefault(layers, []).append(head_dim)
        return tree

    @cached_property
    def _values(self) -> list[list[int]]:
        """The widths, depths and head sizes that occur in the bin, each ascending."""
        return [np.unique(column).tolist() for column in self._cell_array.T]

    def sample(self, rng: random.Random) -> Candidate:
        """A random candidate.

        Width is drawn first, then depth, head size, groups and neurons, each evenly among what
        still meets the bin, so that none clumps.
        """
        embed = rng.choice(list(self._by_width))
        layers = rng.choice(list(self._by_width[embed]))
        head_dim = rng.choice(self._by_width[embed][layers])
        row = rng.randrange(*self._cells[embed, layers, head_dim])
        groups = int(self.rows.groups[row])
        neurons = rng.randint(int(self.rows.first[row]), int(self.rows.last[row]))
        noise = rng.random() * self.unit_noise if self.fine else 0.0

        def inner(ladder: Ladder, total_level: int, total: int) -> tuple[Units, ...]:
            levels = [total_level] if self.uniform else spread(rng, layers, total_level, ladder.top)
            return tuple(
                self._with_exchanges(
                    rng, Units(ladder.size(level)), total, noise, MAX_LAYER_EXCHANGES
                )
                for level in levels
            )

        return Candidate(
            self._with_exchanges(rng, Units(layers), self.totals["layers"], noise, MAX_EXCHANGES),
            self._with_exchanges(rng, Units(embed), self.totals["embed"], noise, MAX_EXCHANGES),
            head_dim,
            inner(self.kv_groups, groups, self.totals["kv_groups"]),
            inner(self.mlp, neurons, self.totals["mlp"]),
        )

    def mutate(self, rng: random.Random, parent: Candidate) -> Candidate:
        """Change a candidate a little: its shape, how layers share it, or which units it keeps."""
        moves = ["shape"]
        if not self.uniform and parent.layers.size > 1:
            moves.append("share")
        if self.fine:
            moves.append("units")
        move = rng.choice(moves)
        if move == "units":
            return self._exchanged_units(rng, parent)
        if move == "share":
            return self._shared_anew(rng, parent)
        shape = _shape(parent)
        groups, neurons = self._levels(parent)
        columns = [column for column in range(3) if len(self._values[column]) > 1]
        column = rng.choice([*columns, 3, 4])
        if column < 3:
            values = self._values[column]
            place = bisect_left(values, shape[column]) + rng.choice((-2, -1, 1, 2))
            shape[column] = values[max(0, min(len(values) - 1, place))]
        else:
            scale = 1 if self.uniform else max(1, parent.layers.size // 4)
            change = rng.choice((-1, 1)) * rng.randint(1, 2 * scale)
            if column == 3:
                groups += change
            else:
                neurons += change
        cell = self._nearest_cell(shape, column if column < 3 else None)
        if column < 3 and not self.uniform:  # sums follow the depth, so that layers keep theirs
            groups = round(groups * cell[1] / parent.layers.size)
            neurons = round(neurons * cell[1] / parent.layers.size)
        row_groups, row_neurons = self._nearest_levels(cell, groups, neurons, column == 4)
        return self._fitted(rng, cell, row_groups, row_neurons, parent, parent)

    def cross(self, rng: random.Random, mother: Candidate, father: Candidate) -> Candidate:
        """Take each axis, and each layer, from either parent, and fit the child to the bin."""
        shape = [rng.choice(pair) for pair in zip(_shape(mother), _shape(father), strict=True)]
        cell = self._nearest_cell(shape, None)
        groups, _ = self._levels(rng.choice((mother, father)))
        _, neurons = self._levels(rng.choice((mother, father)))
        if not self.uniform:
            depth = (mother.layers.size + father.layers.size) / 2
            groups, neurons = (round(level * cell[1] / depth) for level in (groups, neurons))
        row_groups, row_neurons = self._nearest_levels(cell, groups, neurons, False)
        return self._fitted(rng, cell, row_groups, row_neurons, mother, father)

    def proportional(self, count: int) -> list[Candidate]:
        """The shapes nearest to the teacher's own proportions, which follow the axis order."""
        rows, totals = self.rows, self.totals
        copies = np.ones_like(rows.layers) if self.uniform else rows.layers
        kept = [
            rows.embed / totals["embed"],
            rows.layers / totals["layers"],
            (self.kv_groups.low + self.kv_groups.step * rows.groups / copies) / totals["kv_groups"],
        ]
        mean_share = np.mean(kept, axis=0) * totals["mlp"]
        level = np.round((mean_share - self.mlp.low) / self.mlp.step * copies).astype(np.int64)
        level = np.clip(level, rows.first, rows.last)
        kept.append((self.mlp.low + self.mlp.step * level / copies) / totals["mlp"])
        found = []
        for row in np.argsort(np.std(kept, axis=0), kind="stable")[:count].tolist():
            layers = int(rows.layers[row])
            inner = []
            for ladder, total in ((self.kv_groups, rows.groups[row]), (self.mlp, level[row])):
                levels = [int(total)] if self.uniform else even(layers, int(total))
                inner.append(tuple(Units(ladder.size(of_layer)) for of_layer in levels))
            head_dim = int(rows.head_dim[row])
            found.append(Candidate(Units(layers), Units(int(rows.embed[row])), head_dim, *inner))
        return found

    def _levels(self, candidate: Candidate) -> tuple[int, int]:
        """Levels of groups and neurons as the rows count them."""
        groups = sum(_levels_of(candidate.kv_groups, self.kv_groups))
        return groups, sum(_levels_of(candidate.mlp, self.mlp))

    def _nearest_cell(self, shape: list[int], fixed: int | None) -> tuple[int, int, int]:
        """The cell nearest to a shape, in fractions of each axis; one column may be fixed."""
        embed, layers, head_dim = shape
        if (embed, layers, head_dim) in self._cells:
            return embed, layers, head_dim
        cells, totals = self._cell_array, self.totals
        scale = np.array([totals["embed"], totals["layers"], totals["head_dim"]])
        distance = (np.abs(cells - np.asarray(shape)) / scale).sum(axis=1)
        if fixed is not None:
            distance += 1000 * (cells[:, fixed] != shape[fixed])
        nearest: tuple[int, int, int] = tuple(cells[int(distance.argmin())].tolist())
        return nearest

    def _nearest_levels(
        self, cell: tuple[int, int, int], groups: int, neurons: int, neurons_first: bool
    ) -> tuple[int, int]:
        """Levels that meet the bin in a cell, nearest to those wanted."""
        start, end = self._cells[cell]
        column = self.rows.groups
        if neurons_first:
            first, last = self.rows.first[start:end], self.rows.last[start:end]
            fits = np.flatnonzero((first <= neurons) & (neurons <= last))
            if len(fits):
                row = start + int(fits[np.abs(column[start + fits] - groups).argmin()])
                return int(column[row]), neurons
        row = bisect_left(column, groups, start, end)
        if row == end or (row > start and groups - column[row - 1] <= column[row] - groups):
            row -= 1
        first_level, last_level = int(self.rows.first[row]), int(self.rows.last[row])
        return int(column[row]), max(first_level, min(last_level, neurons))

    def _fitted(
        self,
        rng: random.Random,
        cell: tuple[int, int, int],
        groups: int,
        neurons: int,
        mother: Candidate,
        father: Candidate,
    ) -> Candidate:
        """A child of this shape, with its units from its parents."""
        embed, num_layers, head_dim = cell
        layers = resized(rng.choice((mother, father)).layers, num_layers)
        width = resized(rng.choice((mother, father)).embed, embed)
        if self.uniform:
            (of_groups,) = rng.choice((mother.kv_groups, father.kv_groups))
            (of_neurons,) = rng.choice((mother.mlp, father.mlp))
            return Candidate(
                layers,
                width,
                head_dim,
                (resized(of_groups, self.kv_groups.size(groups)),),
                (resized(of_neurons, self.mlp.size(neurons)),),
            )
        genes = [
            dict(zip(parent.layers.ranks(), zip(parent.kv_groups, parent.mlp, strict=True)))  # noqa: B905
            for parent in ((mother,) if mother is father else (mother, father))
        ]
        chosen = []
        for rank in layers.ranks():
            known = [of_parent[rank] for of_parent in genes if rank in of_parent]
            chosen.append(rng.choice(known) if known else rng.choice(list(genes[0].values())))
        of_layers = zip(*chosen, strict=True)
        wanted = ((self.kv_groups, groups), (self.mlp, neurons))
        inner = [
            _refitted(rng, units, _levels_of(units, ladder), total, ladder)
            for units, (ladder, total) in zip(of_layers, wanted, strict=True)
        ]
        return Candidate(layers, width, head_dim, *inner)

    def _shared_anew(self, rng: random.Random, parent: Candidate) -> Candidate:
        """Move groups or neurons from some layers to others."""
        groups = self.kv_groups.top > 0 and rng.random() < 0.3
        ladder, units = (self.kv_groups, parent.kv_groups) if groups else (self.mlp, parent.mlp)
        levels = _levels_of(units, ladder)
        total = sum(levels)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(levels))
            reach = max(1, ladder.num_levels // 4)
            moved = levels[place] + rng.choice((-1, 1)) * rng.randint(1, reach)
            levels[place] = max(0, min(ladder.top, moved))
        shared = _refitted(rng, units, levels, total, ladder)
        return parent._replace(kv_groups=shared) if groups else parent._replace(mlp=shared)

    def _exchanged_units(self, rng: random.Random, parent: Candidate) -> Candidate:
        """Exchange a few units of one axis, in layer-wise spaces of a few layers."""
        totals, noise = self.totals, self.unit_noise
        smallest = {
            "layers": parent.layers.size,
            "embed": parent.embed.size,
            "kv_groups": min(of_layer.size for of_layer in parent.kv_groups),
            "mlp": min(of_layer.size for of_layer in parent.mlp),
        }
        axis = rng.choice([name for name in smallest if smallest[name] < totals[name]] or ["embed"])
        if axis == "embed":
            count = rng.randint(1, MAX_EXCHANGES)
            return parent._replace(embed=exchanged(rng, parent.embed, totals[axis], count, noise))
        if axis == "layers":
            changed = exchanged(rng, parent.layers, totals[axis], rng.randint(1, 2), noise)
            return self._with_layers(parent, changed)
        layers = list(getattr(parent, axis))
        for _ in range(rng.randint(1, max(1, len(layers) // 4))):
            place, count = rng.randrange(len(layers)), rng.randint(1, MAX_EXCHANGES)
            layers[place] = exchanged(rng, layers[place], totals[axis], count, noise)
        change: dict[str, Any] = {axis: tuple(layers)}
        return parent._replace(**change)

    def _with_layers(self, parent: Candidate, layers: Units) -> Candidate:
        """The parent with some layers exchanged; each new one takes the units of one that left."""
        if self.uniform:
            return parent._replace(layers=layers)
        inner = dict(zip(parent.layers.ranks(), range(parent.layers.size), strict=True))
        left = iter(sorted(inner.keys() - set(layers.ranks())))
        places = [inner[rank if rank in inner else next(left)] for rank in layers.ranks()]
        return parent._replace(
            layers=layers,
            kv_groups=tuple(parent.kv_groups[place] for place in places),
            mlp=tuple(parent.mlp[place] for place in places),
        )

    def _with_exchanges(
        self, rng: random.Random, units: Units, total: int, noise: float, most: int
    ) -> Units:
        """A fresh set that strays from the axis order, further the more noise."""
        if not noise:
            return units
        count = int(noise * min(units.size, total - units.size, most) + rng.random())
        return exchanged(rng, units, total, count, self.unit_noise) if count else units


def _shape(candidate: Candidate) -> list[int]:
    """Width, depth and head size, the columns of a cell."""
    return [candidate.embed.size, candidate.layers.size, candidate.head_dim]


def _levels_of(units: Sequence[Units], ladder: Ladder) -> list[int]:
    return [ladder.level(of_layer.size) for of_layer in units]


def _refitted(
    rng: random.Random, units: Sequence[Units], levels: list[int], total: int, ladder: Ladder
) -> tuple[Units, ...]:
    """Layers resized to levels that are first raised or lowered until they sum to a total."""
    sizes = [ladder.size(level) for level in filled(rng, levels, total, ladder.top)]
    return tuple(resized(of_layer, size) for of_layer, size in zip(units, sizes, strict=True))
