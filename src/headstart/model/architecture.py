"""What a model is made of: one config, read once through its family's table.

An `Architecture` is made for a teacher and handed down. It knows which tensors there are, how large
each axis is, what the model costs, and what a sub-network of it looks like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.model import count as counting
from headstart.model.axes import Sizes, dimension_size, parse_layout, shape_of
from headstart.model.count import Count, Measure
from headstart.model.families import DROPPED, FAMILIES, Family
from headstart.model.layerwise import PREFIX, is_layerwise, layerwise_config
from headstart.model.rotary import kept_pairs, student_rope
from headstart.model.shapes import (
    ConfigPairs,
    config_values,
    layerwise_pairs,
    sizes_in_layer,
    stock_obstacle,
)
from headstart.model.spec import SubnetSpec
from headstart.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model's config with what its family's table says of it.

    Attributes:
        config: transformers' own.
        family: its table.
        layouts: the tensors that the model has: name pattern -> layout without conditions.
        sizes: the size of every axis; a tuple, one for each layer, where layers differ.
    """

    config: PreTrainedConfig
    family: Family
    layouts: Mapping[str, str]
    sizes: Mapping[str, Any]

    @staticmethod
    def of(config: PreTrainedConfig) -> Architecture:
        """Read a config through its family's table.

        >>> from transformers import GPTNeoXConfig
        >>> config = GPTNeoXConfig(hidden_size=64, num_attention_heads=4)
        >>> Architecture.of(config).sizes["head_dim"]
        16

        Raises:
            UserError: no table knows its `model_type`.
        """
        family = _known_family(config.model_type)
        layouts = {
            pattern: rule.layout
            for pattern, rule in _rules(family.name).items()
            if rule.layout != DROPPED and rule.holds(config)
        }
        pairs = layerwise_pairs(family.config) if is_layerwise(config) else family.config
        return Architecture(config, family, layouts, _sizes(config, pairs))

    @staticmethod
    def read(folder: Path) -> Architecture:
        """The architecture of a model folder.

        Raises:
            UserError: config.json is missing or malformed, of a family that no table knows, or of a
                model that is quantised or caps its logits.
        """
        from transformers import AutoConfig

        path = folder / "config.json"
        try:
            entries = json.loads(path.read_text())
            model_type = entries["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no model config ({type(error).__name__}: {error}); fetch the model "
                "again"
            ) from error
        family = _known_family(model_type)
        if quantised := entries.get("quantization_config"):
            named = quantised if isinstance(quantised, dict) else {}
            raise UserError(
                f"{path} says that the weights are quantised by "
                f"{named.get('quant_method', 'an unknown method')}, and headstart cuts plain "
                "ones; give the original checkpoint, or load this one, dequantize() and save it"
            )
        try:
            if entries.get("head_dim") and any(
                entries[part] % entries[by] for by, part in family.divides
            ):
                from headstart.model import any_width  # noqa: F401  # which lets them through
            config = AutoConfig.from_pretrained(folder)
            if not is_layerwise(config):  # other code does not travel with what is cut
                vars(config).pop("auto_map", None)
            architecture = Architecture.of(config)
            sizes = {axis: size for axis, size in architecture.sizes.items() if not _is_size(size)}
        except UserError:
            raise
        except Exception as error:  # transformers raises KeyErrors and AssertionErrors too
            reason = (str(error).strip() or "no message").splitlines()[-1].strip()
            raise UserError(
                f"{path} is no config of a {model_type} model ({type(error).__name__}: {reason}); "
                "mend it or fetch the model again"
            ) from error
        for axis, size in sizes.items():
            raise UserError(f"{path} makes {axis} {size}; mend it or fetch the model again")
        if getattr(config, "final_logit_softcapping", None):
            raise UserError(
                f"{path} has final_logit_softcapping {config.final_logit_softcapping}, and "
                "headstart's losses take logits without a soft cap; choose a model that has none, "
                "such as Gemma 3"
            )
        return architecture

    @property
    def is_layerwise(self) -> bool:
        """Whether it is one of headstart's own layer-wise models."""
        return is_layerwise(self.config)

    @property
    def layer_period(self) -> int:
        """After how many layers their kinds of attention come again; 1 where all are alike."""
        kinds = getattr(self.config, "layer_types", None) or [""]
        return next(
            period
            for period in range(1, len(kinds) + 1)
            if all(kind == kinds[place % period] for place, kind in enumerate(kinds))
        )

    def match(self, name: str) -> tuple[Rule, int | None]:
        """The one rule for a checkpoint tensor, and the layer that the tensor belongs to.

        A tensor whose "unless" condition fails (the output matrix of a tied checkpoint, which
        transformers ignores too) comes back as DROPPED.

        Raises:
            UserError: no rule matches the name, its rule does not hold for this config, or its
                layer is beyond the config's.
        """
        rules = _rules(self.family.name)
        name = self.family.aliases.get(name, name)
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name if name in rules else re.sub(r"\.\d+\.", ".{i}.", name, count=1)
        if pattern not in rules:
            raise UserError(
                f"tensor {name!r} matches no rule of the {self.family.name} table; this checkpoint "
                f"is not a plain {self.family.name} causal language model"
            )
        rule = rules[pattern]
        if not rule.holds(self.config):
            if rule.condition == "if":
                raise UserError(
                    f"tensor {name!r} is in the checkpoint although its config says "
                    f"{rule.key}={getattr(self.config, rule.key)}; mend config.json or the weights"
                )
            rule = Rule(pattern, DROPPED)
        if layer is None or "{i}" not in pattern:
            return rule, None
        if int(layer[1]) >= self.sizes["layers"]:
            raise UserError(
                f"tensor {name!r} is in the checkpoint although its config says "
                f"{self.sizes['layers']} layers; mend config.json or the weights"
            )
        return rule, int(layer[1])

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> tuple[Rule, int | None]:
        """`match`, for a tensor that must also have the shape that the config says.

        Raises:
            UserError: as `match`, or the shape is another.
        """
        rule, layer = self.match(name)
        if rule.layout != DROPPED:
            expected = shape_of(rule.layout, sizes_in_layer(self.sizes, layer or 0))
            if shape != expected:
                raise UserError(
                    f"tensor {name!r} has shape {shape}, and the config says {expected}; mend "
                    "config.json or fetch the teacher again"
                )
        return rule, layer

    def places(self, layers: Iterable[int]) -> set[tuple[str, int | None]]:
        """All tensors of some layers and outside them: pattern, and layer if it is in one."""
        return {
            (pattern, layer if "{i}" in pattern else None)
            for pattern in self.layouts
            for layer in layers
        }

    def refuse_missing(self, places: Collection[tuple[str, int | None]]) -> None:
        """Raise a UserError that names the first of some tensors that are not there, if any."""
        if places:
            pattern, layer = min(places, key=str)
            raise UserError(
                f"the checkpoint lacks {pattern.replace('{i}', str(layer))!r}, which the "
                f"{self.family.name} table expects; fetch the teacher again"
            )

    @property
    def context_limit(self) -> int | None:
        """Positions that the model can tell apart, as its config has them, stretched where rotary
        positions are; None where it says nothing."""
        limit: int | None = getattr(self.config, "max_position_embeddings", None)
        if limit is None:
            return None
        rope = getattr(self.config, "rope_parameters", None) or {}
        for kind in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):
            original = kind.get("original_max_position_embeddings") or limit
            limit = max(limit, int(original * (kind.get("factor") or 1)))
        return limit

    def check_context(self, block_length: int) -> None:
        """Raise a UserError if blocks are longer than the model can tell positions apart."""
        limit = self.context_limit
        if limit is not None and block_length > limit:
            raise UserError(
                f"data.block_length is {block_length:,}, and the model's context is {limit:,} "
                "tokens; use at most so many"
            )

    def count(self, context_length: int, sizes: Sizes | None = None) -> Count:
        """What the model costs, or one of the same family and other sizes.

        Args:
            context_length: tokens that attention spans, for the FLOPs.
            sizes: axis -> size; a tuple gives a size for each layer. None for the model's own.
        """
        layouts, sizes = self.layouts, self.sizes if sizes is None else sizes
        inference = counting.inference_flops_per_token(layouts, sizes, context_length)
        return Count(
            counting.parameters(layouts, sizes),
            counting.non_embedding_parameters(layouts, sizes),
            inference_flops_per_token=inference,
            training_flops_per_token=3 * inference,
        )

    def amount(self, sizes: Sizes, measure: Measure, context_length: int) -> Any:
        """What a model of these sizes comes to in one measure.

        Args:
            sizes: axis -> size; integer arrays count many shapes at once, and a tuple gives a size
                for each layer.
            measure: parameters; FLOPs of a token's forward pass; bytes of the KV cache for one
                token, or of the weights, at the config's precision.
            context_length: tokens that attention spans, for the FLOPs.
        """
        if measure == "flops_per_token":
            return counting.inference_flops_per_token(self.layouts, sizes, context_length)
        number_bytes = counting.bytes_per_number(self.config)
        if measure == "kv_cache_bytes_per_token":
            return counting.kv_cache_bytes_per_token(sizes, number_bytes)
        per_parameter = number_bytes if measure == "weight_bytes" else 1
        return counting.parameters(self.layouts, sizes) * per_parameter

    def check(self, spec: SubnetSpec) -> None:
        """Check that a spec can be cut out of this model.

        Raises:
            UserError: an axis is malformed, head channels are parted from their rotary partners, or
                the model is a layer-wise student itself.
        """
        if self.is_layerwise:
            raise UserError(
                "the teacher is a layer-wise student, and sub-networks are cut out of stock models "
                "only; choose the model that it was cut from"
            )
        spec.validate(self.sizes)
        if spec.head_dim is not None:
            kept_pairs(self.config.rope_parameters, self.sizes["head_dim"], spec.head_dim)

    def student(self, spec: SubnetSpec, with_rope: bool = True) -> Architecture:
        """The architecture of the student that a spec cuts out of this model.

        It is a stock one where the family's own code can express the shape, else a layer-wise one
        of `headstart.model.modeling`.

        Args:
            spec: what is kept.
            with_rope: False leaves the teacher's rotary positions, for a caller who sets the
                frequencies of narrower heads itself.

        Raises:
            UserError: the spec does not fit, or no rotary parameters give its frequencies.
        """
        self.check(spec)
        sizes = spec.sizes(self.sizes)
        entries = self.config.to_dict()
        if entries.get("layer_types"):
            entries["layer_types"] = [entries["layer_types"][layer] for layer in spec.layers]
        if spec.head_dim is not None and with_rope:
            rope, head_dim = self.config.rope_parameters, self.sizes["head_dim"]
            entries["rope_parameters"] = student_rope(rope, head_dim, spec.head_dim)
        if not stock_obstacle(self.family, sizes):
            values = config_values(self.family.config, sizes)
            return Architecture.of(type(self.config).from_dict(entries | values))

        pairs = layerwise_pairs(self.family.config)
        of_layers = [config_values(pairs, sizes_in_layer(sizes, i)) for i in range(sizes["layers"])]
        # The largest stands for all where layers differ; nothing of transformers reads it.
        shared = {key: max(values[key] for values in of_layers) for key in of_layers[0]}
        differing = {
            layer: {key: value for key, value in values.items() if value != shared[key]}
            for layer, values in enumerate(of_layers)
            if values != shared
        }
        if differing:
            entries["per_layer_config"] = differing
        return Architecture.of(layerwise_config(self.family.name, entries | shared))


