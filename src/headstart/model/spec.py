"""What a sub-network is: the indices that it keeps of every axis of its teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from headstart.model.axes import Sizes
from headstart.system.errors import UserError

Indices = tuple[int, ...]

SEARCH_COSTS = ("calibration_flops", "search_flops", "search_tokens", "search_seconds")
ORIGIN_KEYS = (
    *SEARCH_COSTS, "correction_flops", "loss", "parameters", "bin", "init", "scored_as",
    "teacher_hash",
)  # fmt: skip
"""Of `search.json`, what travels with a spec: what it cost, and what it was worth untrained."""


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
    number = r"\d{1,7}"  # more are of no teacher's axis, and would fill the memory
    run_of = rf"{number}(-{number})?"
    if not isinstance(text, str) or not re.fullmatch(rf"{run_of}(,{run_of})*", text):
        raise UserError(f"{text!r} is not a list of indices such as '0-2,5'")
    indices: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        if int(last or first) < int(first):
            raise UserError(f"{text!r} holds the range {run}, which runs backwards")
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
        origin: what is known of the search that found it, by the keys of `ORIGIN_KEYS`. Two specs
            that keep the same are equal all the same.
    """

    layers: Indices
    embed: Indices
    kv_groups: tuple[Indices, ...]
    mlp: tuple[Indices, ...]
    head_dim: Indices | None = None
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def identity(sizes: Sizes) -> SubnetSpec:
        """The spec that keeps everything of a teacher with these sizes."""
        layers, embed, kv_groups, mlp = (
            tuple(range(sizes[axis])) for axis in ("layers", "embed", "kv_groups", "mlp")
        )
        return SubnetSpec(layers, embed, (kv_groups,) * len(layers), (mlp,) * len(layers))

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
            UserError: an axis is empty, unordered, repeated or beyond the teacher's size.
        """
        checks = [("layers", self.layers), ("embed", self.embed)]
        for axis, of_layers in (("kv_groups", self.kv_groups), ("mlp", self.mlp)):
            if len(of_layers) != len(self.layers):
                raise UserError(
                    f"the spec keeps {len(self.layers)} layers but lists {axis} for "
                    f"{len(of_layers)}; list one index set for each kept layer"
                )
            checks += [(axis, units) for units in of_layers]
        if self.head_dim is not None:
            checks.append(("head_dim", self.head_dim))
        for axis, units in checks:
            if not units:
                raise UserError(f"the spec keeps nothing of axis {axis}; keep at least one unit")
            if any(b <= a for a, b in pairwise(units)):
                raise UserError(f"the spec's {axis} indices are not in ascending order")
            outermost = units[0] if units[0] < 0 else units[-1]
            if not 0 <= outermost < teacher_sizes[axis]:
                raise UserError(
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
            UserError: a key is missing or an index set is malformed.
        """
        missing = {"layers", "embed", "kv_groups", "mlp"} - set(value)
        if missing:
            found = json.dumps(value)[:80]
            raise UserError(f"the spec lacks {', '.join(sorted(missing))}: {found}")
        return SubnetSpec(
            parse_indices(value["layers"]),
            parse_indices(value["embed"]),
            tuple(parse_indices(units) for units in value["kv_groups"]),
            tuple(parse_indices(units) for units in value["mlp"]),
            parse_indices(value["head_dim"]) if value.get("head_dim") else None,
        )


def load_spec(path: Path) -> SubnetSpec:
    """Read a spec from `search.json`, `subnet.json` or a file that holds only the spec.

    Raises:
        UserError: the file is missing, a folder, not JSON, or holds no spec.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a spec such as search.json") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a spec in it, such as search.json") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    spec = content.get("spec", content) if isinstance(content, dict) else None
    if not isinstance(spec, dict):
        raise UserError(f"{path} holds no spec; give search.json or subnet.json")
    return spec_of(content)


def spec_of(content: Mapping[str, Any]) -> SubnetSpec:
    """The spec in the content of `search.json`, `subnet.json` or of a file that holds it alone.

    Raises:
        UserError: a key is missing or an index set is malformed.
    """
    origin = {key: content[key] for key in ORIGIN_KEYS if key in content}
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and "hash" in teacher:  # as search.json has it
        origin["teacher_hash"] = teacher["hash"]
    return replace(SubnetSpec.from_json(content.get("spec", content)), origin=origin)
