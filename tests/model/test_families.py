"""The tables against what transformers itself builds."""

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher
from transformers import Qwen2Config

from headstart.model.architecture import Architecture
from headstart.model.axes import axes_of, parse_layout, shape_of, stacked, unstack
from headstart.model.families import DROPPED, FAMILIES


@pytest.fixture(params=[*TEACHERS, *DESCENDANTS])
def teacher(request):
    """Each kind of teacher in turn."""
    return random_teacher(request.param)


def test_each_parameter_has_its_layout(teacher):
    architecture = Architecture.of(teacher.config)
    expected = {
        pattern.replace("{i}", str(layer)): shape_of(layout, architecture.sizes)
        for pattern, layout in architecture.layouts.items()
        for layer in range(teacher.config.num_hidden_layers)
    }
    assert expected == {name: tuple(p.shape) for name, p in teacher.named_parameters()}


def test_the_layer_pattern_names_the_models_layers(teacher):
    pattern = Architecture.of(teacher.config).family.layer
    for i, layer in enumerate(teacher.base_model.layers):
        assert teacher.get_submodule(pattern.replace("{i}", str(i))) is layer


def test_importance_sites_read_their_axis(teacher):
    architecture = Architecture.of(teacher.config)
    for axis, modules in architecture.family.importance_sites.items():
        for module in modules:
            layout = architecture.layouts[f"{module}.weight"]
            inputs = parse_layout(stacked(layout)[0])[1]
            assert axis in inputs
            linear = teacher.get_submodule(module.replace("{i}", "0"))
            assert linear.in_features == shape_of(layout, architecture.sizes)[1]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_axis_of_a_tensor_is_read_from_the_config(family):
    layouts = [text.split(" if ")[0].split(" unless ")[0] for text in family.tensors.values()]
    of_tensors = {axis for layout in layouts if layout != DROPPED for axis in axes_of(layout)}
    of_config = {axis for _, layout in family.config for axis in axes_of(layout)}
    assert of_tensors <= of_config


def test_every_config_key_exists(teacher):
    for key, _ in Architecture.of(teacher.config).family.config:
        assert isinstance(getattr(teacher.config, key), int)


def test_a_head_size_that_the_config_leaves_out_is_derived():
    config = Qwen2Config(hidden_size=48, num_attention_heads=6)
    assert getattr(config, "head_dim", None) is None
    assert Architecture.of(config).sizes["head_dim"] == 8


@torch.no_grad()
def test_scaling_the_queries_scales_the_scores(teacher):
    """The tensors that the table calls queries, or the first part of what they fuse."""
    architecture, tokens = Architecture.of(teacher.config), torch.arange(1, 9)[None]
    family, layouts, sizes = architecture.family, architecture.layouts, architecture.sizes
    teacher.set_attn_implementation("eager")
    if not family.queries:
        pytest.skip("scores do not depend on the head size")
    before = teacher(tokens, output_attentions=True).attentions[0].log()
    for pattern in family.queries:
        if pattern in layouts:
            whole = teacher.get_parameter(pattern.replace("{i}", "0"))
            (queries, layout), *_ = unstack(whole, layouts[pattern], sizes)
            rows = parse_layout(layout)[0]
            num_fused = next((part for part in rows if isinstance(part, int)), 1)
            queries.unflatten(0, (-1, num_fused, sizes["head_dim"]))[:, 0] *= 2
    after = teacher(tokens, output_attentions=True).attentions[0].log()
    torch.testing.assert_close(after, (2 * before).log_softmax(-1), atol=1e-4, rtol=1e-4)
