"""Which shapes a search space has inside its bin, listed before the first candidate is drawn.

Every measure of size is affine in the groups and neurons that all layers keep together, once depth,
width and head size are fixed. So for each depth, width, head size and number of groups the numbers
of neurons that meet the bin are an interval, and the whole bin is a table of such rows, whether
layers are alike or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from headstart.model.architecture import Architecture
from headstart.model.rotary import head_channels, head_sizes, student_rope
from headstart.model.shapes import attention_width, stock_constraints
from headstart.searching.bins import Bin
from headstart.system.errors import UserError

MAX_ROWS = 10_000_000
"""Of a longer table only every so many rows in the bin are kept."""
PIECE_ROWS = 1_000_000
"""How many rows are looked at in one piece, which bounds the memory."""


LEAST_DEPTH = 6
"""One layer in so many is kept at least. Shallower students train to losses far above what a refit
promises (docs/benchmarks/shapes.md)."""


@dataclass(frozen=True)
class GridSettings:
    """Smallest size and step of each searched axis; 0 chooses from the teacher's shape.

    A step of 0 is 1 for depth and KV groups, a multiple of 8 that the query heads divide for the
    residual width, and for the MLP the largest multiple of 8 that divides it into 24 steps or more,
    or else the largest step that does. A minimum of 0 is one step, but for depth a sixth of the
    teacher's layers if that is more; for heads it keeps them whole, and any other value lets them
    shrink to that many channels.

    `square_attention` keeps only shapes whose heads together are as wide as the residual stream,
    as llama.cpp needs of Qwen2 and OLMo 2; uniform spaces alone have it.

    `layer_periods` keeps and removes layers by whole periods of their kinds, such as the six of
    Gemma 3, five of which see a window, as llama.cpp needs; coarse spaces alone have it.
    """

    layers_min: int = 0
    layers_step: int = 0
    embed_min: int = 0
    embed_step: int = 0
    kv_groups_min: int = 0
    kv_groups_step: int = 0
    mlp_min: int = 0
    mlp_step: int = 0
    head_dim_min: int = 0
    head_dim_step: int = 0
    square_attention: bool = False
    layer_periods: bool = False


@dataclass(frozen=True)
class Ladder:
    """Sizes at an even step: `low`, `low + step`, ..., `num_levels` of them."""

    low: int
    step: int
    num_levels: int

    def size(self, level: int) -> int:
        return self.low + self.step * level

    def level(self, size: int) -> int:
        return (size - self.low) // self.step

    @property
    def top(self) -> int:
        return self.num_levels - 1


def ladders_of(architecture: Architecture, grid: GridSettings) -> dict[str, Ladder]:
    """The sizes that depth, width, groups and neurons may take.

    Raises:
        UserError: a minimum or a step does not fit the teacher.
    """
    sizes = architecture.sizes
    heads = sizes["kv_groups"] * sizes["q_per_kv"]
    embed_step = math.lcm(8, heads) if sizes["embed"] % math.lcm(8, heads) == 0 else 1
    steps = [step for step in range(1, sizes["mlp"] // 24 + 1) if sizes["mlp"] % step == 0]
    mlp_step = max([step for step in steps if step % 8 == 0] or steps, default=1)
    period = architecture.layer_period if grid.layer_periods else 1
    defaults = {"layers": period, "embed": embed_step, "kv_groups": 1, "mlp": mlp_step}
    ladders = {}
    for axis, default in defaults.items():
        step = getattr(grid, f"{axis}_step") or default
        least = sizes[axis] // LEAST_DEPTH if axis == "layers" else 0
        low = getattr(grid, f"{axis}_min") or min(max(least // step, 1) * step, sizes[axis])
        _check_range(axis, low, step, sizes[axis])
        if axis == "layers" and (low % period or step % period):
            raise UserError(
                f"search.grid has layers_min {low} and layers_step {step}, and with layer_periods "
                f"both are multiples of {period}; mend them or leave them out"
            )
        ladders[axis] = Ladder(low, step, (sizes[axis] - low) // step + 1)
    return ladders


def head_values(architecture: Architecture, grid: GridSettings) -> list[int]:
    """The head sizes that may be taken; the teacher's alone unless the grid says otherwise.

    Raises:
        UserError: a minimum or a step does not fit the teacher, or its rotary positions do not let
            heads shrink.
    """
    rope, whole = architecture.config.rope_parameters, architecture.sizes["head_dim"]
    if not grid.head_dim_min:
        return [whole]
    step = grid.head_dim_step or 1
    _check_range("head_dim", grid.head_dim_min, step, whole)
    values = [
        size
        for size in head_sizes(rope, whole)
        if size >= grid.head_dim_min and (whole - size) % step == 0
    ]
    student_rope(rope, whole, head_channels(rope, whole, values[0]))  # refuses what cannot shrink
    return values


def _check_range(axis: str, low: int, step: int, total: int) -> None:
    if step < 0 or not 0 < low <= total:
        raise UserError(
            f"search.grid has {axis}_min {low} and {axis}_step {step}, but the teacher's {axis} is "
            f"{total}; choose 1 <= {axis}_min <= {total} and a positive step"
        )


@dataclass(frozen=True)
class Rows:
    """Every shape of a space that lies in the bin, sorted by embed, layers, head_dim and groups.

    Levels are those of a `Ladder`: of every layer where layers are alike, else the sum of the
    layers' levels.

    Attributes:
        embed: residual width.
        layers: depth.
        head_dim: head size.
        groups: level of the KV groups.
        first: the lowest level of neurons that meets the bin.
        last: the highest one.
        smallest: the least amount that the space reaches, whatever the bin.
        largest: the greatest.
    """

    embed: Int[np.ndarray, " rows"]
    layers: Int[np.ndarray, " rows"]
    head_dim: Int[np.ndarray, " rows"]
    groups: Int[np.ndarray, " rows"]
    first: Int[np.ndarray, " rows"]
    last: Int[np.ndarray, " rows"]
    smallest: int
    largest: int

    def num_shapes(self) -> int:
        """Shapes in the bin; layers that may differ count by their sums."""
        return int((self.last - self.first + 1).sum())


def rows_in_bin(architecture: Architecture, grid: GridSettings, bin: Bin, uniform: bool) -> Rows:
    """List the shapes of a space that lie in a bin.

    Args:
        uniform: whether all layers are alike; shapes are then those of a stock checkpoint.

    Raises:
        UserError: there is none; the message names the range that can be reached.
    """
    if grid.square_attention and not uniform:
        raise UserError(
            "search.grid.square_attention needs the same groups in all layers; choose a uniform "
            "search.space, or leave it out"
        )
    ladders, teacher = ladders_of(architecture, grid), architecture.sizes
    depths, widths = (
        [ladders[axis].size(level) for level in range(ladders[axis].num_levels)]
        for axis in ("layers", "embed")
    )
    mesh = np.meshgrid(widths, depths, head_values(architecture, grid), indexing="ij")
    embed, layers, head_dim = (axis.ravel().astype(np.int64) for axis in mesh)
    kv, mlp = ladders["kv_groups"], ladders["mlp"]
    copies = 1 if uniform else layers

    def amounts(num_groups: int, num_neurons: int) -> Any:
        shape = {"embed": embed, "layers": layers, "head_dim": head_dim}
        inner = {"kv_groups": num_groups, "mlp": num_neurons}
        return architecture.amount({**teacher, **shape, **inner}, bin.measure, bin.context_length)

    lowest = amounts(kv.low, mlp.low)
    per_group = (amounts(kv.low + kv.step, mlp.low) - lowest) // copies
    per_neuron = (amounts(kv.low, mlp.low + mlp.step) - lowest) // copies
    top_neurons = np.broadcast_to(mlp.top * copies, embed.shape)

    # One row for each cell of the mesh and each level of groups, a piece of the mesh at a time.
    rows_per_cell = np.broadcast_to(kv.top * copies + 1, embed.shape)
    rows_before = np.cumsum(rows_per_cell) - rows_per_cell
    pieces = np.split(np.arange(len(embed)), np.flatnonzero(np.diff(rows_before // PIECE_ROWS)) + 1)

    def legal_rows(piece: Any) -> tuple[Any, ...]:
        """The cell, groups, base amount, amount per neuron and most neurons of each row."""
        cell = np.repeat(piece, rows_per_cell[piece])
        groups = np.arange(len(cell)) - (rows_before[cell] - rows_before[piece[0]])
        legal = np.ones(len(cell), dtype=bool)
        if uniform:
            shape = {"embed": embed[cell], "layers": layers[cell], "head_dim": head_dim[cell]}
            sizes = {**teacher, **shape, "kv_groups": kv.low + kv.step * groups}
            for holds, _ in stock_constraints(architecture.family, sizes):
                legal &= holds
            if grid.square_attention:
                legal &= attention_width(sizes) == sizes["embed"]
        cell, groups = cell[legal], groups[legal]
        base = lowest[cell] + groups * per_group[cell]
        return cell, groups, base, per_neuron[cell], top_neurons[cell]

    stride = max(1, -(-int(rows_per_cell.sum()) // MAX_ROWS))
    kept, least, most = [], [], []
    for piece in pieces:
        cell, groups, base, slope, top = legal_rows(piece)
        if not len(cell):
            continue
        least.append(int(base.min()))
        most.append(int((base + top * slope).max()))
        first, last = _interval(bin, base, slope, top)
        inside = np.flatnonzero(first <= last)[::stride]
        cell, *levels = (column[inside] for column in (cell, groups, first, last))
        kept.append((embed[cell], layers[cell], head_dim[cell], *levels))
    if not least:
        raise UserError(
            f"no shape of search.grid is a legal {architecture.family.name} model; make its steps "
            "finer"
        )
    columns = [np.concatenate(column) for column in zip(*kept, strict=True)]
    smallest, largest = min(least), max(most)
    if not len(columns[0]):
        found = [_neighbours(bin, *legal_rows(piece)[2:]) for piece in pieces]
        below = max(amount for amount, _ in found)
        above = min((amount for _, amount in found if amount), default=0)
        nearest = " and ".join(f"{value:,}" for value in (below, above) if value)
        what = bin.measure.replace("_", " ")
        raise UserError(
            f"no sub-network has between {bin.low:,} and {bin.high:,} {what}; this space reaches "
            f"{smallest:,} to {largest:,}, and the nearest to the bin are {nearest}: move or widen "
            "search.bin, or make search.grid finer"
        )
    names = ("embed", "layers", "head_dim", "groups", "first", "last")
    by_name: dict[str, Any] = dict(zip(names, columns, strict=True))
    return Rows(**by_name, smallest=smallest, largest=largest)


def _interval(bin: Bin, base: Any, per_level: Any, top: Any) -> tuple[Any, Any]:
    """The levels from 0 to `top` at which `base + level * per_level` lies in the bin."""
    divisor = np.maximum(per_level, 1)
    first = np.maximum(-((base - bin.low) // divisor), 0)
    last = np.minimum((bin.high - base) // divisor, top)
    flat = per_level == 0  # neurons do not weigh in this measure
    inside = (bin.low <= base) & (base <= bin.high)
    return np.where(flat, 0, first), np.where(flat, np.where(inside, top, -1), last)


def _neighbours(bin: Bin, base: Any, per_level: Any, top: Any) -> tuple[int, int]:
    """The greatest amount below the bin and the least above it; 0 where there is none."""
    divisor = np.maximum(per_level, 1)
    below = base + np.minimum((bin.low - 1 - base) // divisor, top) * per_level
    above = base + np.maximum(-((base - bin.high - 1) // divisor), 0) * per_level
    below = below[(below < bin.low) & (below >= base)]
    above = above[(above > bin.high) & (above <= base + top * per_level)]
    return int(below.max(initial=0)), int(above.min()) if above.size else 0
