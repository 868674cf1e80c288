"""Which shapes stock code can express, against transformers' own configs."""

import re

import numpy as np
import pytest
from tests.conftest import random_teacher
from transformers import GPTNeoXConfig, LlamaConfig

from headstart.model.architecture import Architecture
from headstart.model.families import GPT_NEOX, LLAMA
from headstart.model.shapes import stock_constraints, stock_obstacle

SIZES = {
    "vocab": 128,
    "layers": 2,
    "embed": 48,
    "kv_groups": 3,
    "q_per_kv": 2,
    "head_dim": 16,
    "mlp": 80,
}


@pytest.mark.parametrize("axis", ["kv_groups", "mlp"])
def test_sizes_that_differ_between_layers_are_named(axis):
    assert stock_obstacle(LLAMA, SIZES) == ""
    obstacle = stock_obstacle(LLAMA, SIZES | {axis: (2, 1)})
    assert obstacle.startswith(f"layers have 1 to 2 {axis}, and a stock llama checkpoint")


def test_a_gpt_neox_ties_width_to_heads():
    sizes = SIZES | {"q_per_kv": 1}
    assert stock_obstacle(GPT_NEOX, sizes) == ""
    obstacle = stock_obstacle(GPT_NEOX, sizes | {"embed": 40})
    assert obstacle.endswith("needs embed = (kv_groups head_dim), and 40 is not 48")


def test_a_llama_divides_width_by_heads():
    obstacle = stock_obstacle(LLAMA, SIZES | {"embed": 42, "kv_groups": 2})
    assert re.search("hidden_size to be a multiple .* 42 is not one of 4", obstacle)
    assert stock_obstacle(LLAMA, SIZES | {"embed": 44, "kv_groups": 2}) == ""


@pytest.mark.parametrize("kind", ["llama-untied-mha-biases", "gpt_neox-untied"])
def test_constraints_are_those_of_transformers_itself(kind):
    """For every width and number of heads: the stock config builds, and its head size is kept."""
    architecture = Architecture.of(random_teacher(kind).config)
    embed, groups = (a.ravel() for a in np.meshgrid(np.arange(1, 65), np.arange(1, 5)))
    sizes = architecture.sizes | {"embed": embed, "kv_groups": groups}
    constraints = stock_constraints(architecture.family, sizes)
    claimed = np.all([holds for holds, _ in constraints], axis=0)
    for width, heads, legal in zip(embed.tolist(), groups.tolist(), claimed, strict=True):
        assert legal == stock_code_takes(architecture.config, width, heads)


def stock_code_takes(config, width, heads):
    shape = {"hidden_size": width, "num_attention_heads": heads}
    if isinstance(config, GPTNeoXConfig):
        head_dim = config.hidden_size // config.num_attention_heads
        return width / heads == head_dim
    try:
        LlamaConfig(head_dim=config.head_dim, num_key_value_heads=heads, **shape)
    except Exception:
        return False
    return True
