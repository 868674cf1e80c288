"""Axis names and the layout-string grammar.

A layout says what each dimension of a tensor is made of. Dimensions are separated by spaces; a
dimension fused from several parts is written in parentheses, slowest part first; a part is an axis
name or a constant:

    "embed mlp"                            two dimensions
    "(kv_groups q_per_kv head_dim) embed"  rows by group, then head of the group, then channel
    "(kv_groups 3 head_dim) embed"         GPT-NeoX's fused query, key and value
    "(2 mlp) embed"                        Phi-3's gate rows, then its up rows

Tensors of different layouts that are stacked along their first dimension stand with a plus:

    "(kv_groups q_per_kv head_dim) embed + (kv_groups head_dim) embed"

The same grammar serves weights, the inputs of linear layers and the entries of a model config, so
that counting, slicing, importance and configs all read one table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

GLOBAL_AXES = ("vocab", "layers", "embed")
PER_LAYER_AXES = ("kv_groups", "q_per_kv", "head_dim", "mlp")
AXES = GLOBAL_AXES + PER_LAYER_AXES

Dimension: TypeAlias = "tuple[str | int, ...]"
Sizes: TypeAlias = "Mapping[str, Any]"
"""Axis name -> size: an int; a tuple, one for each layer, where layers differ; or an integer array
when many shapes are counted at once."""


@cache
def stacked(layout: str) -> tuple[str, ...]:
    """The layouts of what a tensor is stacked of, along its first dimension; most often just one.

    >>> stacked("mlp embed + (2 mlp) embed")
    ('mlp embed', '(2 mlp) embed')
    """
    return tuple(layout.split(" + "))


@cache
def parse_layout(layout: str) -> tuple[Dimension, ...]:
    """Split a layout string that stacks nothing into its dimensions and their parts.

    >>> parse_layout("(kv_groups 3 head_dim) embed")
    (('kv_groups', 3, 'head_dim'), ('embed',))
    """
    groups = re.findall(r"\(([^()]*)\)|([^\s()]+)", layout)
    dimensions = tuple(
        tuple(int(part) if part.isdigit() else part for part in (fused or single).split())
        for fused, single in groups
    )
    for part in (part for dimension in dimensions for part in dimension):
        assert isinstance(part, int) or part in AXES, f"unknown axis {part!r} in {layout!r}"
    return dimensions


def dimensions_of(layout: str) -> tuple[Dimension, ...]:
    """The dimensions of a tensor; if it is stacked, its first is that of its first part."""
    return parse_layout(stacked(layout)[0])


def axes_of(layout: str) -> frozenset[str]:
    """The axes that a layout names.

    >>> sorted(axes_of("(kv_groups 3 head_dim) embed"))
    ['embed', 'head_dim', 'kv_groups']
    """
    dimensions = (dimension for block in stacked(layout) for dimension in parse_layout(block))
    parts = (part for dimension in dimensions for part in dimension)
    return frozenset(part for part in parts if isinstance(part, str))


def dimension_size(dimension: Dimension, sizes: Sizes) -> Any:
    """The product of a dimension's parts."""
    return math.prod(part if isinstance(part, int) else sizes[part] for part in dimension)


