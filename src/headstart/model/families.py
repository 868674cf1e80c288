"""The model families, as tables of axes. Data only; everything else in headstart reads them.

A rule maps a checkpoint tensor's name to its layout. `{i}` stands for the layer. A rule may end in
"if KEY" or "unless KEY": the tensor is there only when that key of the model's config is true, or
false. DROPPED marks buffers that old checkpoints carry and transformers computes afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

DROPPED = "dropped"


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: `model_type` in the model's config.
        tensors: tensor name pattern -> layout, see this module's docstring.
        config: (config key, layout) pairs; the key's value is the product of the layout's axes. A
            key that stands twice ties two products together: only sub-networks in which they
            agree can be written as a stock checkpoint.
        layer: module name pattern of a layer, whose input and output score the depth axis.
        importance_sites: axis -> linear modules whose input has that axis as its units.
        readers: norm -> the linear layers that read what it wrote, and nothing else does; norms
            that are not in it write into the residual stream, or into queries and keys.
        queries: tensors to which scores are proportional: all of them, or the first of what the
            tensor fuses; none where scores are not divided by the root of the head size.
        divides: (divisor, dividend) pairs of config keys which the stock code insists on.
        scaled_embedding: the embedding that the stock code multiplies by the root of its width, and
            the last norm, whose weight is added to one; None where it takes embeddings as they are.
        norm_offset: what the stock code adds to the weights of norms.
        aliases: name in a file -> name in the model, where the two differ.
        old_names: entry of `rope_parameters` -> what transformers 4 calls it, where the two differ;
            None where it takes it from elsewhere.
    """

    name: str
    tensors: Mapping[str, str]
    config: tuple[tuple[str, str], ...]
    layer: str
    importance_sites: Mapping[str, tuple[str, ...]]
    readers: Mapping[str, tuple[str, ...]]
    queries: tuple[str, ...]
    divides: tuple[tuple[str, str], ...] = ()
    scaled_embedding: tuple[str, str] | None = None
    norm_offset: float = 0.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    old_names: Mapping[str, str | None] = field(default_factory=dict)


DECODER = {
    "model.embed_tokens.weight": "vocab embed",
    "model.layers.{i}.self_attn.q_proj.weight": "(kv_groups q_per_kv head_dim) embed",
    "model.layers.{i}.self_attn.k_proj.weight": "(kv_groups head_dim) embed",
    "model.layers.{i}.self_attn.v_proj.weight": "(kv_groups head_dim) embed",
    "model.layers.{i}.self_attn.o_proj.weight": "embed (kv_groups q_per_kv head_dim)",
    "model.layers.{i}.post_attention_layernorm.weight": "embed",
    "model.layers.{i}.mlp.gate_proj.weight": "mlp embed",
    "model.layers.{i}.mlp.up_proj.weight": "mlp embed",
    "model.layers.{i}.mlp.down_proj.weight": "embed mlp",
    "model.norm.weight": "embed",
    "lm_head.weight": "vocab embed unless tie_word_embeddings",
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": DROPPED,
}
"""What Llama and its descendants share."""

INPUT_NORM = {"model.layers.{i}.input_layernorm.weight": "embed"}

ATTENTION_BIASES = {
    "model.layers.{i}.self_attn.q_proj.bias": "(kv_groups q_per_kv head_dim) if attention_bias",
    "model.layers.{i}.self_attn.k_proj.bias": "(kv_groups head_dim) if attention_bias",
    "model.layers.{i}.self_attn.v_proj.bias": "(kv_groups head_dim) if attention_bias",
    "model.layers.{i}.self_attn.o_proj.bias": "embed if attention_bias",
}

HEAD_NORMS = {
    "model.layers.{i}.self_attn.q_norm.weight": "head_dim",
    "model.layers.{i}.self_attn.k_norm.weight": "head_dim",
}
"""Each head's queries and keys normalised by themselves."""

DECODER_CONFIG = (
    ("vocab_size", "vocab"),
    ("num_hidden_layers", "layers"),
    ("hidden_size", "embed"),
    ("num_key_value_heads", "kv_groups"),
    ("num_attention_heads", "(kv_groups q_per_kv)"),
    ("head_dim", "head_dim"),
    ("intermediate_size", "mlp"),
)

