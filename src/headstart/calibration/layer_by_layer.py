"""A model's forward pass over much text, layer by layer instead of batch by batch.

What is measured of a layer, or changed in it, is then done with before the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headstart.model.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_BATCH = 2048
"""Enough for a device to be busy; a fixed number, so that it need not be part of a cache's key."""


def batches_of(blocks: Int[Tensor, "blocks tokens"]) -> tuple[Int[Tensor, "batch tokens"], ...]:
    """Text in the pieces that a model reads."""
    found: tuple[Tensor, ...] = blocks.split(max(1, TOKENS_PER_BATCH // blocks.shape[1]))  # type: ignore[no-untyped-call]
    return found


def linear_of(model: PreTrainedModel, pattern: str, layer: int | None) -> nn.Linear:
    """A linear layer of a model by its weight's pattern."""
    found = model.get_submodule(pattern.format(i=layer).removesuffix(".weight"))
    assert isinstance(found, nn.Linear)
    return found


class _Reached(Exception):
    """The rest of a layer need not be computed."""


class LayerwiseForward:
    """A model, and the hidden states of all tokens on their way through it.

    What there is of all tokens is one tensor, which is written to in place: of many small ones
    that come and go, allocators keep a part.

    Attributes:
        model: in eval mode; callers turn gradients off.
        architecture: of it.
        layers: of it.
        hidden: of all tokens, before the layer that comes next; each batch's after the other's.
    """

    hidden: Float[Tensor, "tokens embed"]

    def __init__(self, model: PreTrainedModel, batches: Sequence[Int[Tensor, "batch tokens"]]):
        self.model, self.architecture = model, Architecture.of(model.config)
        pattern, number = self.architecture.family.layer, self.architecture.sizes["layers"]
        self.layers = [model.get_submodule(pattern.format(i=layer)) for layer in range(number)]
        self._shapes = [batch.shape for batch in batches]
        self._arguments: dict[torch.Size, list[dict[str, Any]]] = {}
        embedded = []
        for batch in batches:
            states, arguments = _before_layers(model, self.layers, batch.to(model.device))
            embedded.append(states.flatten(0, 1))
            self._arguments.setdefault(batch.shape, arguments)
        self.hidden = torch.cat(embedded)

    def batches(
        self, all: Float[Tensor, "tokens units"]
    ) -> Iterator[Float[Tensor, "batch tokens units"]]:
        """Views of something that there is of all tokens."""
        parts = all.split([shape.numel() for shape in self._shapes])  # type: ignore[no-untyped-call]
        return (part.unflatten(0, shape) for part, shape in zip(parts, self._shapes, strict=True))

    def empty(self, num_units: int) -> Float[Tensor, "tokens units"]:
        """Room for something of all tokens."""
        return self.hidden.new_empty(len(self.hidden), num_units)

    def run(
        self,
        layer: int,
        see: Mapping[str, Callable[[Tensor, Tensor], None]] = MappingProxyType({}),
        on_batch: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        """Take the hidden states through a layer.

        Args:
            layer: its number.
            see: linear layer, by its weight's pattern -> what is called with its input and output
                for every batch; where the input is the stream itself, it is overwritten later.
            on_batch: called with the tokens of each batch done, for progress.
        """
        with ExitStack() as undo:
            for pattern, call in see.items():
                hook = self.linear(pattern, layer).register_forward_hook(
                    lambda module, inputs, output, call=call: call(inputs[0], output)
                )
                undo.callback(hook.remove)
            for states, shape in zip(self.batches(self.hidden), self._shapes, strict=True):
                states.copy_(self.layers[layer](states, **self._arguments[shape][layer]))
                on_batch(shape.numel())

    def inputs(self, pattern: str, layer: int) -> Float[Tensor, "tokens inputs"]:
        """What a linear layer reads; its layer is computed up to there."""
        linear = self.linear(pattern, layer)
        found = self.empty(linear.in_features)
        rest = self.batches(found)

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            next(rest).copy_(inputs[0])
            raise _Reached

        hook = linear.register_forward_pre_hook(stop)
        try:
            for states, shape in zip(self.batches(self.hidden), self._shapes, strict=True):
                with suppress(_Reached):
                    self.layers[layer](states, **self._arguments[shape][layer])
        finally:
            hook.remove()
        return found

    def linear(self, pattern: str, layer: int | None) -> nn.Linear:
        """A linear layer by its weight's pattern."""
        return linear_of(self.model, pattern, layer)

    def normed(self, norm: str) -> Iterator[Float[Tensor, "batch tokens embed"]]:
        """What a norm outside the layers, by its weight, makes of the hidden states."""
        module = self.model.get_submodule(norm.removesuffix(".weight"))
        return map(module, self.batches(self.hidden))


def _before_layers(
    model: PreTrainedModel, layers: Sequence[nn.Module], batch: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch tokens embed"], list[dict[str, Any]]]:
    """What the first layer is given, and the other arguments of every layer.

    The model's own forward pass prepares them, since masks and positions may differ from layer to
    layer; the layers stand idle meanwhile.
    """
    arguments: list[dict[str, Any]] = []
    embedded: list[Tensor] = []

    def idle(states: Tensor, **others: Any) -> Tensor:
        embedded.append(states)
        arguments.append(others)
        return states

    with ExitStack() as undo:
        for layer in layers:
            layer.forward = idle
            undo.callback(delattr, layer, "forward")
        model.base_model(batch, use_cache=False)
    return embedded[0], arguments
