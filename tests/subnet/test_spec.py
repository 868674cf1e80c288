import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tests.conftest import random_teacher
from tests.subnet.oracles import random_spec
from transformers import GPTNeoXConfig, LlamaConfig

from headstart.subnet.rules import is_layerwise, sizes_of
from headstart.subnet.spec import (
    SubnetSpec,
    check_spec,
    format_indices,
    parse_indices,
    stock_constraints,
    stock_obstacle,
    student_config,
)

SIZES = {
    "vocab": 9,
    "layers": 3,
    "embed": 8,
    "kv_groups": 2,
    "q_per_kv": 1,
    "head_dim": 4,
    "mlp": 6,
}
SPEC = SubnetSpec((0, 2), (0, 1, 5), ((0,), (1,)), ((0, 1, 2), (1, 3, 5)))


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("0", [0]),
        ("0-1", [0, 1]),
        ("3,5,7", [3, 5, 7]),
        ("0-2,5,7-8", [0, 1, 2, 5, 7, 8]),
        ("9-12,100", [9, 10, 11, 12, 100]),
    ],
)
def test_indices_are_written_as_ranges_and_read_back(text, indices):
    assert format_indices(indices) == text
    assert parse_indices(text) == tuple(indices)


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1--2", "1 2", "0-2-4", "1.5"])
def test_malformed_indices_are_quoted(text):
    with pytest.raises(ValueError, match=f"'{text}' is not a list of indices"):
        parse_indices(text)


@pytest.mark.parametrize(("text", "run"), [("5-2", "5-2"), ("0-3,9-8", "9-8"), ("3,7-0", "7-0")])
def test_a_range_that_runs_backwards_is_named(text, run):
    with pytest.raises(ValueError, match=f"'{text}' holds the range {run}, which runs backwards"):
        parse_indices(text)


@pytest.mark.parametrize("cut", [{}, {"head_dim": 8}, {"layers": 3, "embed": 20, "head_dim": 2}])
def test_a_spec_survives_json(cut):
    spec = random_spec(random_teacher("llama-untied-gqa"), kv_groups=2, mlp=33, **cut)
    assert SubnetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_files_from_before_heads_could_shrink_keep_them_whole():
    value = SPEC.to_json()
    assert value.pop("head_dim") is None
    assert SubnetSpec.from_json(value) == SPEC
    assert replace(SPEC, head_dim=(0, 2)).to_json()["head_dim"] == "0,2"


def test_a_spec_without_a_key_names_it():
    value = SPEC.to_json()
    del value["mlp"], value["layers"]
    with pytest.raises(ValueError, match="lacks layers, mlp"):
        SubnetSpec.from_json(value)


def test_identity_keeps_everything():
    spec = SubnetSpec.identity(SIZES)
    spec.validate(SIZES)
    assert spec.sizes(SIZES) == SIZES
    assert spec.kept_in_layer(2) == {
        "embed": tuple(range(8)), "kv_groups": (0, 1), "mlp": tuple(range(6)),
    }  # fmt: skip


def test_each_layer_keeps_its_own():
    SPEC.validate(SIZES)
    assert SPEC.kept_in_layer(0) == {"embed": (0, 1, 5), "kv_groups": (0,), "mlp": (0, 1, 2)}
    assert SPEC.kept_in_layer(1) == {"embed": (0, 1, 5), "kv_groups": (1,), "mlp": (1, 3, 5)}
    assert SPEC.sizes(SIZES) == SIZES | {"layers": 2, "embed": 3, "kv_groups": 1, "mlp": 3}
    narrow = replace(SPEC, kv_groups=((0,), (0, 1)), head_dim=(1, 3))
    assert narrow.kept_in_layer(1)["head_dim"] == (1, 3)
    assert narrow.sizes(SIZES) == SPEC.sizes(SIZES) | {"kv_groups": (1, 2), "head_dim": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_groups": ((0,),)}, "keeps 2 layers but lists kv_groups for 1"),
        ({"mlp": ((0,), (0,), (0,))}, "keeps 2 layers but lists mlp for 3"),
        ({"layers": (), "kv_groups": (), "mlp": ()}, "keeps nothing of axis layers"),
        ({"embed": ()}, "keeps nothing of axis embed"),
        ({"kv_groups": ((0,), ())}, "keeps nothing of axis kv_groups"),
        ({"mlp": ((), (0,))}, "keeps nothing of axis mlp"),
        ({"layers": (2, 0)}, "layers indices are not in ascending order"),
        ({"embed": (1, 1)}, "embed indices are not in ascending order"),
        ({"mlp": ((0, 1), (3, 2))}, "mlp indices are not in ascending order"),
        ({"layers": (0, 3)}, "keeps layers index 3 but the teacher has only 3"),
        ({"embed": (0, 8)}, "keeps embed index 8 .* go from 0 to 7"),
        ({"kv_groups": ((0,), (2,))}, "keeps kv_groups index 2 .* go from 0 to 1"),
        ({"mlp": ((0,), (-1, 2))}, "keeps mlp index -1 .* go from 0 to 5"),
        ({"head_dim": ()}, "keeps nothing of axis head_dim"),
        ({"head_dim": (2, 1)}, "head_dim indices are not in ascending order"),
        ({"head_dim": (0, 4)}, "keeps head_dim index 4 .* go from 0 to 3"),
    ],
)
def test_a_spec_that_does_not_fit_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change).validate(SIZES)


