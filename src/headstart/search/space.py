"""The search spaces: which candidates there are, and how to sample, mutate and cross them.

A candidate is a set of *ranks* on every axis. The axis order (`Orders`) turns ranks into the
teacher's own indices, layer by layer, so "the first k" may mean the teacher's first or its most
important. In a coarse space a candidate keeps the first ranks; in a fine space any of them.

Every shape of a uniform grid that lies in the bin is listed up front, so that each operator lands
in the bin by construction.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from headstart.subnet.count import parameters
from headstart.subnet.rules import layouts_of, sizes_of
from headstart.subnet.spec import (
    Indices,
    SubnetSpec,
    format_indices,
    parse_indices,
    stock_constraints,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_GRID_SHAPES = 10_000_000
SEARCHED_AXES = ("layers", "embed", "kv_groups", "mlp")


@dataclass(frozen=True)
class Bin:
    """A closed range of parameter counts.

    >>> Bin.around(400_000_000, 0.05)
    Bin(low=380000000, high=420000000)
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(
                f"the bin {self.low:,} to {self.high:,} is empty; low must be above 0 and at most "
                "high"
            )

    @staticmethod
    def around(reference: int, tolerance: float) -> Bin:
        """The bin from `reference * (1 - tolerance)` to `reference * (1 + tolerance)`."""
        if not 0 <= tolerance < 1:
            raise ValueError(f"the bin's tolerance is {tolerance}; it must be in [0, 1)")
        return Bin(round(reference * (1 - tolerance)), round(reference * (1 + tolerance)))


@dataclass(frozen=True)
class BinSettings:
    """A parameter bin in a recipe: either `low` and `high`, or `around` and `tolerance`.

    Attributes:
        low: smallest count, such as 385M.
        high: largest count, such as 426M.
        around: a count such as 410M, or a model folder or hub id whose parameters are counted.
        tolerance: half the bin's width as a fraction of `around`.
    """

    low: int | str = 0
    high: int | str = 0
    around: int | str = 0
    tolerance: float = 0.05

    def resolve(self) -> Bin:
        """The bin in numbers.

        Raises:
            ValueError: neither or both forms are given, or a count cannot be read.
        """
        if bool(self.around) == bool(self.low or self.high):
            raise ValueError(
                "search.bin needs either low and high (such as 385M and 426M) or around (such as "
                "410M, or a model to count) with tolerance"
            )
        if not self.around:
            return Bin(parse_count(self.low), parse_count(self.high))
        if COUNT_PATTERN.fullmatch(str(self.around)):
            return Bin.around(parse_count(self.around), self.tolerance)
        from transformers import AutoConfig

        try:
            reference = AutoConfig.from_pretrained(self.around)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"search.bin.around {self.around!r} is neither a count such as 410M nor a model "
                "folder or hub id"
            ) from error
        return Bin.around(parameters(layouts_of(reference), sizes_of(reference)), self.tolerance)


COUNT_PATTERN = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?)([KMB]?)", re.IGNORECASE)


def parse_count(text: int | str) -> int:
    """Read a count with an optional K, M or B.

    >>> parse_count("1.5M")
    1500000
    """
    found = COUNT_PATTERN.fullmatch(str(text))
    if not found:
        raise ValueError(f"{text!r} is not a count; write a number, or one with K, M or B")
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[found[2].upper()]
    return round(float(found[1]) * scale)


@dataclass(frozen=True)
class GridSettings:
    """Smallest size and step of each searched axis; 0 chooses from the teacher's shape.

    A step of 0 is 1 for depth and KV groups, a multiple of 8 that the query heads divide for the
    residual width, and a 24th of the MLP rounded to 8. A minimum of 0 is one step.
    """

    layers_min: int = 0
    layers_step: int = 0
    embed_min: int = 0
    embed_step: int = 0
    kv_groups_min: int = 0
    kv_groups_step: int = 0
    mlp_min: int = 0
    mlp_step: int = 0


@dataclass(frozen=True)
class Orders:
    """The order in which each axis of the teacher is read: rank -> the teacher's index.

    Attributes:
        layers: one order of the layers.
        embed: one order of the residual channels.
        kv_groups: for each teacher layer, an order of its KV groups.
        mlp: for each teacher layer, an order of its neurons.
    """

    layers: Indices
    embed: Indices
    kv_groups: tuple[Indices, ...]
    mlp: tuple[Indices, ...]

    @staticmethod
    def of_teacher(config: PreTrainedConfig) -> Orders:
        """The teacher's own order."""
        whole = SubnetSpec.identity(sizes_of(config))
        return Orders(whole.layers, whole.embed, whole.kv_groups, whole.mlp)


