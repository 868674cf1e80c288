"""A stock checkpoint with zeros computes what the layer-wise student does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher
from tests.model.oracles import random_layerwise_spec, random_spec
from transformers import AutoModelForCausalLM

from headstart.model.architecture import Architecture
from headstart.model.cut import build_student
from headstart.model.shapes import stock_obstacle
from headstart.model.spec import SubnetSpec
from headstart.model.stock import stock_config, stock_sizes, stock_tensors

TOKENS = torch.randint(1, 128, (2, 13), generator=torch.Generator().manual_seed(0))


def layerwise_student(kind, seed, **cut):
    teacher = random_teacher(kind)
    spec = random_layerwise_spec(teacher, seed, layers=3, **cut)
    return build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)


def padded(student):
    """The stock model around the student's tensors."""
    architecture = Architecture.of(student.config)
    sizes = stock_sizes(architecture)
    config = stock_config(architecture, sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__module__.startswith("transformers.")
    tensors = dict(stock_tensors(student.state_dict().items(), architecture, sizes))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) == tied and not unexpected
    model.tie_weights()
    return model.double().eval()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "kind",
    [kind for kind in [*TEACHERS, *DESCENDANTS] if "gpt_neox" not in kind and "olmo2" not in kind],
)
@torch.no_grad()
def test_zeros_change_nothing(kind, seed):
    width = 96 if kind.startswith("phi3") else 36  # that of all its heads together
    student = layerwise_student(kind, seed, embed=width)
    stock = padded(student)
    architecture = Architecture.of(stock.config)
    assert not stock_obstacle(architecture.family, architecture.sizes)
    assert not architecture.is_layerwise
    parameters = architecture.count(1).parameters
    assert stock.num_parameters() == parameters > student.num_parameters()
    expected = student.double()(TOKENS).logits
    torch.testing.assert_close(stock(TOKENS).logits, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_gpt_neox_gets_heads_until_they_are_as_wide_as_the_stream():
    teacher = random_teacher("gpt_neox-untied")
    spec = random_layerwise_spec(teacher, 1, layers=3, embed=48)
    spec = replace(spec, kv_groups=((0, 2), (1,), (1, 3)))
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    assert stock_sizes(Architecture.of(student.config))["kv_groups"] == 3  # of 16 channels each
    expected = student.double()(TOKENS).logits
    torch.testing.assert_close(padded(student)(TOKENS).logits, expected, atol=1e-10, rtol=0)


def test_a_width_below_its_heads_has_no_stock_shape_and_the_nearest_is_named():
    teacher = random_teacher("gpt_neox-untied")
    spec = random_spec(teacher, embed=40, kv_groups=3)
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    message = r"40 is not 48, which zeros cannot mend; the nearest stock shape has embed 48"
    with pytest.raises(ValueError, match=message):
        stock_sizes(Architecture.of(student.config))


def test_a_width_far_below_its_heads_is_told_the_nearest_too():
    teacher = random_teacher("gpt_neox-untied")
    spec = random_spec(teacher, embed=20, kv_groups=4)
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    with pytest.raises(ValueError, match=r"20 is not 64, .* nearest stock shape has embed 64"):
        stock_sizes(Architecture.of(student.config))


def test_norms_over_all_heads_allow_no_heads_of_zeros():
    teacher = random_teacher("olmo2-tied")
    spec = SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    spec = replace(spec, kv_groups=((0,), *spec.kv_groups[1:]))
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    message = r"layers have 1 to \d kv_groups.* would change what .*q_norm.* in every layer"
    with pytest.raises(ValueError, match=message):
        stock_sizes(Architecture.of(student.config))


def test_norms_over_all_heads_allow_neurons_of_zeros():
    teacher = random_teacher("olmo2-tied")
    spec = SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    spec = replace(spec, mlp=tuple(units[: 20 + 5 * i] for i, units in enumerate(spec.mlp)))
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    expected = student.double()(TOKENS).logits
    with torch.no_grad():
        torch.testing.assert_close(padded(student)(TOKENS).logits, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-tied", "gemma3_text-tied"])
def test_a_stock_model_is_its_own(kind):
    teacher = random_teacher(kind)
    architecture, state = Architecture.of(teacher.config), teacher.state_dict()
    assert stock_sizes(architecture) == architecture.sizes
    for name, tensor in stock_tensors(state.items(), architecture, architecture.sizes):
        assert torch.equal(tensor, state[name])