@pytest.mark.parametrize(("axis", "units"), [("kv_groups", (0, 1)), ("mlp", (0, 1))])
def test_sizes_that_differ_between_layers_make_a_layerwise_config(axis, units):
    config = random_teacher("llama-untied-gqa").config
    spec = replace(SPEC, **{axis: (units, (0,))})
    assert spec.sizes(SIZES)[axis] == (2, 1)
    obstacle = stock_obstacle(config, spec.sizes(sizes_of(config)))
    assert obstacle.startswith(f"layers have 1 to 2 {axis}, and a stock llama checkpoint")
    student = student_config(config, spec)
    assert is_layerwise(student) and student.is_heterogeneous
    assert sizes_of(student) == spec.sizes(sizes_of(config))
    with pytest.raises(ValueError, match="the teacher is a layer-wise student"):
        student_config(student, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": ((0,), (80,))}, "keeps mlp index 80 .* go from 0 to 79"),
        ({"head_dim": (0, 16)}, "keeps head_dim index 16 .* go from 0 to 15"),
        ({"head_dim": (0, 9)}, "channel 0 without its rotary partner 8"),
    ],
)
def test_a_spec_is_checked_against_a_model(change, message):
    config = random_teacher("llama-untied-gqa").config
    check_spec(config, SPEC)
    check_spec(config, replace(SPEC, head_dim=(3, 11)))
    for check in (check_spec, student_config):
        with pytest.raises(ValueError, match=message):
            check(config, replace(SPEC, **change))


def test_a_gpt_neox_student_ties_width_to_heads():
    model = random_teacher("gpt_neox-untied")
    spec = random_spec(model, embed=40, kv_groups=3)
    obstacle = stock_obstacle(model.config, spec.sizes(sizes_of(model.config)))
    assert obstacle.endswith("needs embed = (kv_groups head_dim), and 40 is not 48")
    assert is_layerwise(student_config(model.config, spec))
    assert student_config(model.config, random_spec(model, embed=48, kv_groups=3)).hidden_size == 48
    assert is_layerwise(
        student_config(model.config, random_spec(model, embed=48, kv_groups=3, head_dim=8))
    )
    narrow = student_config(model.config, random_spec(model, embed=24, kv_groups=3, head_dim=8))
    assert (narrow.hidden_size, narrow.num_attention_heads) == (24, 3)


def test_a_llama_student_divides_width_by_heads():
    model = random_teacher("llama-untied-gqa")
    spec = random_spec(model, embed=42, kv_groups=2)
    obstacle = stock_obstacle(model.config, spec.sizes(sizes_of(model.config)))
    assert re.search("hidden_size to be a multiple .* 42 is not one of 4", obstacle)
    assert is_layerwise(student_config(model.config, spec))
    assert student_config(model.config, random_spec(model, embed=44, kv_groups=2)).hidden_size == 44


@pytest.mark.parametrize("kind", ["llama-untied-mha-biases", "gpt_neox-untied"])
def test_constraints_are_those_of_transformers_itself(kind):
    """For every width and number of heads: the stock config builds, and its head size is kept."""
    config = random_teacher(kind).config
    embed, groups = (a.ravel() for a in np.meshgrid(np.arange(1, 65), np.arange(1, 5)))
    sizes = sizes_of(config) | {"embed": embed, "kv_groups": groups}
    claimed = np.all([holds for holds, _ in stock_constraints(config, sizes)], axis=0)
    for width, heads, legal in zip(embed.tolist(), groups.tolist(), claimed, strict=True):
        assert legal == stock_code_takes(config, width, heads)


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


def test_a_students_config_differs_only_in_its_sizes(teacher):
    sizes = sizes_of(teacher.config)
    head_dim, heads = sizes["head_dim"], sizes["q_per_kv"]
    embed = head_dim * heads if teacher.config.model_type == "gpt_neox" else 30
    spec = random_spec(teacher, layers=3, embed=embed, kv_groups=1, mlp=50)
    cut = {
        "num_hidden_layers": 3, "hidden_size": embed, "intermediate_size": 50,
        "num_attention_heads": heads,
    }  # fmt: skip
    if teacher.config.model_type == "llama":
        cut["num_key_value_heads"] = 1
    assert student_config(teacher.config, spec).to_dict() == teacher.config.to_dict() | cut


@pytest.mark.parametrize(("size", "theta"), [(8, 10_000.0), (12, 10_000.0**0.75)])
def test_narrower_heads_change_head_dim_and_theta_alone(size, theta):
    model = random_teacher("llama-untied-gqa")
    config = student_config(model.config, random_spec(model, head_dim=size))
    expected = model.config.to_dict() | {"head_dim": size}
    expected["rope_parameters"] = {**expected["rope_parameters"], "rope_theta": theta}
    assert config.to_dict() == expected
