"""Parameters, FLOPs and bytes of a model, from its tensors' layouts and the sizes of its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from headstart.model.axes import Sizes, axes_of, dimensions_of, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Count:
    """What a model costs.

    Attributes:
        parameters: all of them, a tied embedding counted once.
        non_embedding_parameters: without the input embedding and the output matrix.
        inference_flops_per_token: one forward pass at the given context length.
        training_flops_per_token: forward and backward, three times a forward pass.
    """

    parameters: int
    non_embedding_parameters: int
    inference_flops_per_token: int
    training_flops_per_token: int


def parameters(layouts: Mapping[str, str], sizes: Sizes) -> Any:
    """Parameters of a model with these tensors and sizes.

    Args:
        layouts: tensor name pattern -> layout, as an `Architecture` has them.
        sizes: axis -> size; integer arrays count many shapes at once, and a tuple gives a size for
            each layer.
    """
    return sum(_numel(pattern, layout, sizes) for pattern, layout in layouts.items())


def non_embedding_parameters(layouts: Mapping[str, str], sizes: Sizes) -> Any:
    """Parameters of the tensors that have no vocabulary axis."""
    body = {name: layout for name, layout in layouts.items() if "vocab" not in axes_of(layout)}
    return parameters(body, sizes)


def inference_flops_per_token(layouts: Mapping[str, str], sizes: Sizes, context_length: int) -> Any:
    """FLOPs of one token's forward pass: two per weight that multiplies it, and attention.

    The embedding look-up costs nothing, the output matrix counts whether it is tied or not, and
    attention counts the full context, without the causal half.

    Source: PaLM (arXiv 2204.02311), appendix B, whose 6N + 12 L H Q T for training is three times
    this.
    """
    output_matrix = sizes["vocab"] * sizes["embed"]
    return layers_flops_per_token(layouts, sizes, context_length) + 2 * output_matrix


def layers_flops_per_token(layouts: Mapping[str, str], sizes: Sizes, context_length: int) -> Any:
    """FLOPs of one token's way through the layers, without the output matrix."""
    matmul_parameters = sum(
        _numel(pattern, layout, sizes)
        for pattern, layout in layouts.items()
        if len(dimensions_of(layout)) == 2 and "vocab" not in axes_of(layout)
    )
    heads = _numel("{i}", "(kv_groups q_per_kv head_dim)", sizes)
    return 2 * (matmul_parameters + 2 * heads * context_length)


def kv_cache_bytes_per_token(sizes: Sizes, bytes_per_number: int) -> Any:
    """Bytes that keys and values of one token take in all layers."""
    return 2 * _numel("{i}", "(kv_groups head_dim)", sizes) * bytes_per_number


Measure = Literal["parameters", "flops_per_token", "kv_cache_bytes_per_token", "weight_bytes"]
MEASURES: dict[Measure, str] = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs per token",
    "kv_cache_bytes_per_token": "KV cache bytes per token",
    "weight_bytes": "bytes of weights",
}
"""What sizes of models are measured in, and its words; `Architecture.amount` measures."""


def bytes_per_number(config: PreTrainedConfig) -> int:
    """Bytes of a number at the config's precision; 2 where it names none."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return 2 if dtype is None else int(dtype.itemsize)


def _numel(pattern: str, layout: str, sizes: Sizes) -> Any:
    if "{i}" not in pattern:
        return math.prod(shape_of(layout, sizes))
    differing = [axis for axis in axes_of(layout) if isinstance(sizes[axis], tuple)]
    if not differing:
        return math.prod(shape_of(layout, sizes)) * sizes["layers"]
    return sum(
        math.prod(shape_of(layout, {**sizes, **{axis: sizes[axis][i] for axis in differing}}))
        for i in range(sizes["layers"])
    )
