"""Importance equals what modules named one by one give: their activations, weights and slopes."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headstart.searching.importance import (
    DepthImportance,
    Importance,
    UnitImportance,
    measure_importance,
    remembered_importance,
)

NUM_LAYERS = 4
NUM_BLOCKS, BLOCK_LENGTH = 6, 20
NORMS = ("input_layernorm", "post_attention_layernorm")
MODULES = {  # what mixes the heads, and what mixes the neurons
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}

one_of_each_family = pytest.mark.parametrize(
    "teacher", ["llama-tied-gqa", "gpt_neox-untied"], indirect=True
)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(128, (NUM_BLOCKS, BLOCK_LENGTH), generator=torch.manual_seed(1))


def wrapped(module: nn.Module, use: Callable[[Tensor, Tensor], None]) -> None:
    """Let `use` see a module's input and output, without torch's hooks."""
    forward = module.forward

    def seen(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden, *args, **kwargs)
        use(hidden, output)
        return output

    module.forward = seen  # type: ignore[method-assign]


def mean_magnitude(activations: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().abs().flatten(0, -2) for tensor in activations]).mean(dim=0)


@torch.no_grad()
def importance_by_hand(teacher: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    config, base = teacher.config, teacher.base_model
    seen: dict[tuple[int, str], list[Tensor]] = {}
    mixers = MODULES[config.model_type]
    for index, layer in enumerate(base.layers):
        for name in NORMS:
            kept = seen.setdefault((index, name), [])
            wrapped(layer.get_submodule(name), lambda _, after, kept=kept: kept.append(after))
        for name in mixers:
            kept = seen.setdefault((index, name), [])
            wrapped(layer.get_submodule(name), lambda before, _, kept=kept: kept.append(before))

    hidden = list(base(tokens, output_hidden_states=True, use_cache=False).hidden_states)
    scores = {
        axis: torch.stack([mean_magnitude(seen[index, name]) for index in range(NUM_LAYERS)])
        for axis, name in zip(("kv_groups", "mlp"), mixers, strict=True)
    }
    num_groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    scores["kv_groups"] = torch.stack(
        [part.mean(dim=1) for part in scores["kv_groups"].chunk(num_groups, dim=1)], dim=1
    )
    scores["embed"] = mean_magnitude(
        [tensor for key in seen if key[1] in NORMS for tensor in seen[key]]
    )

    # The last hidden state has been through the final norm: take the last layer's output anew.
    positions = torch.arange(tokens.shape[1])[None]
    rotary = base.rotary_emb(hidden[-2], position_ids=positions)
    last = base.layers[-1](hidden[-2], position_embeddings=rotary)
    final_norm = base.norm if config.model_type == "llama" else base.final_layer_norm
    torch.testing.assert_close(final_norm(last), hidden[-1])
    hidden[-1] = last
    scores["layers"] = torch.stack(
        [
            1 - ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
            for a, b in itertools.pairwise(states.double() for states in hidden)
        ]
    )
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_equals_activations_taken_by_hand(
    teacher: PreTrainedModel, tokens: Tensor, dtype: torch.dtype
) -> None:
    teacher.to(dtype)
    found = measure_importance(teacher, [tokens])
    expected = importance_by_hand(teacher, tokens)
    for axis, scores in expected.items():
        torch.testing.assert_close(getattr(found, axis).double(), scores, rtol=1e-5, atol=1e-6)


def test_batches_of_any_sizes_give_one_result(teacher: PreTrainedModel, tokens: Tensor) -> None:
    num_tokens: list[int] = []
    whole = measure_importance(teacher, [tokens], on_batch=num_tokens.append)
    batches = iter(tokens.split([1, 3, 2]))
    uneven = measure_importance(teacher, batches, on_batch=num_tokens.append)
    assert num_tokens == [size * BLOCK_LENGTH for size in (6, 1, 3, 2)]
    for axis, scores in vars(whole).items():
        torch.testing.assert_close(getattr(uneven, axis), scores, rtol=1e-5, atol=1e-6)


@one_of_each_family
@pytest.mark.parametrize("kinds", [(), ("taylor", "magnitude"), ("magnitude", "taylor")])
def test_importance_needs_tokens(teacher: PreTrainedModel, kinds: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="at least one calibration block"):
        measure_importance(teacher, [], *kinds)


def test_a_unit_that_does_nothing_comes_last(teacher: PreTrainedModel, tokens: Tensor) -> None:
    reader = {"llama": "mlp.up_proj", "gpt_neox": "mlp.dense_h_to_4h"}[teacher.config.model_type]
    with torch.no_grad():
        for parameter in teacher.base_model.layers[2].get_submodule(reader).parameters():
            parameter[3] = 0
    assert measure_importance(teacher, [tokens]).orders().mlp[2][-1] == 3


def rows(module: nn.Module, index: int | slice) -> list[Tensor]:
    bias = getattr(module, "bias", None)
    return [tensor[index] for tensor in (module.weight, bias) if tensor is not None]


def columns(module: nn.Module, index: int | slice) -> list[Tensor]:
    return [module.weight[:, index]]


def neuron(teacher: PreTrainedModel, layer: int, unit: int) -> list[Tensor]:
    """Views of a neuron's weights."""
    mlp = teacher.base_model.layers[layer].mlp
    if teacher.config.model_type == "llama":
        return rows(mlp.gate_proj, unit) + rows(mlp.up_proj, unit) + columns(mlp.down_proj, unit)
    return rows(mlp.dense_h_to_4h, unit) + columns(mlp.dense_4h_to_h, unit)


