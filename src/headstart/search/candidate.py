"""What a search proposes: how much of each axis to keep, and in fine spaces which units.

A candidate speaks in *ranks*. The axis order (`Orders`) turns ranks into the teacher's own indices,
layer by layer, so "the first k" may mean the teacher's first or its most important.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from headstart.subnet.rotary import head_channels
from headstart.subnet.rules import sizes_of
from headstart.subnet.spec import Indices, SubnetSpec, format_indices, parse_indices

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
            raise ValueError(f"{text!r} is not a set of units such as '4' or '4 -1 +6'")
        if found[2] is None:
            return Units(int(found[1]))
        return Units(int(found[1]), parse_indices(found[2]), parse_indices(found[3]))


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

    def spec(self, config: PreTrainedConfig, orders: Orders) -> SubnetSpec:
        """The sub-network in the teacher's own numbering.

        Args:
            config: the teacher's config.
            orders: what the ranks mean.
        """
        ranks = self.layers.ranks()
        groups, neurons = self.kv_groups, self.mlp
        if len(groups) == 1:
            groups = groups * len(ranks)
        if len(neurons) == 1:
            neurons = neurons * len(ranks)
        teacher_layers = [orders.layers[rank] for rank in ranks]
        kept = sorted(zip(teacher_layers, groups, neurons, strict=True))
        whole_heads = self.head_dim == sizes_of(config)["head_dim"]
        return SubnetSpec(
            layers=tuple(layer for layer, _, _ in kept),
            embed=_pick(orders.embed, self.embed),
            kv_groups=tuple(_pick(orders.kv_groups[layer], units) for layer, units, _ in kept),
            mlp=tuple(_pick(orders.mlp[layer], units) for layer, _, units in kept),
            head_dim=None if whole_heads else head_channels(config, self.head_dim),
        )

    def sizes(self) -> dict[str, Any]:
        """Size of each searched axis; a list where layers differ."""
        sizes: dict[str, Any] = {
            "layers": self.layers.size,
            "embed": self.embed.size,
            "head_dim": self.head_dim,
        }
        for axis, units in (("kv_groups", self.kv_groups), ("mlp", self.mlp)):
            of_layers = [one.size for one in units]
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
    def of_teacher(config: PreTrainedConfig) -> Orders:
        """The teacher's own order."""
        whole = SubnetSpec.identity(sizes_of(config))
        return Orders(whole.layers, whole.embed, whole.kv_groups, whole.mlp)


def _pick(order: Indices, units: Units) -> Indices:
    return tuple(sorted(order[rank] for rank in units.ranks()))