@dataclass(frozen=True)
class Candidate:
    """Kept ranks on every searched axis, ascending."""

    layers: Indices
    embed: Indices
    kv_groups: Indices
    mlp: Indices

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: len(getattr(self, axis)) for axis in SEARCHED_AXES}

    def spec(self, orders: Orders) -> SubnetSpec:
        """The sub-network in the teacher's own numbering."""
        layers = _pick(orders.layers, self.layers)
        return SubnetSpec(
            layers=layers,
            embed=_pick(orders.embed, self.embed),
            kv_groups=tuple(_pick(orders.kv_groups[layer], self.kv_groups) for layer in layers),
            mlp=tuple(_pick(orders.mlp[layer], self.mlp) for layer in layers),
        )

    def to_json(self) -> dict[str, str]:
        return {axis: format_indices(getattr(self, axis)) for axis in SEARCHED_AXES}

    @staticmethod
    def from_json(value: dict[str, str]) -> Candidate:
        return Candidate(*(parse_indices(value[axis]) for axis in SEARCHED_AXES))


def _pick(order: Indices, ranks: Indices) -> Indices:
    return tuple(sorted(order[rank] for rank in ranks))


def grid_values(config: PreTrainedConfig, grid: GridSettings) -> dict[str, list[int]]:
    """The sizes that each searched axis may take, ascending; the teacher's size is the last."""
    sizes = sizes_of(config)
    heads = sizes["kv_groups"] * sizes["q_per_kv"]
    embed_step = math.lcm(8, heads) if sizes["embed"] % math.lcm(8, heads) == 0 else 1
    mlp_step = max(8, sizes["mlp"] // 24 // 8 * 8)
    defaults = {"layers": 1, "embed": embed_step, "kv_groups": 1, "mlp": mlp_step}
    values = {}
    for axis in SEARCHED_AXES:
        step = getattr(grid, f"{axis}_step") or min(defaults[axis], sizes[axis])
        low = getattr(grid, f"{axis}_min") or step
        if step < 0 or not 0 < low <= sizes[axis]:
            raise ValueError(
                f"search.grid has {axis}_min {low} and {axis}_step {step}, but the teacher's "
                f"{axis} is {sizes[axis]}; choose 1 <= {axis}_min <= {sizes[axis]} and a positive "
                "step"
            )
        values[axis] = sorted({*range(low, sizes[axis] + 1, step), sizes[axis]})
    return values


def shapes_in_bin(
    config: PreTrainedConfig, grid: GridSettings, bin: Bin
) -> Int[np.ndarray, "shapes 4"]:
    """Every legal uniform shape of the grid whose parameter count lies in the bin.

    Returns:
        One row a shape: layers, embed, kv_groups, mlp.

    Raises:
        ValueError: there is none; the message names the range that can be reached.
    """
    values = grid_values(config, grid)
    num_shapes = math.prod(len(sizes) for sizes in values.values())
    if num_shapes > MAX_GRID_SHAPES:
        raise ValueError(
            f"search.grid has {num_shapes:,} shapes, more than {MAX_GRID_SHAPES:,}; take larger "
            "steps"
        )
    mesh = np.meshgrid(*(np.asarray(values[axis]) for axis in SEARCHED_AXES), indexing="ij")
    shapes = {axis: column.ravel() for axis, column in zip(SEARCHED_AXES, mesh, strict=True)}
    sizes: dict[str, Any] = {**sizes_of(config), **shapes}
    legal = np.ones(len(shapes["layers"]), dtype=bool)
    for holds, _ in stock_constraints(config, sizes):
        legal &= holds
    counts = parameters(layouts_of(config), sizes)
    inside = legal & (counts >= bin.low) & (counts <= bin.high)
    if not inside.any():
        reachable = counts[legal]
        below, above = reachable[reachable < bin.low], reachable[reachable > bin.high]
        nearest = [f"{f(part):,}" for f, part in ((np.max, below), (np.min, above)) if part.size]
        raise ValueError(
            f"no sub-network has between {bin.low:,} and {bin.high:,} parameters; this space "
            f"reaches {reachable.min():,} to {reachable.max():,}, and the nearest to the bin are "
            f"{' and '.join(nearest)}: move or widen search.bin, or make search.grid finer"
        )
    return np.stack([shapes[axis][inside] for axis in SEARCHED_AXES], axis=1)


@dataclass(frozen=True)
class Space:
    """A search space inside one bin.

    Attributes:
        shapes: the shapes in the bin, from `shapes_in_bin`.
        totals: the teacher's size of each searched axis.
        fine: whether candidates choose which units to keep as well as how many.
        unit_noise: fine spaces only: how far from the axis order a fresh candidate may stray, as
            a fraction of the axis; 0 keeps to the order, 1 is nearly random.
    """

    shapes: Int[np.ndarray, "shapes 4"]
    totals: Indices
    fine: bool
    unit_noise: float = 0.5

    def sample(self, rng: random.Random) -> Candidate:
        """A random candidate; widths are drawn first, then depths, so that neither clumps."""
        rows = self.shapes
        for column in (1, 0):
            rows = rows[rows[:, column] == rng.choice(np.unique(rows[:, column]).tolist())]
        shape = rows[rng.randrange(len(rows))].tolist()
        noise = rng.uniform(0, self.unit_noise)
        return Candidate(
            *(
                self._units(rng, total, size, frozenset(), noise)
                for total, size in zip(self.totals, shape, strict=True)
            )
        )

    def mutate(self, rng: random.Random, parent: Candidate) -> Candidate:
        """Move one axis a little, and the others as little as the bin asks.

        In a fine space half of the mutations keep the shape and exchange units instead.
        """
        shape = list(parent.sizes.values())
        exchange = self.fine and rng.random() < 0.5
        if not exchange:
            column = rng.choice(
                [c for c in range(4) if len(np.unique(self.shapes[:, c])) > 1] or [0]
            )
            values = np.unique(self.shapes[:, column]).tolist()
            here = values.index(shape[column])
            step = rng.choice([-2, -1, 1, 2])
            target = shape.copy()
            target[column] = values[max(0, min(len(values) - 1, here + step))]
            shape = self._nearest(target, fixed_column=column)
        axis = rng.choice([c for c in range(4) if shape[c] < self.totals[c]] or [0])
        return Candidate(
            *(
                self._units(
                    rng,
                    total,
                    size,
                    frozenset(_thin(rng, units, 0.1) if exchange and column == axis else units),
                )
                for column, (total, size, units) in enumerate(
                    zip(self.totals, shape, _ranks(parent), strict=True)
                )
            )
        )

    def cross(self, rng: random.Random, mother: Candidate, father: Candidate) -> Candidate:
        """Take each axis' size from either parent, and the units that both parents keep."""
        pairs = list(zip(mother.sizes.values(), father.sizes.values(), strict=True))
        shape = self._nearest([rng.choice(pair) for pair in pairs])
        return Candidate(
            *(
                self._units(rng, total, size, frozenset(ours) & frozenset(theirs))
                for total, size, ours, theirs in zip(
                    self.totals, shape, _ranks(mother), _ranks(father), strict=True
                )
            )
        )

    def _nearest(self, target: list[int], fixed_column: int | None = None) -> list[int]:
        """The shape in the bin that is nearest to a target, in fractions of each axis."""
        rows = self.shapes
        if fixed_column is not None:
            rows = rows[rows[:, fixed_column] == target[fixed_column]]
        distance = (np.abs(rows - np.asarray(target)) / np.asarray(self.totals)).sum(axis=1)
        nearest: list[int] = rows[int(distance.argmin())].tolist()
        return nearest

    def _units(
        self,
        rng: random.Random,
        total: int,
        size: int,
        preferred: frozenset[int],
        noise: float = 0.1,
    ) -> Indices:
        """Keep `size` of `total` ranks: the preferred first, then by rank with some noise."""
        if not self.fine or size == total:
            return tuple(range(size))
        cost = [
            rank / total + noise * rng.gauss(0, 1) - (2 if rank in preferred else 0)
            for rank in range(total)
        ]
        return tuple(sorted(sorted(range(total), key=cost.__getitem__)[:size]))


def _ranks(candidate: Candidate) -> list[Indices]:
    return [getattr(candidate, axis) for axis in SEARCHED_AXES]


def _thin(rng: random.Random, units: Indices, fraction: float) -> list[int]:
    """Forget a fraction of the units, at least one."""
    return rng.sample(units, len(units) - max(1, round(fraction * len(units))))
