import pytest
from safetensors import safe_open
from tests.conftest import random_teacher
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from headstart.subnet.families import DROPPED
from headstart.subnet.rules import layouts_of, match_tensor, sizes_of

ALIASES = {"embed_out.weight": "lm_head.weight"}


def test_each_saved_tensor_matches_one_rule(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        matches = {name: match_tensor(name, teacher.config) for name in file.keys()}  # noqa: SIM118
    for name, (rule, layer) in matches.items():
        assert rule.layout != DROPPED
        assert rule.pattern.replace("{i}", str(layer)) == ALIASES.get(name, name)
    found = {(rule.pattern, layer) for rule, layer in matches.values()}
    assert len(found) == len(matches)
    assert {pattern for pattern, _ in found} == set(layouts_of(teacher.config))


def test_sizes_are_read_through_the_table():
    llama = LlamaConfig(
        vocab_size=7, hidden_size=12, intermediate_size=9, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    assert sizes_of(llama) == {
        "vocab": 7, "layers": 2, "embed": 12, "mlp": 9,
        "kv_groups": 2, "q_per_kv": 3, "head_dim": 4,
    }  # fmt: skip
    neox = GPTNeoXConfig(
        vocab_size=7, hidden_size=12, intermediate_size=9, num_hidden_layers=2,
        num_attention_heads=3,
    )  # fmt: skip
    assert sizes_of(neox) == {
        "vocab": 7, "layers": 2, "embed": 12, "mlp": 9,
        "kv_groups": 3, "q_per_kv": 1, "head_dim": 4,
    }  # fmt: skip


def test_an_unknown_family_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt2' is not .* \(gemma3_text, gpt_neox, llama, "):
        sizes_of(GPT2Config())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
        "score.weight",
    ],
)
def test_an_unknown_tensor_is_named(name):
    with pytest.raises(ValueError, match=name):
        match_tensor(name, LlamaConfig())


def test_a_bias_that_the_config_denies_is_named():
    name = "model.layers.3.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=f"{name}.*attention_bias=False"):
        match_tensor(name, LlamaConfig(attention_bias=False))
    rule, layer = match_tensor(name, LlamaConfig(attention_bias=True))
    assert rule.layout == "(kv_groups q_per_kv head_dim)"
    assert layer == 3


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama-tied-gqa", "model.layers.2.self_attn.rotary_emb.inv_freq"),
        ("llama-tied-gqa", "lm_head.weight"),
        ("gpt_neox-untied", "gpt_neox.layers.2.attention.rotary_emb.inv_freq"),
        ("gpt_neox-untied", "gpt_neox.layers.2.attention.masked_bias"),
        ("gpt_neox-untied", "gpt_neox.layers.2.attention.bias"),
        ("gpt_neox-tied", "embed_out.weight"),
    ],
)
def test_what_transformers_ignores_is_dropped(kind, name):
    rule, _ = match_tensor(name, random_teacher(kind).config)
    assert rule.layout == DROPPED


def test_a_name_in_the_file_may_differ_from_the_name_in_the_model():
    config = GPTNeoXConfig(tie_word_embeddings=False)
    assert match_tensor("embed_out.weight", config) == match_tensor("lm_head.weight", config)


def test_a_layer_beyond_the_config_is_named():
    name = "model.layers.4.mlp.up_proj.weight"
    config = random_teacher("llama-tied-gqa").config
    assert match_tensor(name.replace("4", "3"), config)[1] == 3
    with pytest.raises(ValueError, match=f"{name}.*says 4 layers"):
        match_tensor(name, config)
