import json
from dataclasses import replace
from typing import Any

import pytest
from safetensors import safe_open
from tests.conftest import extract, random_teacher
from tests.model.oracles import random_spec
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from headstart.model.architecture import Architecture
from headstart.model.families import DROPPED
from headstart.model.spec import SubnetSpec
from headstart.system.errors import UserError

ALIASES = {"embed_out.weight": "lm_head.weight"}
SPEC = SubnetSpec((0, 2), (0, 1, 5), ((0,), (1,)), ((0, 1, 2), (1, 3, 5)))


def test_each_saved_tensor_matches_one_rule(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    architecture = Architecture.of(teacher.config)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        matches = {name: architecture.match(name) for name in file.keys()}  # noqa: SIM118
    for name, (rule, layer) in matches.items():
        assert rule.layout != DROPPED
        assert rule.pattern.replace("{i}", str(layer)) == ALIASES.get(name, name)
    found = {(rule.pattern, layer) for rule, layer in matches.values()}
    assert len(found) == len(matches)
    assert {pattern for pattern, _ in found} == set(architecture.layouts)


def test_code_that_does_not_travel_is_not_named(saved, tmp_path):
    folder = saved(random_teacher("phi3-untied"))
    entries = json.loads((folder / "config.json").read_text())
    entries["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(entries))
    spec = random_spec(random_teacher("phi3-untied"), layers=2, mlp=40)
    student = extract(folder, spec, tmp_path / "student")
    assert "modeling_phi3" not in (student / "config.json").read_text()


def test_sizes_are_read_through_the_table():
    llama = LlamaConfig(
        vocab_size=7, hidden_size=12, intermediate_size=9, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    assert Architecture.of(llama).sizes == {
        "vocab": 7, "layers": 2, "embed": 12, "mlp": 9,
        "kv_groups": 2, "q_per_kv": 3, "head_dim": 4,
    }  # fmt: skip
    neox = GPTNeoXConfig(
        vocab_size=7, hidden_size=12, intermediate_size=9, num_hidden_layers=2,
        num_attention_heads=3,
    )  # fmt: skip
    assert Architecture.of(neox).sizes == {
        "vocab": 7, "layers": 2, "embed": 12, "mlp": 9,
        "kv_groups": 3, "q_per_kv": 1, "head_dim": 4,
    }  # fmt: skip


def test_an_unknown_family_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt2' is not .* \(gemma3_text, gpt_neox, llama, "):
        Architecture.of(GPT2Config())


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
        Architecture.of(LlamaConfig()).match(name)


def test_a_bias_that_the_config_denies_is_named():
    name = "model.layers.3.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=f"{name}.*attention_bias=False"):
        Architecture.of(LlamaConfig(attention_bias=False)).match(name)
    rule, layer = Architecture.of(LlamaConfig(attention_bias=True)).match(name)
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
    rule, _ = Architecture.of(random_teacher(kind).config).match(name)
    assert rule.layout == DROPPED


def test_a_name_in_the_file_may_differ_from_the_name_in_the_model():
    architecture = Architecture.of(GPTNeoXConfig(tie_word_embeddings=False))
    assert architecture.match("embed_out.weight") == architecture.match("lm_head.weight")


def test_a_layer_beyond_the_config_is_named():
    name = "model.layers.4.mlp.up_proj.weight"
    architecture = Architecture.of(random_teacher("llama-tied-gqa").config)
    assert architecture.match(name.replace("4", "3"))[1] == 3
    with pytest.raises(ValueError, match=f"{name}.*says 4 layers"):
        architecture.match(name)


# Students


@pytest.mark.parametrize("axis", ["kv_groups", "mlp"])
def test_sizes_that_differ_between_layers_make_a_layerwise_student(axis):
    teacher = Architecture.of(random_teacher("llama-untied-gqa").config)
    spec = replace(SPEC, **{axis: ((0, 1), (0,))})
    assert spec.sizes(teacher.sizes)[axis] == (2, 1)
    student = teacher.student(spec)
    assert student.is_layerwise and student.config.is_heterogeneous
    assert student.sizes == spec.sizes(teacher.sizes)
    with pytest.raises(ValueError, match="the teacher is a layer-wise student"):
        student.student(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": ((0,), (80,))}, "keeps mlp index 80 .* go from 0 to 79"),
        ({"head_dim": (0, 16)}, "keeps head_dim index 16 .* go from 0 to 15"),
        ({"head_dim": (0, 9)}, "channel 0 without its rotary partner 8"),
    ],
)
def test_a_spec_is_checked_against_a_model(change, message):
    architecture = Architecture.of(random_teacher("llama-untied-gqa").config)
    architecture.check(SPEC)
    architecture.check(replace(SPEC, head_dim=(3, 11)))
    for check in (architecture.check, architecture.student):
        with pytest.raises(ValueError, match=message):
            check(replace(SPEC, **change))


def test_a_gpt_neox_student_ties_width_to_heads():
    model = random_teacher("gpt_neox-untied")
    teacher = Architecture.of(model.config)
    assert teacher.student(random_spec(model, embed=40, kv_groups=3)).is_layerwise
    assert teacher.student(random_spec(model, embed=48, kv_groups=3)).config.hidden_size == 48
    narrow = random_spec(model, embed=48, kv_groups=3, head_dim=8)
    assert teacher.student(narrow).is_layerwise
    narrow = teacher.student(random_spec(model, embed=24, kv_groups=3, head_dim=8)).config
    assert (narrow.hidden_size, narrow.num_attention_heads) == (24, 3)


def test_a_llama_student_divides_width_by_heads():
    model = random_teacher("llama-untied-gqa")
    teacher = Architecture.of(model.config)
    assert teacher.student(random_spec(model, embed=42, kv_groups=2)).is_layerwise
    assert teacher.student(random_spec(model, embed=44, kv_groups=2)).config.hidden_size == 44


def test_a_students_config_differs_only_in_its_sizes(teacher):
    architecture = Architecture.of(teacher.config)
    head_dim, heads = architecture.sizes["head_dim"], architecture.sizes["q_per_kv"]
    embed = head_dim * heads if teacher.config.model_type == "gpt_neox" else 30
    spec = random_spec(teacher, layers=3, embed=embed, kv_groups=1, mlp=50)
    cut = {
        "num_hidden_layers": 3, "hidden_size": embed, "intermediate_size": 50,
        "num_attention_heads": heads,
    }  # fmt: skip
    if teacher.config.model_type == "llama":
        cut["num_key_value_heads"] = 1
    assert architecture.student(spec).config.to_dict() == teacher.config.to_dict() | cut


@pytest.mark.parametrize(("size", "theta"), [(8, 10_000.0), (12, 10_000.0**0.75)])
def test_narrower_heads_change_head_dim_and_theta_alone(size, theta):
    model = random_teacher("llama-untied-gqa")
    student = Architecture.of(model.config).student(random_spec(model, head_dim=size))
    expected = model.config.to_dict() | {"head_dim": size}
    expected["rope_parameters"] = {**expected["rope_parameters"], "rope_theta": theta}
    assert student.config.to_dict() == expected


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"max_position_embeddings": 128}, 128),
        (
            {
                "max_position_embeddings": 128,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            512,
        ),
        (  # whose config says both
            {
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "rope_theta": 1e4,
                },
            },
            512,
        ),
    ],
)
def test_blocks_longer_than_the_context_are_refused(settings: dict[str, Any], limit: int) -> None:
    architecture = Architecture.of(LlamaConfig(**settings))
    architecture.check_context(limit)
    message = rf"block_length is {limit + 1}, and the model's context is {limit} tokens; use"
    with pytest.raises(UserError, match=message):
        architecture.check_context(limit + 1)