def group(teacher: PreTrainedModel, layer: int, unit: int) -> list[Tensor]:
    """Views of the weights of a key/value group and its query heads."""
    config, block = teacher.config, teacher.base_model.layers[layer]
    if config.model_type == "gpt_neox":  # query, key and value of one head stand together
        size = config.hidden_size // config.num_attention_heads
        fused, out = (
            slice(3 * size * unit, 3 * size * (unit + 1)),
            slice(size * unit, size * unit + size),
        )
        return rows(block.attention.query_key_value, fused) + columns(block.attention.dense, out)
    size = config.head_dim
    width = size * config.num_attention_heads // config.num_key_value_heads
    head = slice(size * unit, size * (unit + 1))
    query_heads = slice(width * unit, width * (unit + 1))
    attention = block.self_attn
    keys_and_values = rows(attention.k_proj, head) + rows(attention.v_proj, head)
    queries = rows(attention.q_proj, query_heads)
    return keys_and_values + queries + columns(attention.o_proj, query_heads)


def channel(teacher: PreTrainedModel, unit: int) -> list[Tensor]:
    """Views of the weights of a channel of the residual stream."""
    base, config = teacher.base_model, teacher.config
    llama = config.model_type == "llama"
    found = columns(base.embed_tokens if llama else base.embed_in, unit)
    found += rows(base.norm if llama else base.final_layer_norm, unit)
    if not config.tie_word_embeddings:
        found += columns(teacher.lm_head, unit)
    for block in base.layers:
        found += rows(block.input_layernorm, unit) + rows(block.post_attention_layernorm, unit)
        if llama:
            attention, mlp = block.self_attn, block.mlp
            readers = [attention.q_proj, attention.k_proj, attention.v_proj]
            readers += [mlp.gate_proj, mlp.up_proj]
            writers = [attention.o_proj, mlp.down_proj]
        else:
            readers = [block.attention.query_key_value, block.mlp.dense_h_to_4h]
            writers = [block.attention.dense, block.mlp.dense_4h_to_h]
        found += [tensor for module in readers for tensor in columns(module, unit)]
        found += [tensor for module in writers for tensor in rows(module, unit)]
    return found


