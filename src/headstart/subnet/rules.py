"""Reads a family's table for one model: which tensors it has, and how large each axis is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.subnet.axes import dimension_size, parse_layout
from headstart.subnet.families import DROPPED, FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAYERWISE_PREFIX = "headstart_"
"""Of the `model_type` of a layer-wise student, before its family's; as in modeling.py."""


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a model folder.

    Raises:
        ValueError: config.json is missing or malformed, of a family that no table knows, or of a
            model that caps its logits.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no model config ({type(error).__name__}: {error}); fetch the model again"
        ) from error
    _known(model_type)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "final_logit_softcapping", None):
        raise ValueError(
            f"{path} has final_logit_softcapping {config.final_logit_softcapping}, and headstart's "
            "losses take logits without a soft cap; choose a model that has none, such as Gemma 3"
        )
    return config


def family_of(config: PreTrainedConfig) -> Family:
    """The family that a model config belongs to.

    Raises:
        ValueError: no table knows this `model_type`.
    """
    return _known(config.model_type)


def _known(model_type: str) -> Family:
    model_type = model_type.removeprefix(LAYERWISE_PREFIX)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not a family that headstart knows "
            f"({', '.join(sorted(FAMILIES))}); choose a teacher of one of these, or add a table "
            "as CONTRIBUTING.md shows"
        )
    return FAMILIES[model_type]


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Size of every axis, read from a model config through its family's table.

    A tuple gives a size for each layer where layers differ.

    >>> from transformers import GPTNeoXConfig
    >>> sizes_of(GPTNeoXConfig(hidden_size=64, num_attention_heads=4))["head_dim"]
    16
    """
    if not config.is_heterogeneous:
        return _sizes_of_one(config)
    of_layers = [_sizes_of_one(layer) for layer in config.per_layer_config]
    return {
        axis: size
        if all(one[axis] == size for one in of_layers)
        else tuple(one[axis] for one in of_layers)
        for axis, size in of_layers[0].items()
    }


def _sizes_of_one(config: PreTrainedConfig) -> dict[str, int]:
    """Size of every axis where all layers are alike."""
    sizes: dict[str, int] = {}
    for key, layout in config_entries(config):
        (dimension,) = parse_layout(layout)
        unknown = [part for part in dimension if isinstance(part, str) and part not in sizes]
        if not unknown:
            continue
        assert len(unknown) == 1, f"{layout!r} has more than one unknown axis"
        known = dimension_size(tuple(part for part in dimension if part not in unknown), sizes)
        value = getattr(config, key, None)
        if value is None and key == "head_dim":  # as transformers derives it
            value = config.hidden_size // config.num_attention_heads
        sizes[unknown[0]] = value // known
    return {"q_per_kv": 1} | sizes


def is_layerwise(config: PreTrainedConfig) -> bool:
    """Whether a config is of one of headstart's own layer-wise models."""
    return bool(config.model_type.startswith(LAYERWISE_PREFIX))


def config_entries(config: PreTrainedConfig) -> tuple[tuple[str, str], ...]:
    """The (config key, layout) pairs of a model; a layer-wise one ties no products together."""
    entries = family_of(config).config
    return layerwise_entries(entries) if is_layerwise(config) else entries


def layerwise_entries(entries: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """A stock table's pairs as a layer-wise config has them: each key once, and `head_dim`.

    >>> layerwise_entries((("hidden_size", "embed"), ("hidden_size", "(kv_groups head_dim)")))
    (('hidden_size', 'embed'), ('head_dim', 'head_dim'))
    """
    once: dict[str, str] = {}
    for key, layout in entries:
        once.setdefault(key, layout)
    return tuple((once | {"head_dim": "head_dim"}).items())


def layouts_of(config: PreTrainedConfig) -> dict[str, str]:
    """The tensors that a model with this config has: name pattern -> layout without conditions."""
    return {
        pattern: rule.layout
        for pattern, rule in _rules(family_of(config).name).items()
        if rule.layout != DROPPED and rule.holds(config)
    }


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    Attributes:
        pattern: tensor name pattern.
        layout: layout string without its condition, or DROPPED.
        condition: "if", "unless" or "" for always.
        key: the config key that the condition reads.
    """

    pattern: str
    layout: str
    condition: str = ""
    key: str = ""

    def holds(self, config: PreTrainedConfig) -> bool:
        if not self.condition:
            return True
        return bool(getattr(config, self.key)) == (self.condition == "if")


@cache
def _rules(family_name: str) -> Mapping[str, Rule]:
    rules = {}
    for pattern, text in FAMILIES[family_name].tensors.items():
        found = re.fullmatch(r"(.*?)(?: (if|unless) (\w+))?", text)
        assert found
        rules[pattern] = Rule(pattern, found[1], found[2] or "", found[3] or "")
    return rules


def match_tensor(name: str, config: PreTrainedConfig) -> tuple[Rule, int | None]:
    """The one rule for a checkpoint tensor, and the layer that the tensor belongs to.

    A tensor whose "unless" condition fails (the output matrix of a tied checkpoint, which
    transformers ignores too) comes back as DROPPED.

    Raises:
        ValueError: no rule matches the name, its rule does not hold for this config, or its layer
            is beyond the config's.
    """
    family = family_of(config)
    rules = _rules(family.name)
    name = family.aliases.get(name, name)
    layer = re.search(r"\.(\d+)\.", name)
    pattern = name if name in rules else re.sub(r"\.\d+\.", ".{i}.", name, count=1)
    if pattern not in rules:
        raise ValueError(
            f"tensor {name!r} matches no rule of the {family.name} table; this checkpoint is not "
            f"a plain {family.name} causal language model"
        )
    rule = rules[pattern]
    if not rule.holds(config):
        if rule.condition == "if":
            raise ValueError(
                f"tensor {name!r} is in the checkpoint although its config says "
                f"{rule.key}={getattr(config, rule.key)}; mend config.json or the weights"
            )
        rule = Rule(pattern, DROPPED)
    if layer is None or "{i}" not in pattern:
        return rule, None
    num_layers = getattr(config, next(key for key, axes in family.config if axes == "layers"))
    if int(layer[1]) >= num_layers:
        raise ValueError(
            f"tensor {name!r} is in the checkpoint although its config says {num_layers} layers; "
            "mend config.json or the weights"
        )
    return rule, int(layer[1])
