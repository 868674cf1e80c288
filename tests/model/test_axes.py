from itertools import product

import numpy as np
import pytest
import torch

from headstart.model.axes import (
    AXES,
    axes_of,
    kept_indices,
    parse_layout,
    place_tensor,
    shape_of,
    slice_tensor,
    unstack,
)

SIZES = {"vocab": 5, "embed": 4, "kv_groups": 3, "q_per_kv": 2, "head_dim": 2, "mlp": 6}
KEPT = {"embed": (0, 3), "kv_groups": (0, 2), "mlp": (1, 2, 5), "head_dim": (1,)}


@pytest.mark.parametrize(
    ("layout", "dimensions"),
    [
        ("embed", (("embed",),)),
        ("vocab embed", (("vocab",), ("embed",))),
        ("embed (kv_groups q_per_kv)", (("embed",), ("kv_groups", "q_per_kv"))),
        ("(kv_groups 3 head_dim) embed", (("kv_groups", 3, "head_dim"), ("embed",))),
        ("(2 mlp)", ((2, "mlp"),)),
    ],
)
def test_layouts_parse(layout, dimensions):
    assert parse_layout(layout) == dimensions


@pytest.mark.parametrize("layout", ["heads", "vocab hidden", "(kv_groups 3 channel) embed"])
def test_an_unknown_axis_is_named(layout):
    with pytest.raises(AssertionError, match=r"unknown axis '(heads|hidden|channel)'"):
        parse_layout(layout)


def test_axes_are_found_without_constants():
    assert axes_of("(kv_groups 3 head_dim) embed") == {"kv_groups", "head_dim", "embed"}
    assert axes_of(" ".join(AXES)) == set(AXES)


def test_shapes_count_many_sizes_at_once():
    shape = shape_of("(kv_groups 3 head_dim) embed", {**SIZES, "kv_groups": np.array([1, 2])})
    assert shape[0].tolist() == [6, 12]
    assert shape[1] == 4


def naive_slice(array, layout, kept):
    """Unfuse every dimension, visit every kept cell in order, and fuse again."""
    dimensions = parse_layout(layout)
    parts = [part for dimension in dimensions for part in dimension]
    size = [part if isinstance(part, int) else SIZES[part] for part in parts]
    units = [kept.get(part, range(n)) for part, n in zip(parts, size, strict=True)]
    cells = [array.reshape(size)[place] for place in product(*units)]
    count = iter([len(unit) for unit in units])
    shape = [np.prod([next(count) for _ in dimension]) for dimension in dimensions]
    return np.array(cells).reshape(shape)


@pytest.mark.parametrize("kept", [KEPT, {"embed": (1,)}, {"kv_groups": (1, 2)}, {}])
@pytest.mark.parametrize(
    "layout",
    [
        "embed",
        "vocab embed",
        "(kv_groups 3 head_dim)",
        "(kv_groups 3 head_dim) embed",
        "embed (kv_groups q_per_kv head_dim)",
        "(2 mlp) embed",
        "(mlp 2) embed",
        "(kv_groups q_per_kv) (head_dim 2) mlp",
    ],
)
def test_slices_are_those_of_naive_loops(layout, kept):
    shape = shape_of(layout, SIZES)
    tensor = torch.arange(np.prod(shape)).reshape(shape)
    sliced = slice_tensor(tensor, layout, SIZES, kept)
    np.testing.assert_array_equal(sliced.numpy(), naive_slice(tensor.numpy(), layout, kept))


@pytest.mark.parametrize("kept", [KEPT, {"mlp": (4,)}, {}])
def test_stacked_tensors_are_sliced_and_placed_one_by_one(kept):
    blocks = ["(kv_groups q_per_kv head_dim) embed", "(kv_groups head_dim) embed", "(2 mlp) embed"]
    tensors = [torch.rand(shape_of(block, SIZES)) for block in blocks]
    whole, layout = torch.cat(tensors), " + ".join(blocks)
    assert shape_of(layout, SIZES) == whole.shape == (12 + 6 + 12, 4)
    assert axes_of(layout) == {"kv_groups", "q_per_kv", "head_dim", "embed", "mlp"}
    assert [block for _, block in unstack(whole, layout, SIZES)] == blocks
    pairs = list(zip(tensors, blocks, strict=True))
    expected = [naive_slice(part.numpy(), block, kept) for part, block in pairs]
    sliced = slice_tensor(whole, layout, SIZES, kept).numpy()
    np.testing.assert_array_equal(sliced, np.concatenate(expected))
    larger = SIZES | {"kv_groups": 5, "mlp": 7}
    placed = [place_tensor(part, block, SIZES, larger) for part, block in pairs]
    assert torch.equal(place_tensor(whole, layout, SIZES, larger), torch.cat(placed))
    rows, channels = kept_indices(layout, SIZES, kept)
    assert torch.equal(whole[rows][:, channels], slice_tensor(whole, layout, SIZES, kept))


def test_a_tensor_kept_whole_is_not_copied():
    tensor = torch.zeros(6, 4)
    assert slice_tensor(tensor, "mlp embed", SIZES, {"embed": range(4), "vocab": (1,)}) is tensor


@pytest.mark.parametrize(
    ("layout", "kept", "is_view"),
    [
        ("vocab embed", {"embed": (0, 1)}, True),
        ("mlp embed", {"embed": (1, 2), "mlp": (2, 3, 4)}, True),
        ("(kv_groups 3 head_dim) embed", {"kv_groups": (1,), "embed": (0, 1)}, True),
        ("vocab embed", {"embed": (0, 2)}, False),
        ("vocab embed", {"embed": (1, 0, 2, 3)}, False),
        ("(2 mlp) embed", {"mlp": (0, 1)}, False),
        ("(kv_groups 3 head_dim) embed", {"head_dim": (1,)}, False),
    ],
)
def test_units_side_by_side_are_views(layout, kept, is_view):
    tensor = torch.zeros(shape_of(layout, SIZES))
    sliced = slice_tensor(tensor, layout, SIZES, kept)
    tensor += 1
    assert bool(sliced.bool().all()) == is_view == bool(sliced.bool().any())


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(AssertionError, match="mlp embed"):
        slice_tensor(torch.zeros(4, 6), "mlp embed", SIZES, {"embed": (0,)})


@pytest.mark.parametrize("layout", ["(kv_groups 3 head_dim) embed", "embed (q_per_kv mlp)", "mlp"])
def test_placed_units_are_the_first_and_all_others_zero(layout):
    tensor = 1.0 + torch.rand(shape_of(layout, SIZES))
    larger = SIZES | {"kv_groups": 5, "mlp": 9}
    placed = place_tensor(tensor, layout, SIZES, larger)
    assert placed.shape == shape_of(layout, larger)
    first = {axis: range(size) for axis, size in SIZES.items()}
    assert torch.equal(slice_tensor(placed, layout, larger, first), tensor)
    assert placed.count_nonzero() == tensor.numel()
