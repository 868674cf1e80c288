"""The stock checkpoint that computes what a layer-wise student does, where there is one.

Units that a layer lacks are added as zeros: a neuron whose output nobody reads, a group of heads
whose output is multiplied by zero. The function stays the same, at the price of more parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes, axes_of, place_tensor
from headstart.model.families import DROPPED
from headstart.model.shapes import attention_width, config_values, sizes_in_layer, stock_obstacle
from headstart.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stock_sizes(architecture: Architecture) -> dict[str, Any]:
    """The smallest sizes of a stock checkpoint that can hold a model, in zeros where it has less.

    Raises:
        UserError: no stock checkpoint computes what this model does; the message says why and
            names the nearest shape that one could have.
    """
    sizes = architecture.sizes
    largest = {axis: max(n) if isinstance(n, tuple) else n for axis, n in sizes.items()}
    for groups in range(largest["kv_groups"], largest["embed"] + 1):
        padded = {**largest, "kv_groups": groups}
        if stock_obstacle(architecture.family, padded):
            continue
        if padded["kv_groups"] != sizes["kv_groups"] and (norm := _norm_over_heads(architecture)):
            raise UserError(
                f"{stock_obstacle(architecture.family, sizes)}, and heads of zeros would change "
                f"what {norm} averages over; cut a student with {groups} kv_groups in every layer"
            )
        return padded
    of_heads = attention_width(largest)  # always fits
    widths = [
        width
        for width in range(1, 1 + max(of_heads, 2 * largest["embed"]))
        if not stock_obstacle(architecture.family, {**largest, "embed": width})
    ]
    nearest = min(widths, key=lambda width: abs(width - largest["embed"]))
    raise UserError(
        f"{stock_obstacle(architecture.family, largest)}, which zeros cannot mend; the nearest "
        f"stock shape has embed {nearest}: cut a student of that width"
    )


def _norm_over_heads(architecture: Architecture) -> str:
    """A norm that averages over the channels of several heads, or nothing."""
    layouts = architecture.layouts
    return next(
        (name for name in layouts if "norm" in name and "kv_groups" in axes_of(layouts[name])), ""
    )


def stock_config(architecture: Architecture, sizes: Sizes) -> PreTrainedConfig:
    """The config of a family's stock code for a model of these sizes, which `stock_sizes` gave."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = architecture.family
    entries = architecture.config.to_dict()
    if architecture.is_layerwise:
        for key in ("per_layer_config", "auto_map", "model_type"):
            entries.pop(key, None)
        if "head_dim" not in dict(family.config):
            entries.pop("head_dim")
    stock = CONFIG_MAPPING[family.name].from_dict(entries | config_values(family.config, sizes))
    stock.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.name]]
    return stock


def stock_tensors(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture, sizes: Sizes
) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors in a stock checkpoint of these sizes, with zeros where it has less."""
    for name, tensor in tensors:
        rule, layer = architecture.match(name)
        if rule.layout != DROPPED:
            in_layer = sizes_in_layer(architecture.sizes, layer or 0)
            yield name, place_tensor(tensor, rule.layout, in_layer, sizes)
