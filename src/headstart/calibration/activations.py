"""What a teacher computes on calibration text, for students that are refitted beside it.

One refit reads it as it comes, layer by layer (`TeacherPass`). Where many students are refitted on
the same text, it is recorded once (`TeacherActivations`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headstart.calibration.layer_by_layer import LayerwiseForward
from headstart.calibration.moments import ROWS_AT_ONCE, sources_of, widest, writing_norms
from headstart.model.architecture import Architecture
from headstart.model.axes import dimensions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def can_propagate(architecture: Architecture) -> bool:
    """Whether what linear layers of a model write is added to the stream as it is.

    In Gemma 3 and OLMo 2 a norm stands in between.
    """
    return not writing_norms(architecture)


def groups_of(architecture: Architecture, has_narrow_heads: bool) -> list[list[str]]:
    """The linear layers of one layer, by patterns of their weights, in the order of computation.

    Those that read the same are together. Queries of narrower heads, and what reads the same, are
    left out, since they were scaled when they were cut.
    """
    groups: dict[str, list[str]] = {}
    for pattern, source in sources_of(architecture).items():
        if "{i}" in pattern:
            groups.setdefault(source, []).append(pattern)
    scaled = set(architecture.family.queries) if has_narrow_heads else set()
    return [group for group in groups.values() if not scaled.intersection(group)]


def reads_stream(pattern: str, architecture: Architecture) -> bool:
    """Whether a linear layer reads the residual stream; others write to it."""
    return dimensions_of(architecture.layouts[pattern])[1:] == (("embed",),)


class TeacherLayer(NamedTuple):
    """One layer of a teacher, with the removed ones behind it, on the channels that a student has.

    Attributes:
        before: the stream.
        values: for the first linear layer of every group what it reads, on all channels, or what it
            writes; the last writer's with what the removed layers write.
        after: the stream before the next kept layer.
    """

    before: Float[Tensor, "tokens kept"]
    values: dict[str, Float[Tensor, "tokens units"]]
    after: Float[Tensor, "tokens kept"]


class TeacherSource(ABC):
    """A teacher on its way through calibration text.

    Attributes:
        model: the teacher, in eval mode.
        architecture: of it.
        batches: token ids of the text.
    """

    model: PreTrainedModel
    architecture: Architecture
    batches: Sequence[Int[Tensor, "batch tokens"]]

    @cached_property
    @torch.no_grad()
    def output_covariance(self) -> Float[Tensor, "embed embed"]:
        """Sums over the vocabulary of products of the output matrix's columns, less the means of
        these."""
        matrix = self.model.get_output_embeddings().weight
        wide = widest(matrix.device)
        mean = matrix.mean(dim=0, dtype=wide)
        total = torch.zeros(len(mean), len(mean), dtype=wide, device=matrix.device)
        for rows in matrix.split(ROWS_AT_ONCE):
            less_mean = rows.to(wide) - mean
            total += less_mean.T @ less_mean
        return total

    @abstractmethod
    def stream(self, layer: int) -> Float[Tensor, "tokens embed"]:
        """The hidden states before a layer, or after the last one; callers copy what they keep."""

    @abstractmethod
    def seen(
        self, layer: int, patterns: Sequence[str], channels: Int[Tensor, " kept"]
    ) -> dict[str, Float[Tensor, "tokens units"]]:
        """What linear layers read, or these channels of what they write; callers may overwrite the
        latter."""

    def layer(
        self,
        layer: int,
        following: int,
        patterns: Sequence[str],
        channels: Int[Tensor, " kept"],
    ) -> TeacherLayer:
        """Of a kept layer and the removed ones up to the `following` kept one; layers are asked for
        in order."""
        before = self.stream(layer)[:, channels]
        values = self.seen(layer, patterns, channels)
        after = self.stream(layer + 1)[:, channels]
        if following > layer + 1:
            behind, after = after, self.stream(following)[:, channels]
            writers = [name for name in values if not reads_stream(name, self.architecture)]
            for last in writers[-1:]:
                values[last] += after - behind
        return TeacherLayer(before, values, after)


class TeacherPass(TeacherSource):
    """Computes each layer when it is asked for, and forgets the one before."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Int[Tensor, "batch tokens"]]
    ) -> None:
        self._forward, self._next = LayerwiseForward(model, batches), 0
        self.model, self.batches = model, batches
        self.architecture = self._forward.architecture

    @torch.no_grad()
    def stream(self, layer: int) -> Float[Tensor, "tokens embed"]:
        assert layer >= self._next
        while self._next < layer:
            self._run()
        return self._forward.hidden

    @torch.no_grad()
    def seen(
        self, layer: int, patterns: Sequence[str], channels: Int[Tensor, " kept"]
    ) -> dict[str, Float[Tensor, "tokens units"]]:
        assert layer == self._next
        values = dict[str, Tensor]()

        def see(pattern: str) -> Callable[[Tensor, Tensor], None]:
            reads = reads_stream(pattern, self.architecture)
            width = self.architecture.sizes["embed"] if reads else len(channels)
            values[pattern] = self._forward.empty(width)
            rest = self._forward.batches(values[pattern])

            def take(x: Tensor, y: Tensor) -> None:
                next(rest).copy_(x if reads else y[..., channels])

            return take

        self._run({pattern: see(pattern) for pattern in patterns})
        return values

    def _run(self, see: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None) -> None:
        self._forward.run(self._next, see or {})
        self._next += 1


