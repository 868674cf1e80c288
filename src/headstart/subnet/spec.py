"""What a sub-network is: the indices that it keeps of every axis of its teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from headstart.subnet.axes import Sizes, dimension_size, parse_layout
from headstart.subnet.rotary import kept_pairs, student_rope
from headstart.subnet.rules import family_of, is_layerwise, layerwise_entries, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Indices = tuple[int, ...]


def format_indices(indices: Iterable[int]) -> str:
    """Write ascending indices as ranges.

    >>> format_indices([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_indices(text: str) -> Indices:
    """Read what `format_indices` writes.

    >>> parse_indices("0-2,5")
    (0, 1, 2, 5)
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"{text!r} is not a list of indices such as '0-2,5'")
    indices: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"{text!r} holds the range {run}, which runs backwards")
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


@dataclass(frozen=True)
class SubnetSpec:
    """The kept indices of every axis, each in ascending order, in the teacher's own numbering.

    Attributes:
        layers: kept layers.
        embed: kept channels of the residual stream, the same in every layer.
        kv_groups: for each kept layer, its kept key/value groups with all their query heads.
        mlp: for each kept layer, its kept MLP neurons.
        head_dim: kept channels of every head, the same in all; None keeps heads whole.
    """

    layers: Indices
    embed: Indices
    kv_groups: tuple[Indices, ...]
    mlp: tuple[Indices, ...]
    head_dim: Indices | None = None

    @staticmethod
    def identity(sizes: Sizes) -> SubnetSpec:
        """The spec that keeps everything of a teacher with these sizes."""
        layers = tuple(range(sizes["layers"]))
        return SubnetSpec(
            layers,
            tuple(range(sizes["embed"])),
            tuple(tuple(range(sizes["kv_groups"])) for _ in layers),
            tuple(tuple(range(sizes["mlp"])) for _ in layers),
        )

    def kept_in_layer(self, position: int) -> dict[str, Indices]:
        """Axis -> kept indices, for the student's layer at this position."""
        kept = {
            "embed": self.embed,
            "kv_groups": self.kv_groups[position],
            "mlp": self.mlp[position],
        }
        return kept if self.head_dim is None else {**kept, "head_dim": self.head_dim}

    def validate(self, teacher_sizes: Sizes) -> None:
        """Check this spec against the teacher's sizes.

        Raises:
            ValueError: an axis is empty, unordered, repeated or beyond the teacher's size.
        """
        for axis in ("kv_groups", "mlp"):
            if len(getattr(self, axis)) != len(self.layers):
                raise ValueError(
                    f"the spec keeps {len(self.layers)} layers but lists {axis} for "
                    f"{len(getattr(self, axis))}; list one index set for each kept layer"
                )
        checks = [("layers", self.layers), ("embed", self.embed)]
        checks += [("kv_groups", units) for units in self.kv_groups]
        checks += [("mlp", units) for units in self.mlp]
        if self.head_dim is not None:
            checks.append(("head_dim", self.head_dim))
        for axis, units in checks:
            if not units:
                raise ValueError(f"the spec keeps nothing of axis {axis}; keep at least one unit")
            if any(b <= a for a, b in pairwise(units)):
                raise ValueError(f"the spec's {axis} indices are not in ascending order")
            outermost = units[0] if units[0] < 0 else units[-1]
            if not 0 <= outermost < teacher_sizes[axis]:
                raise ValueError(
                    f"the spec keeps {axis} index {outermost} but the teacher has only "
                    f"{teacher_sizes[axis]}; indices go from 0 to {teacher_sizes[axis] - 1}"
                )

    def sizes(self, teacher_sizes: Sizes) -> dict[str, Any]:
        """The student's size along every axis; a tuple, one for each layer, where layers differ."""
        sizes = dict(teacher_sizes) | {"layers": len(self.layers), "embed": len(self.embed)}
        for axis in ("kv_groups", "mlp"):
            lengths = tuple(len(units) for units in getattr(self, axis))
            sizes[axis] = lengths[0] if len(set(lengths)) == 1 else lengths
        if self.head_dim is not None:
            sizes["head_dim"] = len(self.head_dim)
        return sizes

    def to_json(self) -> dict[str, Any]:
        """A JSON object with index sets written as ranges."""
        return {
            "layers": format_indices(self.layers),
            "embed": format_indices(self.embed),
            "kv_groups": [format_indices(units) for units in self.kv_groups],
            "mlp": [format_indices(units) for units in self.mlp],
            "head_dim": None if self.head_dim is None else format_indices(self.head_dim),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> SubnetSpec:
        """Read what `to_json` writes.

        Raises:
            ValueError: a key is missing or an index set is malformed.
        """
        missing = {"layers", "embed", "kv_groups", "mlp"} - set(value)
        if missing:
            raise ValueError(
                f"the spec lacks {', '.join(sorted(missing))}: {json.dumps(value)[:80]}"
            )
        return SubnetSpec(
            parse_indices(value["layers"]),
            parse_indices(value["embed"]),
            tuple(parse_indices(units) for units in value["kv_groups"]),
            tuple(parse_indices(units) for units in value["mlp"]),
            parse_indices(value["head_dim"]) if value.get("head_dim") else None,
        )


def stock_constraints(config: PreTrainedConfig, sizes: Sizes) -> Iterator[tuple[Any, str]]:
    """What the family's stock code demands of a student's sizes.

    Args:
        config: a config of the family.
        sizes: axis -> size, or integer arrays for many shapes at once.

    Yields:
        (whether it holds, elementwise for arrays; the demand in words).
    """
    family = family_of(config)
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


def stock_obstacle(config: PreTrainedConfig, sizes: Sizes) -> str:
    """Why no stock checkpoint of the family can have these sizes, in words; empty if one can."""
    for axis in ("kv_groups", "mlp"):
        if isinstance(sizes[axis], tuple):
            return (
                f"layers have {min(sizes[axis])} to {max(sizes[axis])} {axis}, and a stock "
                f"{family_of(config).name} checkpoint has one number for all"
            )
    return next((demand for holds, demand in stock_constraints(config, sizes) if not holds), "")


def student_config(
    config: PreTrainedConfig, spec: SubnetSpec, with_rope: bool = True
) -> PreTrainedConfig:
    """The config of the student that `spec` cuts out of a teacher with this config.

    It is a stock one where the family's own code can express the shape, else a layer-wise one of
    `headstart.subnet.modeling`.

    Args:
        config: the teacher's.
        spec: what is kept.
        with_rope: False leaves the teacher's rotary positions, for a caller who sets the
            frequencies of narrower heads itself.

    Raises:
        ValueError: the spec does not fit the teacher, or no rotary parameters give its frequencies.
    """
    check_spec(config, spec)
    sizes = spec.sizes(sizes_of(config))
    entries = config.to_dict()
    if entries.get("layer_types"):
        entries["layer_types"] = [entries["layer_types"][layer] for layer in spec.layers]
    if spec.head_dim is not None and with_rope:
        entries["rope_parameters"] = student_rope(config, spec.head_dim)
    if not stock_obstacle(config, sizes):
        return type(config).from_dict(entries | config_values(family_of(config).config, sizes))

    from headstart.subnet.modeling import layerwise_config

    pairs = layerwise_entries(family_of(config).config)
    of_layers = [config_values(pairs, sizes_in_layer(sizes, i)) for i in range(sizes["layers"])]
    # The largest stands for all where layers differ; nothing of transformers reads it.
    shared = {key: max(one[key] for one in of_layers) for key in of_layers[0]}
    own = ({key: value for key, value in one.items() if value != shared[key]} for one in of_layers)
    if differing := {layer: one for layer, one in enumerate(own) if one}:
        entries["per_layer_config"] = differing
    return layerwise_config(family_of(config).name, entries | shared)


def config_values(pairs: Iterable[tuple[str, str]], sizes: Sizes) -> dict[str, Any]:
    """The values that a family's (config key, layout) pairs have for these sizes."""
    return {key: dimension_size(parse_layout(layout)[0], sizes) for key, layout in pairs}


def sizes_in_layer(sizes: Sizes, layer: int) -> dict[str, Any]:
    """The sizes of one layer, where a tuple gives one for each."""
    return {axis: size[layer] if isinstance(size, tuple) else size for axis, size in sizes.items()}


def check_spec(config: PreTrainedConfig, spec: SubnetSpec) -> None:
    """Check that a spec can be cut out of a teacher with this config.

    Raises:
        ValueError: an axis is malformed, head channels are parted from their rotary partners, or
            the teacher is a layer-wise student itself.
    """
    if is_layerwise(config):
        raise ValueError(
            "the teacher is a layer-wise student, and sub-networks are cut out of stock models "
            "only; choose the model that it was cut from"
        )
    spec.validate(sizes_of(config))
    if spec.head_dim is not None:
        kept_pairs(config, spec.head_dim)
