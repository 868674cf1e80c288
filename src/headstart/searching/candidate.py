"""What a search proposes: how much of each axis to keep, and in fine spaces which units.

A candidate speaks in *ranks*. The axis order (`Orders`) turns ranks into the teacher's own indices,
layer by layer, so "the first k" may mean the teacher's first or its most important.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.rotary import head_channels
from headstart.model.spec import Indices, SubnetSpec
from headstart.searching.units import Units


class Candidate(NamedTuple):
    """A sub-network to be scored.

    Attributes:
        layers: kept layers.
        embed: kept residual channels.
        head_dim: channels of every head.
        kv_groups: kept groups of each kept layer, by ascending rank of the layer; a single entry
            holds for all layers.
        mlp: kept neurons, likewise.
    """

    layers: Units
    embed: Units
    head_dim: int
    kv_groups: tuple[Units, ...]
    mlp: tuple[Units, ...]

    def spec(self, teacher: Architecture, orders: Orders) -> SubnetSpec:
        """The sub-network in the teacher's own numbering; the orders say what the ranks mean."""
        teacher_layers = [orders.layers[rank] for rank in self.layers.ranks()]
        groups, neurons = (
            units * len(teacher_layers) if len(units) == 1 else units
            for units in (self.kv_groups, self.mlp)
        )
        kept = sorted(zip(teacher_layers, groups, neurons, strict=True))
        rope, head_dim = teacher.config.rope_parameters, teacher.sizes["head_dim"]
        whole_heads = self.head_dim == head_dim
        return SubnetSpec(
            layers=tuple(layer for layer, _, _ in kept),
            embed=_pick(orders.embed, self.embed),
            kv_groups=tuple(_pick(orders.kv_groups[layer], units) for layer, units, _ in kept),
            mlp=tuple(_pick(orders.mlp[layer], units) for layer, _, units in kept),
            head_dim=None if whole_heads else head_channels(rope, head_dim, self.head_dim),
        )

    def sizes(self) -> dict[str, Any]:
        """Size of each searched axis; a tuple, one for each layer, where layers differ."""
        sizes: dict[str, Any] = {
            "layers": self.layers.size,
            "embed": self.embed.size,
            "head_dim": self.head_dim,
        }
        for axis, units in (("kv_groups", self.kv_groups), ("mlp", self.mlp)):
            of_layers = tuple(of_layer.size for of_layer in units)
            sizes[axis] = of_layers[0] if len(set(of_layers)) == 1 else of_layers
        return sizes

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": str(self.layers),
            "embed": str(self.embed),
            "head_dim": self.head_dim,
            "kv_groups": [str(units) for units in self.kv_groups],
            "mlp": [str(units) for units in self.mlp],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Candidate:
        """Read what `to_json` writes."""
        return Candidate(
            Units.parse(value["layers"]),
            Units.parse(value["embed"]),
            value["head_dim"],
            tuple(Units.parse(text) for text in value["kv_groups"]),
            tuple(Units.parse(text) for text in value["mlp"]),
        )


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
    def of_teacher(sizes: Sizes) -> Orders:
        """The teacher's own order, by the size of its axes."""
        whole = SubnetSpec.identity(sizes)
        return Orders(whole.layers, whole.embed, whole.kv_groups, whole.mlp)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "embed": list(self.embed),
            "kv_groups": [list(of_layer) for of_layer in self.kv_groups],
            "mlp": [list(of_layer) for of_layer in self.mlp],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Orders:
        """Read what `to_json` writes."""
        return Orders(
            tuple(value["layers"]),
            tuple(value["embed"]),
            tuple(map(tuple, value["kv_groups"])),
            tuple(map(tuple, value["mlp"])),
        )


def _pick(order: Indices, units: Units) -> Indices:
    return tuple(sorted(order[rank] for rank in units.ranks()))
