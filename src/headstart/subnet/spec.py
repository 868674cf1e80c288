"""What a sub-network is: the indices that it keeps of every axis of its teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from headstart.subnet.axes import Sizes, dimension_size, parse_layout
from headstart.subnet.rules import family_of, sizes_of

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
    """

    layers: Indices
    embed: Indices
    kv_groups: tuple[Indices, ...]
    mlp: tuple[Indices, ...]

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
        return {
            "embed": self.embed,
            "kv_groups": self.kv_groups[position],
            "mlp": self.mlp[position],
        }

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

    def sizes(self, teacher_sizes: Sizes) -> dict[str, int]:
        """The student's size along every axis.

        Raises:
            ValueError: sizes differ between layers.
        """
        sizes = dict(teacher_sizes) | {"layers": len(self.layers), "embed": len(self.embed)}
        for axis in ("kv_groups", "mlp"):
            lengths = {len(units) for units in getattr(self, axis)}
            if len(lengths) > 1:
                raise ValueError(
                    f"the spec keeps {min(lengths)} to {max(lengths)} {axis} in different layers; "
                    "a stock checkpoint has one size for all layers"
                )
            sizes[axis] = lengths.pop()
        return sizes

    def to_json(self) -> dict[str, Any]:
        """A JSON object with index sets written as ranges."""
        return {
            "layers": format_indices(self.layers),
            "embed": format_indices(self.embed),
            "kv_groups": [format_indices(units) for units in self.kv_groups],
            "mlp": [format_indices(units) for units in self.mlp],
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


def student_config(config: PreTrainedConfig, spec: SubnetSpec) -> PreTrainedConfig:
    """The stock config of the student that `spec` cuts out of a teacher with this config.

    Raises:
        ValueError: the spec does not fit the teacher, or the family's stock code cannot express it.
    """
    teacher_sizes = sizes_of(config)
    spec.validate(teacher_sizes)
    sizes = spec.sizes(teacher_sizes)
    for holds, demand in stock_constraints(config, sizes):
        if not holds:
            raise ValueError(f"{demand}; choose sizes that agree")
    entries = {
        key: dimension_size(parse_layout(layout)[0], sizes)
        for key, layout in family_of(config).config
    }
    return type(config).from_dict({**config.to_dict(), **entries})