DECODER_SITES = {
    "embed": ("model.layers.{i}.self_attn.q_proj", "model.layers.{i}.mlp.gate_proj"),
    "kv_groups": ("model.layers.{i}.self_attn.o_proj",),
    "mlp": ("model.layers.{i}.mlp.down_proj",),
}

ATTENTION_READERS = (
    "model.layers.{i}.self_attn.q_proj.weight",
    "model.layers.{i}.self_attn.k_proj.weight",
    "model.layers.{i}.self_attn.v_proj.weight",
)

MLP_READERS = ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight")

LAST_READER = {"model.norm.weight": ("lm_head.weight",)}

DECODER_READERS = LAST_READER | {
    "model.layers.{i}.input_layernorm.weight": ATTENTION_READERS,
    "model.layers.{i}.post_attention_layernorm.weight": MLP_READERS,
}

LLAMA = Family(
    name="llama",
    tensors=DECODER
    | INPUT_NORM
    | ATTENTION_BIASES
    | {
        "model.layers.{i}.mlp.gate_proj.bias": "mlp if mlp_bias",
        "model.layers.{i}.mlp.up_proj.bias": "mlp if mlp_bias",
        "model.layers.{i}.mlp.down_proj.bias": "embed if mlp_bias",
    },
    config=DECODER_CONFIG,
    divides=(("num_attention_heads", "hidden_size"),),
    layer="model.layers.{i}",
    importance_sites=DECODER_SITES,
    readers=DECODER_READERS,
    queries=(
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.q_proj.bias",
    ),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    tensors=DECODER | INPUT_NORM,
    divides=(),
    queries=("model.layers.{i}.self_attn.q_proj.weight",),
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    tensors=DECODER
    | INPUT_NORM
    | {
        "model.layers.{i}.self_attn.q_proj.bias": "(kv_groups q_per_kv head_dim)",
        "model.layers.{i}.self_attn.k_proj.bias": "(kv_groups head_dim)",
        "model.layers.{i}.self_attn.v_proj.bias": "(kv_groups head_dim)",
    },
    divides=(),
)

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    tensors=DECODER | INPUT_NORM | ATTENTION_BIASES | HEAD_NORMS,
    divides=(),
    queries=("model.layers.{i}.self_attn.q_norm.weight",),
)

GEMMA3 = replace(
    LLAMA,
    name="gemma3_text",
    tensors=DECODER
    | INPUT_NORM
    | ATTENTION_BIASES
    | HEAD_NORMS
    | {
        "model.layers.{i}.pre_feedforward_layernorm.weight": "embed",
        "model.layers.{i}.post_feedforward_layernorm.weight": "embed",
    },
    readers=LAST_READER
    | {
        "model.layers.{i}.input_layernorm.weight": ATTENTION_READERS,
        "model.layers.{i}.pre_feedforward_layernorm.weight": MLP_READERS,
    },
    queries=(),  # its scores are divided by a number of the config, whatever the head size
    scaled_embedding=("model.embed_tokens.weight", "model.norm.weight"),
    norm_offset=1.0,
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    tensors=DECODER
    | ATTENTION_BIASES
    | {
        "model.layers.{i}.post_feedforward_layernorm.weight": "embed",
        "model.layers.{i}.self_attn.q_norm.weight": "(kv_groups q_per_kv head_dim)",
        "model.layers.{i}.self_attn.k_norm.weight": "(kv_groups head_dim)",
    },
    divides=(),
    readers=LAST_READER,
    queries=("model.layers.{i}.self_attn.q_norm.weight",),
    old_names={"rope_type": "type"},
)

