"""Which shapes a family's code can express, and what a config says of a shape.

A family's table lists (config key, layout) pairs. They turn the size of each axis into the entries
of a config; where one key stands for two products, these must agree in a stock checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from headstart.model.axes import Sizes, dimension_size, parse_layout
from headstart.model.families import Family

ConfigPairs = tuple[tuple[str, str], ...]


def layerwise_pairs(pairs: ConfigPairs) -> ConfigPairs:
    """A stock table's pairs as a layer-wise config has them: each key once, and `head_dim`.

    >>> layerwise_pairs((("hidden_size", "embed"), ("hidden_size", "(kv_groups head_dim)")))
    (('hidden_size', 'embed'), ('head_dim', 'head_dim'))
    """
    once: dict[str, str] = {}
    for key, layout in pairs:
        once.setdefault(key, layout)
    return tuple((once | {"head_dim": "head_dim"}).items())


def config_values(pairs: Iterable[tuple[str, str]], sizes: Sizes) -> dict[str, Any]:
    """The config entries that (config key, layout) pairs give for these sizes."""
    return {key: dimension_size(parse_layout(layout)[0], sizes) for key, layout in pairs}


def sizes_in_layer(sizes: Sizes, layer: int) -> dict[str, Any]:
    """The sizes of one layer, where a tuple gives one for each."""
    return {axis: size[layer] if isinstance(size, tuple) else size for axis, size in sizes.items()}


def attention_width(sizes: Sizes) -> Any:
    """Channels of all heads together; integer arrays give it for many shapes at once."""
    return sizes["kv_groups"] * sizes["q_per_kv"] * sizes["head_dim"]


def stock_constraints(family: Family, sizes: Sizes) -> Iterator[tuple[Any, str]]:
    """What the family's stock code demands of a student's sizes.

    Args:
        family: its table.
        sizes: axis -> size, or integer arrays for many shapes at once.

    Yields:
        (whether it holds, elementwise for arrays; the demand in words).
    """
    values: dict[str, tuple[Any, str]] = {}
    for key, layout in family.config:
        (dimension,) = parse_layout(layout)
        value = dimension_size(dimension, sizes)
        first, first_layout = values.setdefault(key, (value, layout))
        if first_layout != layout:
            demand = f"{first_layout} = {layout}, and {first} is not {value}"
            yield first == value, f"a stock {family.name} checkpoint needs {demand}"
    for divisor, dividend in family.divides:
        small, large = values[divisor][0], values[dividend][0]
        demand = f"{dividend} to be a multiple of {divisor}, and {large} is not one of {small}"
        yield large % small == 0, f"a stock {family.name} checkpoint needs {demand}"


def stock_obstacle(family: Family, sizes: Sizes) -> str:
    """Why no stock checkpoint of the family can have these sizes, in words; empty if one can."""
    for axis in ("kv_groups", "mlp"):
        if isinstance(sizes[axis], tuple):
            return (
                f"layers have {min(sizes[axis])} to {max(sizes[axis])} {axis}, and a stock "
                f"{family.name} checkpoint has one number for all"
            )
    return next((demand for holds, demand in stock_constraints(family, sizes) if not holds), "")