def norm_of(weights: list[Tensor]) -> float:
    return float(torch.cat([tensor.detach().double().flatten() for tensor in weights]).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_norm_of_a_units_weights(
    teacher: PreTrainedModel, dtype: torch.dtype
) -> None:
    teacher.to(dtype)
    found = measure_importance(teacher, [], "magnitude", "magnitude")
    expected = {
        "layers": [norm_of(list(block.parameters())) for block in teacher.base_model.layers],
        "embed": [norm_of(channel(teacher, unit)) for unit in range(len(found.embed))],
        "kv_groups": [
            [norm_of(group(teacher, layer, unit)) for unit in range(found.kv_groups.shape[1])]
            for layer in range(NUM_LAYERS)
        ],
        "mlp": [
            [norm_of(neuron(teacher, layer, unit)) for unit in range(found.mlp.shape[1])]
            for layer in range(NUM_LAYERS)
        ],
    }
    for axis, norms in expected.items():
        torch.testing.assert_close(getattr(found, axis), torch.tensor(norms), rtol=1e-6, atol=0)


def in_float64(teacher: PreTrainedModel) -> None:
    """Have a teacher compute in float64 throughout; Llama's norms go through float32."""
    teacher.double()
    for norm in (module for module in teacher.modules() if isinstance(module, LlamaRMSNorm)):
        norm.forward = lambda hidden, norm=norm: functional.rms_norm(
            hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon
        )


def slope(teacher: PreTrainedModel, tokens: Tensor, weights: list[Tensor]) -> float:
    """How the mean loss rises as weights are scaled up: d loss / d factor at factor 1."""
    before, losses = [tensor.clone() for tensor in weights], []
    for factor in (1 + 1e-4, 1 - 1e-4, 1.0):
        for tensor, old in zip(weights, before, strict=True):
            tensor.copy_(old * factor)
        logits = teacher(tokens, use_cache=False).logits[:, :-1]
        losses.append(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    return float(losses[0] - losses[1]) / 2e-4


def test_taylor_is_the_slope_of_the_loss_as_a_unit_is_scaled(
    teacher: PreTrainedModel, tokens: Tensor
) -> None:
    in_float64(teacher)
    batches = tokens.split([4, 2])
    found = measure_importance(teacher, batches, "taylor", "taylor")

    @torch.no_grad()
    def mean_slope(weights: list[Tensor]) -> Any:
        slopes = [abs(slope(teacher, batch, weights)) for batch in batches]
        return pytest.approx(sum(slopes) / len(slopes), rel=1e-5, abs=1e-9)

    for unit in (0, 7, 30, 47):
        assert float(found.embed[unit]) == mean_slope(channel(teacher, unit))
    for layer in (0, NUM_LAYERS - 1):
        for unit in (0, found.kv_groups.shape[1] - 1):
            assert float(found.kv_groups[layer, unit]) == mean_slope(group(teacher, layer, unit))
        for unit in (0, 33, found.mlp.shape[1] - 1):
            assert float(found.mlp[layer, unit]) == mean_slope(neuron(teacher, layer, unit))
    of_layers = found.kv_groups.sum(dim=1) + found.mlp.sum(dim=1)
    torch.testing.assert_close(found.layers, of_layers)


@one_of_each_family
def test_any_two_kinds_take_one_pass(teacher: PreTrainedModel, tokens: Tensor) -> None:
    with_gradients: list[bool] = []
    wrapped(teacher.base_model, lambda _, output: with_gradients.append(output[0].requires_grad))
    for units, depth in itertools.product(get_args(UnitImportance), get_args(DepthImportance)):
        with_gradients.clear()
        num_tokens: list[int] = []
        batches = iter(tokens.split([2, 4]))
        found = measure_importance(teacher, batches, units, depth, num_tokens.append)
        if units == depth == "magnitude":
            assert not with_gradients and not num_tokens and len(list(batches)) == 2
        else:
            assert with_gradients == ["taylor" in (units, depth)] * 2
            assert num_tokens == [2 * BLOCK_LENGTH, 4 * BLOCK_LENGTH]
        alone = measure_importance(teacher, tokens.split([2, 4]), units)
        assert torch.equal(found.mlp, alone.mlp) and torch.equal(found.embed, alone.embed)
        alone = measure_importance(teacher, tokens.split([2, 4]), "activation", depth)
        assert torch.equal(found.layers, alone.layers)


@torch.no_grad()
def test_a_contribution_is_what_a_layer_loses_without_the_unit(
    teacher: PreTrainedModel, tokens: Tensor
) -> None:
    """Root mean square of a neuron's part in the output of its linear layer, as it is computed."""
    in_float64(teacher)
    found = measure_importance(teacher, tokens.split([4, 2]), "contribution")
    name = MODULES[teacher.config.model_type][1]
    for layer in (0, NUM_LAYERS - 1):
        linear = teacher.base_model.layers[layer].get_submodule(name)
        seen: list[Tensor] = []
        wrapped(linear, lambda before, _, seen=seen: seen.append(before))
        teacher.base_model(tokens)
        for unit in (0, 33, linear.in_features - 1):
            without = seen[0].clone()
            without[..., unit] = 0
            lost = torch.nn.functional.linear(seen[0] - without, linear.weight)
            expected = lost.square().sum(-1).mean().sqrt().item()
            assert float(found.mlp[layer, unit]) == pytest.approx(expected, rel=1e-5)
    groups = MODULES[teacher.config.model_type][0]
    linear, seen = teacher.base_model.layers[1].get_submodule(groups), []
    wrapped(linear, lambda before, _: seen.append(before))
    teacher.base_model(tokens)
    parts = seen[0].square().mean(dim=(0, 1)) * linear.weight.square().sum(dim=0)
    of_groups = parts.unflatten(0, (found.kv_groups.shape[1], -1)).sum(dim=1).sqrt()
    torch.testing.assert_close(found.kv_groups[1].double(), of_groups, rtol=1e-5, atol=0)


KINDS = [
    ("contribution", "magnitude"),
    ("activation", "block_influence"),
    ("taylor", "magnitude"),
    ("activation", "taylor"),
]


@one_of_each_family
@pytest.mark.parametrize(("units", "depth"), KINDS)
def test_the_teacher_is_left_as_it_was(
    teacher: PreTrainedModel, tokens: Tensor, units: UnitImportance, depth: DepthImportance
) -> None:
    def failing() -> Iterator[Tensor]:
        yield tokens
        raise InterruptedError

    parameters = list(teacher.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for batches in ([tokens], failing()):
        with contextlib.suppress(InterruptedError):
            measure_importance(teacher, batches, units, depth)
        assert torch.is_grad_enabled()
        for module in teacher.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
        for index, parameter in enumerate(parameters):
            assert parameter.requires_grad == (index % 2 == 1)
            assert (parameter.grad is None) == (index != 1)
        assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
        for name, tensor in teacher.state_dict().items():
            assert torch.equal(tensor, before[name])


@one_of_each_family
@pytest.mark.parametrize(("units", "depth"), KINDS)
def test_no_batch_waits_for_the_device(
    teacher: PreTrainedModel,
    tokens: Tensor,
    units: UnitImportance,
    depth: DepthImportance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A meta tensor has no values, so whatever copies one to the host fails on the spot."""
    packed = "transformers.masking_utils.find_packed_sequence_indices"  # reads values itself
    monkeypatch.setattr(packed, lambda positions: None, raising=False)
    num_tokens: list[int] = []
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        measure_importance(teacher.to("meta"), tokens.split(2), units, depth, num_tokens.append)
    assert len(num_tokens) == 3


@pytest.fixture
def importance() -> Importance:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.manual_seed(len(shape)))

    return Importance(random(3), random(5), random(3, 2), random(3, 7))


KEY = {"teacher": "a1", "kinds": ["activation", "taylor"], "tokens": 64}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scores are kept."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "importance"


def assert_equal(found: Importance, expected: Importance) -> None:
    for axis, scores in vars(found).items():
        assert torch.equal(scores, getattr(expected, axis)) and scores.dtype == torch.float32


def test_importance_is_measured_once_for_a_key(folder: Path, importance: Importance) -> None:
    def unasked() -> Importance:
        raise AssertionError("measured anew")

    assert_equal(remembered_importance(KEY, lambda: importance), importance)
    reordered = dict(reversed(KEY.items()))
    assert_equal(remembered_importance(reordered, unasked), importance)
    other = Importance(*(2 * scores for scores in vars(importance).values()))
    assert_equal(remembered_importance({**KEY, "tokens": 65}, lambda: other), other)
    assert_equal(remembered_importance(KEY, unasked), importance)
    kept = [sorted(path.name for path in scores.iterdir()) for scores in folder.iterdir()]
    assert kept == [["key.json", "scores.safetensors"]] * 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b'"hash"', b'"hush"'),
    ],
    ids=["empty", "half", "cut", "flipped", "without-its-hash"],
)
def test_a_damaged_cache_is_measured_anew(
    folder: Path, importance: Importance, damage: Callable[[bytes], bytes]
) -> None:
    remembered_importance(KEY, lambda: importance)
    (path,) = folder.glob("*/scores.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    calls: list[None] = []

    def measure() -> Importance:
        calls.append(None)
        return importance

    for _ in range(2):
        assert_equal(remembered_importance(KEY, measure), importance)
    assert len(calls) == 1


def test_a_killed_measurement_leaves_no_cache(folder: Path) -> None:
    def killed() -> Importance:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remembered_importance(KEY, killed)
    assert not list(folder.iterdir())


def test_orders_descend_and_keep_equals_in_place() -> None:
    scores = torch.tensor([0.5, 2.0, 0.5, 3.0, 2.0, 0.5])
    many = torch.arange(400) % 3
    orders = Importance(scores, many, torch.stack([scores, -scores]), many[None]).orders()
    assert orders.layers == (3, 1, 4, 0, 2, 5)
    assert orders.kv_groups == (orders.layers, (0, 2, 5, 1, 4, 3))
    expected = tuple(sorted(range(400), key=lambda unit: -(unit % 3)))
    assert orders.embed == expected
    assert orders.mlp == (expected,)