def _is_size(size: Any) -> bool:
    """Whether something can be the size of an axis, or a tuple of sizes, one for each layer."""
    return min(size, default=0) > 0 if isinstance(size, tuple) else size > 0


def _known_family(model_type: Any) -> Family:
    name = str(model_type).removeprefix(PREFIX)
    if name not in FAMILIES:
        raise UserError(
            f"model_type {name!r} is not a family that headstart knows "
            f"({', '.join(sorted(FAMILIES))}); choose a teacher of one of these, or add a table "
            "as CONTRIBUTING.md shows"
        )
    return FAMILIES[name]


@cache
def _rules(family_name: str) -> Mapping[str, Rule]:
    rules = {}
    for pattern, text in FAMILIES[family_name].tensors.items():
        found = re.fullmatch(r"(.*?)(?: (if|unless) (\w+))?", text)
        assert found
        rules[pattern] = Rule(pattern, found[1], found[2] or "", found[3] or "")
    return rules


def _sizes(config: PreTrainedConfig, pairs: ConfigPairs) -> dict[str, Any]:
    if not config.is_heterogeneous:
        return _sizes_of_layer(config, pairs)
    of_layers = [_sizes_of_layer(layer, pairs) for layer in config.per_layer_config]
    return {
        axis: size
        if all(sizes[axis] == size for sizes in of_layers)
        else tuple(sizes[axis] for sizes in of_layers)
        for axis, size in of_layers[0].items()
    }


def _sizes_of_layer(config: PreTrainedConfig, pairs: ConfigPairs) -> dict[str, int]:
    """The size of every axis, by a config that all layers share or that one layer has."""
    sizes: dict[str, int] = {}
    for key, layout in pairs:
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
