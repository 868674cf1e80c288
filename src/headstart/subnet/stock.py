"""The stock checkpoint that computes what a layer-wise student does, where there is one.

Units that a layer lacks are added as zeros: a neuron whose output nobody reads, a group of heads
whose output is multiplied by zero. The function stays the same, at the price of more parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headstart.subnet.axes import Sizes, axes_of, place_tensor
from headstart.subnet.families import DROPPED
from headstart.subnet.rules import family_of, is_layerwise, layouts_of, match_tensor, sizes_of
from headstart.subnet.spec import config_values, sizes_in_layer, stock_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stock_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """The smallest sizes of a stock checkpoint that can hold a model, in zeros where it has less.

    Args:
        config: of any model of a family, layer-wise or not.

    Raises:
        ValueError: no stock checkpoint computes what this model does; the message says why and
            names the nearest shape that one could have.
    """
    sizes = sizes_of(config)
    largest = {axis: max(n) if isinstance(n, tuple) else n for axis, n in sizes.items()}
    for groups in range(largest["kv_groups"], largest["embed"] + 1):
        padded = {**largest, "kv_groups": groups}
        if stock_obstacle(config, padded):
            continue
        if padded["kv_groups"] != sizes["kv_groups"] and (norm := _norm_over_heads(config)):
            raise ValueError(
                f"{stock_obstacle(config, sizes)}, and heads of zeros would change what {norm} "
                f"averages over; cut a student with {groups} kv_groups in every layer"
            )
        return padded
    of_heads = largest["kv_groups"] * largest["q_per_kv"] * largest["head_dim"]  # always fits
    widths = range(1, 1 + max(of_heads, 2 * largest["embed"]))
    nearest = min(
        (width for width in widths if _fits(config, largest, width)),
        key=lambda width: abs(width - largest["embed"]),
    )
    raise ValueError(
        f"{stock_obstacle(config, largest)}, which zeros cannot mend; the nearest stock shape has "
        f"embed {nearest}: cut a student of that width"
    )


def _fits(config: PreTrainedConfig, sizes: Sizes, width: int) -> bool:
    return not stock_obstacle(config, {**sizes, "embed": width})


def _norm_over_heads(config: PreTrainedConfig) -> str:
    """A norm that averages over the channels of several heads, or nothing."""
    for pattern, layout in layouts_of(config).items():
        if "norm" in pattern and "kv_groups" in axes_of(layout):
            return pattern
    return ""


def stock_config(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """The config of a family's stock code for a model of these sizes.

    Args:
        config: of the model, layer-wise or not.
        sizes: of `stock_sizes`.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = family_of(config)
    entries = config.to_dict()
    if is_layerwise(config):
        for key in ("per_layer_config", "auto_map", "model_type"):
            entries.pop(key, None)
        if "head_dim" not in dict(family.config):
            entries.pop("head_dim")
    stock = CONFIG_MAPPING[family.name].from_dict(entries | config_values(family.config, sizes))
    stock.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.name]]
    return stock


def stock_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, sizes: Sizes
) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors in a stock checkpoint of these sizes, with zeros where it has less.

    Args:
        tensors: (name, tensor) pairs of the whole model, in any order.
        config: of the model.
        sizes: of `stock_sizes`.
    """
    own = sizes_of(config)
    in_files = {name: alias for alias, name in family_of(config).aliases.items()}
    for name, tensor in tensors:
        rule, layer = match_tensor(name, config)
        if rule.layout != DROPPED:
            placed = place_tensor(tensor, rule.layout, sizes_in_layer(own, layer or 0), sizes)
            yield in_files.get(name, name), placed