PHI3 = Family(
    name="phi3",
    tensors={
        "model.embed_tokens.weight": "vocab embed",
        "model.layers.{i}.input_layernorm.weight": "embed",
        "model.layers.{i}.self_attn.qkv_proj.weight": (
            "(kv_groups q_per_kv head_dim) embed"
            " + (kv_groups head_dim) embed + (kv_groups head_dim) embed"
        ),
        "model.layers.{i}.self_attn.o_proj.weight": "embed (kv_groups q_per_kv head_dim)",
        "model.layers.{i}.post_attention_layernorm.weight": "embed",
        "model.layers.{i}.mlp.gate_up_proj.weight": "(2 mlp) embed",
        "model.layers.{i}.mlp.down_proj.weight": "embed mlp",
        "model.norm.weight": "embed",
        "lm_head.weight": "vocab embed unless tie_word_embeddings",
        "model.layers.{i}.self_attn.rotary_emb.inv_freq": DROPPED,
    },
    config=(
        ("vocab_size", "vocab"),
        ("num_hidden_layers", "layers"),
        ("hidden_size", "embed"),
        ("num_key_value_heads", "kv_groups"),
        ("num_attention_heads", "(kv_groups q_per_kv)"),
        ("hidden_size", "(kv_groups q_per_kv head_dim)"),
        ("intermediate_size", "mlp"),
    ),
    layer="model.layers.{i}",
    importance_sites={
        "embed": ("model.layers.{i}.self_attn.qkv_proj", "model.layers.{i}.mlp.gate_up_proj"),
        "kv_groups": ("model.layers.{i}.self_attn.o_proj",),
        "mlp": ("model.layers.{i}.mlp.down_proj",),
    },
    readers=LAST_READER
    | {
        "model.layers.{i}.input_layernorm.weight": ("model.layers.{i}.self_attn.qkv_proj.weight",),
        "model.layers.{i}.post_attention_layernorm.weight": (
            "model.layers.{i}.mlp.gate_up_proj.weight",
        ),
    },
    queries=("model.layers.{i}.self_attn.qkv_proj.weight",),
    old_names={"rope_type": "type", "original_max_position_embeddings": None},
)

GPT_NEOX = Family(
    name="gpt_neox",
    tensors={
        "gpt_neox.embed_in.weight": "vocab embed",
        "gpt_neox.layers.{i}.input_layernorm.weight": "embed",
        "gpt_neox.layers.{i}.input_layernorm.bias": "embed",
        "gpt_neox.layers.{i}.post_attention_layernorm.weight": "embed",
        "gpt_neox.layers.{i}.post_attention_layernorm.bias": "embed",
        "gpt_neox.layers.{i}.attention.query_key_value.weight": "(kv_groups 3 head_dim) embed",
        "gpt_neox.layers.{i}.attention.query_key_value.bias": (
            "(kv_groups 3 head_dim) if attention_bias"
        ),
        "gpt_neox.layers.{i}.attention.dense.weight": "embed (kv_groups head_dim)",
        "gpt_neox.layers.{i}.attention.dense.bias": "embed if attention_bias",
        "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight": "mlp embed",
        "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias": "mlp",
        "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight": "embed mlp",
        "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias": "embed",
        "gpt_neox.final_layer_norm.weight": "embed",
        "gpt_neox.final_layer_norm.bias": "embed",
        "lm_head.weight": "vocab embed unless tie_word_embeddings",
        "gpt_neox.layers.{i}.attention.bias": DROPPED,
        "gpt_neox.layers.{i}.attention.masked_bias": DROPPED,
        "gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": DROPPED,
    },
    config=(
        ("vocab_size", "vocab"),
        ("num_hidden_layers", "layers"),
        ("hidden_size", "embed"),
        ("num_attention_heads", "kv_groups"),
        ("hidden_size", "(kv_groups head_dim)"),
        ("intermediate_size", "mlp"),
    ),
    layer="gpt_neox.layers.{i}",
    importance_sites={
        "embed": (
            "gpt_neox.layers.{i}.attention.query_key_value",
            "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        ),
        "kv_groups": ("gpt_neox.layers.{i}.attention.dense",),
        "mlp": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",),
    },
    readers={
        "gpt_neox.layers.{i}.input_layernorm.weight": (
            "gpt_neox.layers.{i}.attention.query_key_value.weight",
        ),
        "gpt_neox.layers.{i}.post_attention_layernorm.weight": (
            "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight",
        ),
        "gpt_neox.final_layer_norm.weight": ("lm_head.weight",),
    },
    queries=(
        "gpt_neox.layers.{i}.attention.query_key_value.weight",
        "gpt_neox.layers.{i}.attention.query_key_value.bias",
    ),
    aliases={"embed_out.weight": "lm_head.weight"},
    old_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
)

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, OLMO2, PHI3, GPT_NEOX)
}
