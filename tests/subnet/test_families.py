"""The tables against what transformers itself builds."""

import pytest
import torch
from tests.conftest import random_teacher

from headstart.subnet.axes import axes_of, parse_layout, shape_of
from headstart.subnet.families import DROPPED, FAMILIES
from headstart.subnet.rules import family_of, layouts_of, sizes_of


def test_each_parameter_has_its_layout(teacher):
    sizes = sizes_of(teacher.config)
    expected = {
        pattern.replace("{i}", str(layer)): shape_of(layout, sizes)
        for pattern, layout in layouts_of(teacher.config).items()
        for layer in range(teacher.config.num_hidden_layers)
    }
    assert expected == {name: tuple(p.shape) for name, p in teacher.named_parameters()}


def test_the_layer_pattern_names_the_models_layers(teacher):
    pattern = family_of(teacher.config).layer
    for i, layer in enumerate(teacher.base_model.layers):
        assert teacher.get_submodule(pattern.replace("{i}", str(i))) is layer


def test_importance_sites_read_their_axis(teacher):
    for axis, modules in family_of(teacher.config).importance_sites.items():
        for module in modules:
            layout = layouts_of(teacher.config)[f"{module}.weight"]
            inputs = parse_layout(layout)[1]
            assert axis in inputs
            linear = teacher.get_submodule(module.replace("{i}", "0"))
            assert linear.in_features == shape_of(layout, sizes_of(teacher.config))[1]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_axis_of_a_tensor_is_read_from_the_config(family):
    layouts = [text.split(" if ")[0].split(" unless ")[0] for text in family.tensors.values()]
    of_tensors = {axis for layout in layouts if layout != DROPPED for axis in axes_of(layout)}
    of_config = {axis for _, layout in family.config for axis in axes_of(layout)}
    assert of_tensors <= of_config


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-tied"])
def test_every_config_key_exists(kind):
    config = random_teacher(kind).config
    for key, _ in family_of(config).config:
        assert isinstance(getattr(config, key), int)


def test_attention_keeps_its_head_size_where_the_table_says(teacher):
    family, sizes = family_of(teacher.config), sizes_of(teacher.config)
    for i, layer in enumerate(teacher.base_model.layers):
        attention = teacher.get_submodule(family.attention.replace("{i}", str(i)))
        assert attention in layer.children()
        assert getattr(attention, family.head_size) == sizes["head_dim"]
        assert attention.scaling == sizes["head_dim"] ** -0.5


@torch.no_grad()
def test_scaling_the_queries_scales_the_scores(teacher):
    """The tensors that the table calls queries, or the first part of what they fuse."""
    config, tokens = teacher.config, torch.arange(1, 9)[None]
    family, head_dim = family_of(config), sizes_of(config)["head_dim"]
    teacher.set_attn_implementation("eager")
    before = teacher(tokens, output_attentions=True).attentions[0].log()
    for pattern in family.queries:
        if pattern in layouts_of(config):
            rows = parse_layout(layouts_of(config)[pattern])[0]
            num_fused = next((part for part in rows if isinstance(part, int)), 1)
            queries = teacher.get_parameter(pattern.replace("{i}", "0"))
            queries.unflatten(0, (-1, num_fused, head_dim))[:, 0] *= 2
    after = teacher(tokens, output_attentions=True).attentions[0].log()
    torch.testing.assert_close(after, (2 * before).log_softmax(-1), atol=1e-4, rtol=1e-4)
