"""Causal language models whose layers differ in size, on transformers' own layers.

This file travels inside checkpoints, named by their `auto_map`, so it imports torch and
transformers only. Shapes stand in the config key `per_layer_config`: for each layer, what differs
from the rest of the config, such as `{"0": {"intermediate_size": 512, "num_attention_heads": 4}}`.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn

NEEDED = (5, 17)
"""The oldest transformers whose configs know `per_layer_config`."""

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < NEEDED:
    raise ImportError(
        f"this model's layers differ in size, which needs transformers {NEEDED[0]}.{NEEDED[1]} or "
        f"newer, and this is {transformers.__version__}; upgrade it, or write a stock checkpoint "
        "by `headstart export --to hf --pad`"
    )

from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class Layerwise:
    """Gives a stock model layers that are each built from a config of their own."""

    layer_class: type[nn.Module]

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        without_layers = copy.copy(config)
        without_layers.per_layer_config = None
        without_layers.num_hidden_layers = 0
        super().__init__(without_layers)  # type: ignore[call-arg]
        model: Any = self
        # Chosen by the stock constructor, for the layers to read from the one config of them all.
        config._attn_implementation_internal = model.config._attn_implementation_internal
        model.config = model.base_model.config = config
        layers = (
            self.build_layer(config.per_layer_config[index], index)
            for index in range(config.num_hidden_layers)
        )
        model.base_model.layers = nn.ModuleList(layers)
        for module in model.base_model.layers.modules():
            if hasattr(module, "config"):
                module.config = self.shared_config(module.config)
        model.base_model.post_init()
        model.post_init()

    def build_layer(self, config: transformers.PreTrainedConfig, index: int) -> nn.Module:
        return self.layer_class(config, index)

    def shared_config(self, of_layer: transformers.PreTrainedConfig) -> Any:
        """What a module of a layer reads while it runs, in place of the config that built it."""
        return self.config  # type: ignore[attr-defined]


class AnyShape:
    """For configs that the stock code would check for one size of all layers."""

    def validate(self) -> None:
        pass


class LayerwiseLlamaConfig(AnyShape, transformers.LlamaConfig):  # type: ignore[misc]
    model_type = "headstart_llama"


class LayerwiseLlamaForCausalLM(Layerwise, transformers.LlamaForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseLlamaConfig
    layer_class = LlamaDecoderLayer


class LayerwiseMistralConfig(AnyShape, transformers.MistralConfig):  # type: ignore[misc]
    model_type = "headstart_mistral"


class LayerwiseMistralForCausalLM(Layerwise, transformers.MistralForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseMistralConfig
    layer_class = MistralDecoderLayer


class LayerwiseQwen2Config(AnyShape, transformers.Qwen2Config):  # type: ignore[misc]
    model_type = "headstart_qwen2"


class LayerwiseQwen2ForCausalLM(Layerwise, transformers.Qwen2ForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseQwen2Config
    layer_class = Qwen2DecoderLayer


class LayerwiseQwen3Config(AnyShape, transformers.Qwen3Config):  # type: ignore[misc]
    model_type = "headstart_qwen3"


class LayerwiseQwen3ForCausalLM(Layerwise, transformers.Qwen3ForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseQwen3Config
    layer_class = Qwen3DecoderLayer


class LayerwiseGemma3Config(AnyShape, transformers.Gemma3TextConfig):  # type: ignore[misc]
    model_type = "headstart_gemma3_text"


class LayerwiseGemma3ForCausalLM(Layerwise, transformers.Gemma3ForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseGemma3Config
    layer_class = Gemma3DecoderLayer


class LayerwiseOlmo2Config(AnyShape, transformers.Olmo2Config):  # type: ignore[misc]
    model_type = "headstart_olmo2"


class LayerwiseOlmo2ForCausalLM(Layerwise, transformers.Olmo2ForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseOlmo2Config
    layer_class = Olmo2DecoderLayer


class LayerwisePhi3Config(AnyShape, transformers.Phi3Config):  # type: ignore[misc]
    model_type = "headstart_phi3"
    head_dim: int | None = None  # for which the stock config has no key


class LayerwisePhi3ForCausalLM(Layerwise, transformers.Phi3ForCausalLM):  # type: ignore[misc]
    config_class = LayerwisePhi3Config
    layer_class = Phi3DecoderLayer

    def shared_config(self, of_layer: transformers.PreTrainedConfig) -> Any:
        # The stock attention tells queries from keys by a number of heads in its config.
        return WithHeads(self.config, of_layer.num_attention_heads)


class WithHeads:
    """A config shared by all layers, but for the number of heads of one."""

    def __init__(self, config: transformers.PreTrainedConfig, num_attention_heads: int) -> None:
        self.config, self.num_attention_heads = config, num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # asked for before it is set, by copy
            raise AttributeError(name)
        return getattr(self.config, name)


class LayerwiseGPTNeoXConfig(AnyShape, transformers.GPTNeoXConfig):  # type: ignore[misc]
    model_type = "headstart_gpt_neox"
    head_dim: int | None = None  # for which the stock config has no key


class LayerwiseGPTNeoXForCausalLM(Layerwise, transformers.GPTNeoXForCausalLM):  # type: ignore[misc]
    config_class = LayerwiseGPTNeoXConfig
    layer_class = GPTNeoXLayer

    def build_layer(self, config: transformers.PreTrainedConfig, index: int) -> nn.Module:
        # The stock attention is as wide as the residual stream; this one as its heads together.
        of_heads = copy.copy(config)
        of_heads.hidden_size = config.num_attention_heads * config.head_dim
        layer: Any = super().build_layer(config, index)
        attention: Any = GPTNeoXAttention(of_heads, index)
        fused, bias = attention.query_key_value.out_features, config.attention_bias
        attention.query_key_value = nn.Linear(config.hidden_size, fused, bias=bias)
        attention.dense = nn.Linear(of_heads.hidden_size, config.hidden_size, bias=bias)
        layer.attention = attention
        return layer  # type: ignore[no-any-return]


MODELS = (
    LayerwiseLlamaForCausalLM,
    LayerwiseMistralForCausalLM,
    LayerwiseQwen2ForCausalLM,
    LayerwiseQwen3ForCausalLM,
    LayerwiseGemma3ForCausalLM,
    LayerwiseOlmo2ForCausalLM,
    LayerwisePhi3ForCausalLM,
    LayerwiseGPTNeoXForCausalLM,
)

for _model in MODELS:
    _model.register_for_auto_class("AutoModelForCausalLM")
    _model.config_class.register_for_auto_class("AutoConfig")