@dataclass(frozen=True)
class TeacherActivations(TeacherSource):
    """Remembers all layers, for many students.

    Of each layer it holds the stream before it and what each group of linear layers reads or
    writes, all as wide as the stream: with four groups that is 5 numbers for each layer, token and
    channel. 1,024 tokens of SmolLM2-135M (30 layers of 576 channels) take 178 MB in bfloat16, of a
    teacher of 7B parameters (32 of 4,096) 1.4 GB. A family that cannot be refitted layer by layer
    keeps the last hidden states alone.

    Attributes:
        streams: hidden states before each layer, and after the last one; by number of the layer.
        values: for each layer, the first linear layer of every group -> what it reads or writes.
    """

    model: PreTrainedModel
    architecture: Architecture
    batches: Sequence[Int[Tensor, "batch tokens"]]
    streams: Mapping[int, Float[Tensor, "tokens embed"]]
    values: Sequence[Mapping[str, Float[Tensor, "tokens embed"]]]

    @classmethod
    @torch.no_grad()
    def record(
        cls, model: PreTrainedModel, batches: Sequence[Int[Tensor, "batch tokens"]]
    ) -> TeacherActivations:
        """Run a teacher in eval mode through calibration text once."""
        source = TeacherPass(model, batches)
        architecture, num_layers = source.architecture, source.architecture.sizes["layers"]
        streams, values = dict[int, Tensor](), list[Mapping[str, Tensor]]()
        if can_propagate(architecture):
            patterns = [pattern for pattern, *_ in groups_of(architecture, has_narrow_heads=False)]
            everything = torch.arange(architecture.sizes["embed"], device=model.device)
            for layer in range(num_layers):
                streams[layer] = source.stream(layer).clone()
                values.append(source.seen(layer, patterns, everything))
        streams[num_layers] = source.stream(num_layers)
        return cls(model, architecture, batches, streams, values)

    def stream(self, layer: int) -> Float[Tensor, "tokens embed"]:
        return self.streams[layer]

    def seen(
        self, layer: int, patterns: Sequence[str], channels: Int[Tensor, " kept"]
    ) -> dict[str, Float[Tensor, "tokens units"]]:
        values = self.values[layer]
        return {
            pattern: values[pattern]
            if reads_stream(pattern, self.architecture)
            else values[pattern][:, channels]
            for pattern in patterns
        }
