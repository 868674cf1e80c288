"""What a sub-network must compute, told without the code that cuts it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from headstart.model.architecture import Architecture
from headstart.model.rotary import head_channels
from headstart.model.spec import SubnetSpec


def random_spec(model: PreTrainedModel, seed: int = 0, **cut: int) -> SubnetSpec:
    """Random indices, others in every layer; an axis without a size is kept whole.

    Heads are the exception: `head_dim` keeps the channels that a candidate of this size would.
    """
    generator = random.Random(seed)
    sizes = Architecture.of(model.config).sizes

    def pick(axis: str) -> tuple[int, ...]:
        return tuple(sorted(generator.sample(range(sizes[axis]), cut.get(axis, sizes[axis]))))

    layers, embed = pick("layers"), pick("embed")
    kv_groups = tuple(pick("kv_groups") for _ in layers)
    channels = None
    if "head_dim" in cut:
        channels = head_channels(model.config.rope_parameters, sizes["head_dim"], cut["head_dim"])
    return SubnetSpec(layers, embed, kv_groups, tuple(pick("mlp") for _ in layers), channels)


def random_layerwise_spec(model: PreTrainedModel, seed: int, **cut: int) -> SubnetSpec:
    """The same, with another random number of groups and neurons in every layer."""
    generator = random.Random(seed)
    spec = random_spec(model, seed, **cut)

    def thinned(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(generator.sample(units, generator.randint(1, len(units)))))

    return replace(
        spec,
        kv_groups=tuple(map(thinned, spec.kv_groups)),
        mlp=tuple(map(thinned, spec.mlp)),
    )


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of any config in eval mode, with random norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def with_rope(model: PreTrainedModel, **rope: object) -> PreTrainedModel:
    """The same weights under other rotary positions."""
    config = model.config.to_dict()
    config["rope_parameters"] = config["rope_parameters"] | rope
    other = type(model)(type(model.config).from_dict(config))
    other.load_state_dict(model.state_dict())
    return other.eval()


def assert_same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@torch.no_grad()
def masked_parent(model: PreTrainedModel, spec: SubnetSpec) -> PreTrainedModel:
    """The whole teacher with zeros where what is dropped would write to the residual stream.

    Dropped channels of heads are zeros in queries, keys and values, so that no score sees them.
    It says nothing about dropped residual channels, which change the mean inside the norms.
    """
    model = copy.deepcopy(model)
    sizes = Architecture.of(model.config).sizes
    head_dim = sizes["head_dim"]
    channels = [] if spec.head_dim is None else _dropped(head_dim, spec.head_dim)
    for number, layer in enumerate(model.base_model.layers):
        if model.config.model_type != "gpt_neox":
            attention, mlp = layer.self_attn.o_proj, layer.mlp.down_proj
            readers = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        else:
            attention, mlp = layer.attention.dense, layer.mlp.dense_4h_to_h
            readers = [layer.attention.query_key_value]
        for parameter in (weight for reader in readers for weight in reader.parameters()):
            parameter.unflatten(0, (-1, head_dim))[:, channels] = 0
        if number not in spec.layers:
            for parameter in (*attention.parameters(), *mlp.parameters()):
                parameter.zero_()
            continue
        position = spec.layers.index(number)
        by_group = attention.weight.unflatten(1, (sizes["kv_groups"], -1))
        by_group[:, _dropped(by_group.shape[1], spec.kv_groups[position])] = 0
        mlp.weight[:, _dropped(mlp.in_features, spec.mlp[position])] = 0
    return model


def _dropped(size: int, kept: Iterable[int]) -> list[int]:
    return sorted(set(range(size)) - set(kept))


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: Tensor, spec: SubnetSpec) -> Tensor:
    """The sub-network's logits in float64, from the teacher's whole weights.

    Dropped channels, heads and neurons are multiplied by zero, dropped layers are skipped, and
    norms average over the kept channels. Nothing is sliced: a narrowed head is a whole one with
    zeros, so its pairs turn by the teacher's frequencies and its scores are divided by the root of
    the teacher's head size.
    """
    is_neox = model.config.model_type == "gpt_neox"
    forward = _gpt_neox_logits if is_neox else _decoder_logits
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    sizes = Architecture.of(model.config).sizes
    for name in [name for name in weights if "qkv_proj" in name]:
        rows = [sizes["kv_groups"] * sizes["head_dim"]] * 2
        fused = weights.pop(name)
        for part, tensor in zip("qkv", fused.split([len(fused) - sum(rows), *rows]), strict=True):
            weights[name.replace("qkv", part)] = tensor
    for name in [name for name in weights if "gate_up_proj" in name]:
        for part, tensor in zip(("gate", "up"), weights.pop(name).chunk(2), strict=True):
            weights[name.replace("gate_up", part)] = tensor
    return forward(model.config, weights, tokens, spec)


def _decoder_logits(config, weights, tokens, spec):
    """Llama and its descendants, told apart by which tensors there are and by the config."""
    keep = _mask(config.hidden_size, spec.embed)
    head_dim = Architecture.of(config).sizes["head_dim"]
    channels = _mask(head_dim, spec.head_dim or range(head_dim))
    is_gemma = config.model_type == "gemma3_text"

    def norm(x, name, mask=keep):
        if f"{name}.weight" not in weights:
            return x
        mean_square = (x * mask).square().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        weight = weights[f"{name}.weight"] + is_gemma
        return x / (mean_square + config.rms_norm_eps).sqrt() * weight * mask

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def heads(x, name, kept, norm_name):
        x = linear(x, name)
        of_groups = kept.repeat_interleave(x.shape[-1] // head_dim // len(kept))
        mask = of_groups[:, None] * channels
        if config.model_type == "olmo2":
            x = norm(x, norm_name, mask.flatten())  # over all heads
        x = x.unflatten(-1, (-1, head_dim))
        if config.model_type != "olmo2":
            x = norm(x, norm_name, channels)  # over each head, if there is one
        x = x.transpose(1, 2) * channels
        return x.repeat_interleave(config.num_attention_heads // x.shape[1], dim=1)

    x = weights["model.embed_tokens.weight"][tokens] * keep
    if is_gemma:
        x = x * config.hidden_size**0.5
    for layer, groups, neurons in zip(spec.layers, spec.kv_groups, spec.mlp, strict=True):
        name = f"model.layers.{layer}"
        kind = config.layer_types[layer] if getattr(config, "layer_types", None) else ""
        window = getattr(config, "sliding_window", None) if kind != "full_attention" else None
        rope = config.rope_parameters.get(kind, config.rope_parameters)
        kept = _mask(config.num_key_value_heads, groups)
        read = norm(x, f"{name}.input_layernorm")
        query, key = (
            heads(read, f"{name}.self_attn.{a}_proj", kept, f"{name}.self_attn.{a}_norm")
            for a in "qk"
        )
        value = heads(read, f"{name}.self_attn.v_proj", kept, "")
        width = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        query, key = (_rotate_first(x, width, rope["rope_theta"]) for x in (query, key))
        scale = config.query_pre_attn_scalar**-0.5 if is_gemma else None
        mixed = _attend(query, key, value, scale, window)
        kept = kept.repeat_interleave(config.num_attention_heads // len(kept))
        mixed = (mixed * kept[:, None, None]).transpose(1, 2).flatten(2)
        mixed = linear(mixed, f"{name}.self_attn.o_proj") * keep
        norms_after = f"{name}.post_feedforward_layernorm.weight" in weights
        if norms_after:
            mixed = norm(mixed, f"{name}.post_attention_layernorm")
        x = x + mixed
        before = "pre_feedforward_layernorm" if norms_after else "post_attention_layernorm"
        read = norm(x, f"{name}.{before}")
        gate = linear(read, f"{name}.mlp.gate_proj")
        gate = F.gelu(gate, approximate="tanh") if is_gemma else F.silu(gate)
        neuron = gate * linear(read, f"{name}.mlp.up_proj")
        neuron = neuron * _mask(config.intermediate_size, neurons)
        neuron = linear(neuron, f"{name}.mlp.down_proj") * keep
        x = x + norm(neuron, f"{name}.post_feedforward_layernorm")
    return linear(norm(x, "model.norm"), "lm_head")


def _gpt_neox_logits(config, weights, tokens, spec):
    keep = _mask(config.hidden_size, spec.embed)
    head_dim = config.hidden_size // config.num_attention_heads
    channels = _mask(head_dim, spec.head_dim or range(head_dim))

    def norm(x, name):
        centred = (x - x.sum(-1, keepdim=True) / keep.sum()) * keep
        variance = centred.square().sum(-1, keepdim=True) / keep.sum()
        scaled = centred / (variance + config.layer_norm_eps).sqrt() * weights[f"{name}.weight"]
        return (scaled + weights[f"{name}.bias"]) * keep

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotate(x):
        width = int(head_dim * config.rope_parameters["partial_rotary_factor"])
        return _rotate_first(x, width, config.rope_parameters["rope_theta"])

    def attention(x, name, groups):
        fused = linear(x, f"{name}.query_key_value").unflatten(-1, (-1, 3, head_dim))
        query, key, value = fused.permute(3, 0, 2, 1, 4) * channels
        mixed = _attend(rotate(query), rotate(key), value)
        mixed = mixed * _mask(config.num_attention_heads, groups)[:, None, None]
        return linear(mixed.transpose(1, 2).flatten(2), f"{name}.dense") * keep

    def mlp(x, name, neurons):
        neuron = F.gelu(linear(x, f"{name}.dense_h_to_4h"))
        neuron = neuron * _mask(config.intermediate_size, neurons)
        return linear(neuron, f"{name}.dense_4h_to_h") * keep

    x = weights["gpt_neox.embed_in.weight"][tokens] * keep
    for layer, groups, neurons in zip(spec.layers, spec.kv_groups, spec.mlp, strict=True):
        name = f"gpt_neox.layers.{layer}"
        after = x + attention(norm(x, f"{name}.input_layernorm"), f"{name}.attention", groups)
        read = x if config.use_parallel_residual else after
        x = after + mlp(norm(read, f"{name}.post_attention_layernorm"), f"{name}.mlp", neurons)
    return linear(norm(x, "gpt_neox.final_layer_norm"), "lm_head")


def _mask(size: int, kept: Iterable[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.float64)
    mask[list(kept)] = 1
    return mask


def _rotate_first(x: Tensor, width: int, theta: float) -> Tensor:
    """Rotary positions for the first channels of a head; the others do not turn."""
    return torch.cat((_rotate(x[..., :width], theta), x[..., width:]), dim=-1)


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: channel i and channel i + width / 2 make one."""
    width = x.shape[-1]
    speed = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Each token sees itself and those before it, at most a window of them together."""
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    age = torch.arange(query.shape[-2])[:, None] - torch.arange(query.shape[-2])
    unseen = (age < 0) | (age >= (window or len(age)))
    return scores.masked_fill(unseen, -math.inf).softmax(-1) @ value