def shape_of(layout: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a tensor with this layout.

    >>> shape_of("(kv_groups 3 head_dim) embed", {"kv_groups": 2, "head_dim": 4, "embed": 8})
    (24, 8)
    """
    shapes = [
        [dimension_size(dimension, sizes) for dimension in parse_layout(block)]
        for block in stacked(layout)
    ]
    return (sum(rows for rows, *_ in shapes), *shapes[0][1:])


def unstack(tensor: Tensor, layout: str, sizes: Sizes) -> list[tuple[Tensor, str]]:
    """The parts that a tensor is stacked of, as views, each with its layout."""
    blocks = stacked(layout)
    rows = [shape_of(block, sizes)[0] for block in blocks]
    return list(zip(tensor.split(rows), blocks, strict=True))  # type: ignore[no-untyped-call]


def slice_tensor(
    tensor: Tensor, layout: str, sizes: Sizes, kept: Mapping[str, Sequence[int]]
) -> Tensor:
    """Keep the given indices of every axis that a tensor has.

    Args:
        tensor: any tensor whose shape is `shape_of(layout, sizes)`.
        sizes: the tensor's own size along each axis of the layout.
        kept: axis -> indices to keep, in order; an axis that is absent is kept whole.

    Returns:
        The sub-tensor, with fused dimensions fused again. Where kept units lie side by side in
        ascending order it is a view of the tensor, and the tensor itself when nothing is removed.
    """
    assert tuple(tensor.shape) == shape_of(layout, sizes), (tensor.shape, layout, sizes)
    if len(stacked(layout)) > 1:
        parts = unstack(tensor, layout, sizes)
        return torch.cat([slice_tensor(part, block, sizes, kept) for part, block in parts])
    for position, dimension in enumerate(parse_layout(layout)):
        units = _kept_units(dimension, sizes, kept)
        if isinstance(units, range):
            tensor = tensor.narrow(position, units.start, len(units))
        elif units is not None:
            tensor = tensor.index_select(position, units.to(tensor.device))
    return tensor


def place_tensor(tensor: Tensor, layout: str, sizes: Sizes, larger: Sizes) -> Tensor:
    """Give every axis of a tensor a larger size, with zeros after its own units.

    Args:
        tensor: any tensor whose shape is `shape_of(layout, sizes)`.
        sizes: the tensor's own size along each axis of the layout.
        larger: the sizes to reach.

    Returns:
        A tensor of which `slice_tensor` with the first units of each axis is the given one.
    """
    assert tuple(tensor.shape) == shape_of(layout, sizes), (tensor.shape, layout, sizes)
    kept = {axis: range(sizes[axis]) for axis in axes_of(layout)}
    placed = tensor.new_zeros(shape_of(layout, larger))
    placed[torch.meshgrid(*kept_indices(layout, larger, kept), indexing="ij")] = tensor
    return placed


def kept_indices(
    layout: str, sizes: Sizes, kept: Mapping[str, Sequence[int]]
) -> list[Int[Tensor, " units"]]:
    """For each dimension of a tensor, the indices of what `slice_tensor` would keep, in order."""
    blocks = []
    for block in stacked(layout):
        units = (_kept_units(dimension, sizes, kept) for dimension in parse_layout(block))
        whole = map(range, shape_of(block, sizes))
        some = (every if kept is None else kept for kept, every in zip(units, whole, strict=True))
        blocks.append([torch.as_tensor(indices) for indices in some])
    heights = [shape_of(block, sizes)[0] for block in stacked(layout)]
    rows = [block[0] + sum(heights[:place]) for place, block in enumerate(blocks)]
    return [torch.cat(rows), *blocks[0][1:]]


def _kept_units(
    dimension: Dimension, sizes: Sizes, kept: Mapping[str, Sequence[int]]
) -> Int[Tensor, " units"] | range | None:
    """Flat indices of the kept units in one (maybe fused) dimension; None keeps all of it."""
    whole = [range(part if isinstance(part, int) else sizes[part]) for part in dimension]
    parts = [
        _unbroken(kept[part]) if isinstance(part, str) and part in kept else every
        for part, every in zip(dimension, whole, strict=True)
    ]
    if parts == whole:
        return None
    outermost = parts[0]
    if isinstance(outermost, range) and parts[1:] == whole[1:]:
        inner = math.prod(map(len, whole[1:]))
        return range(outermost.start * inner, outermost.stop * inner)
    index = torch.zeros(1, dtype=torch.long)
    for units, every in zip(parts, whole, strict=True):
        index = (index[:, None] * len(every) + torch.as_tensor(units)).flatten()
    return index


def _unbroken(units: Sequence[int]) -> Sequence[int]:
    """Units as a range if they are one."""
    run = range(units[0], units[0] + len(units))
    return run if tuple(units) == tuple(run) else tuple(units)
