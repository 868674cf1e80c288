import json
from dataclasses import replace

import pytest
from tests.conftest import random_teacher
from tests.model.oracles import random_spec

from headstart.model.spec import SubnetSpec, format_indices, parse_indices

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


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "-1", "1--2", "1 2", "0-2-4", "1.5", "0-99999999", "9" * 5000]
)
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


def test_indices_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 is not a list of indices such as '0-2,5'"):
        parse_indices(3)  # type: ignore[arg-type]
