"""Importance equals the means taken by hand from hidden states and wrapped modules."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headstart.search.importance import Importance, activation_importance

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
    return torch.cat([one.double().abs().flatten(0, -2) for one in activations]).mean(dim=0)


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
    scores["embed"] = mean_magnitude([one for key in seen if key[1] in NORMS for one in seen[key]])

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
            for a, b in itertools.pairwise(one.double() for one in hidden)
        ]
    )
    return scores


def test_importance_equals_activations_taken_by_hand(
    teacher: PreTrainedModel, tokens: Tensor
) -> None:
    found = activation_importance(teacher, [tokens])
    expected = importance_by_hand(teacher, tokens)
    for axis, scores in expected.items():
        torch.testing.assert_close(getattr(found, axis).double(), scores, rtol=1e-5, atol=1e-6)


def test_batches_of_any_sizes_give_one_result(teacher: PreTrainedModel, tokens: Tensor) -> None:
    num_tokens: list[int] = []
    whole = activation_importance(teacher, [tokens], num_tokens.append)
    uneven = activation_importance(teacher, iter(tokens.split([1, 3, 2])), num_tokens.append)
    assert num_tokens == [size * BLOCK_LENGTH for size in (6, 1, 3, 2)]
    for axis, scores in vars(whole).items():
        torch.testing.assert_close(getattr(uneven, axis), scores, rtol=1e-5, atol=1e-6)


@one_of_each_family
def test_the_teacher_is_left_as_it_was(teacher: PreTrainedModel, tokens: Tensor) -> None:
    def failing() -> Iterator[Tensor]:
        yield tokens
        raise InterruptedError

    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    activation_importance(teacher, [tokens])
    with pytest.raises(InterruptedError):
        activation_importance(teacher, failing())
    for module in teacher.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


@one_of_each_family
def test_importance_needs_tokens(teacher: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least one calibration block"):
        activation_importance(teacher, [])


def test_a_unit_that_does_nothing_comes_last(teacher: PreTrainedModel, tokens: Tensor) -> None:
    reader = {"llama": "mlp.up_proj", "gpt_neox": "mlp.dense_h_to_4h"}[teacher.config.model_type]
    with torch.no_grad():
        for parameter in teacher.base_model.layers[2].get_submodule(reader).parameters():
            parameter[3] = 0
    assert activation_importance(teacher, [tokens]).orders().mlp[2][-1] == 3


def test_orders_descend_and_keep_equals_in_place() -> None:
    scores = torch.tensor([0.5, 2.0, 0.5, 3.0, 2.0, 0.5])
    many = torch.arange(400) % 3
    orders = Importance(scores, many, torch.stack([scores, -scores]), many[None]).orders()
    assert orders.layers == (3, 1, 4, 0, 2, 5)
    assert orders.kv_groups == (orders.layers, (0, 2, 5, 1, 4, 3))
    expected = tuple(sorted(range(400), key=lambda unit: -(unit % 3)))
    assert orders.embed == expected
    assert orders.mlp == (expected,)
