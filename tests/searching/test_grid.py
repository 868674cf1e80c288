"""The table of shapes in a bin, against loops over every shape."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from tests.conftest import random_teacher
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig

from headstart.model.architecture import Architecture
from headstart.model.rotary import head_sizes
from headstart.searching import grid as grid_module
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.grid import GridSettings, Rows, head_values, ladders_of, rows_in_bin
from headstart.searching.orders import by_periods
from headstart.searching.space import Space
from headstart.searching.units import Units
from headstart.system.errors import UserError

MEASURES = ("parameters", "flops_per_token", "kv_cache_bytes_per_token", "weight_bytes")
GRIDS = {
    "llama-tied-gqa": GridSettings(embed_step=6, mlp_min=9, mlp_step=17),
    "llama-untied-gqa": GridSettings(
        layers_min=2, layers_step=2, embed_min=12, embed_step=4, mlp_step=17, head_dim_min=5
    ),
    "gpt_neox-tied": GridSettings(layers_step=2, mlp_min=40, mlp_step=20),
    "gpt_neox-untied": GridSettings(embed_step=8, mlp_min=33, mlp_step=20, head_dim_min=1),
}
TINY = {
    "llama": LlamaConfig(
        vocab_size=9, hidden_size=12, intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=3, head_dim=4, tie_word_embeddings=True,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=9, hidden_size=32, intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=2,
    ),
}  # fmt: skip
TINY_GRID = GridSettings(
    layers_min=2, embed_min=6, embed_step=5, mlp_min=3, mlp_step=8, head_dim_min=1
)
Shape = tuple[int, int, int, int, int]
"""embed, layers, head_dim, and levels of groups and neurons, summed where layers may differ."""

each_grid = pytest.mark.parametrize("kind", GRIDS)
each_tiny = pytest.mark.parametrize("kind", TINY)
each_measure = pytest.mark.parametrize("measure", MEASURES)


@cache
def teacher_of(kind: str) -> Architecture:
    return Architecture.of(TINY[kind] if kind in TINY else random_teacher(kind).config)


def values_of(teacher: Architecture, grid: GridSettings) -> dict[str, list[int]]:
    """The sizes that each axis may take, told without ladders."""
    sizes, ladders = teacher.sizes, ladders_of(teacher, grid)
    rope = teacher.config.rope_parameters
    values = {
        axis: list(range(ladders[axis].low, sizes[axis] + 1, ladders[axis].step))
        for axis in ("embed", "layers", "kv_groups", "mlp")
    }
    heads = [size for size in head_sizes(rope, sizes["head_dim"]) if size >= grid.head_dim_min]
    return {**values, "head_dim": heads if grid.head_dim_min else [sizes["head_dim"]]}


def stock(teacher: Architecture, embed: int, head_dim: int, groups: int) -> bool:
    if teacher.family.name == "llama":
        return embed % (groups * teacher.sizes["q_per_kv"]) == 0
    return embed == groups * head_dim


@cache
def every_uniform(kind: str, measure: str) -> dict[Shape, int]:
    teacher, grid, amounts = teacher_of(kind), GRIDS[kind], {}
    values = values_of(teacher, grid)
    whole = itertools.product(values["embed"], values["layers"], values["head_dim"])
    for (embed, layers, head_dim), (i, groups), (j, neurons) in itertools.product(
        whole, enumerate(values["kv_groups"]), enumerate(values["mlp"])
    ):
        sizes = {"embed": embed, "layers": layers, "head_dim": head_dim}
        sizes = {**teacher.sizes, **sizes, "kv_groups": groups, "mlp": neurons}
        if stock(teacher, embed, head_dim, groups):
            amounts[embed, layers, head_dim, i, j] = teacher.amount(sizes, measure, 32)
    return amounts


@cache
def every_layerwise(kind: str, measure: str) -> dict[Shape, set[int]]:
    """The amounts of all combinations of layers that have the same sums."""
    teacher, amounts = teacher_of(kind), {}
    values = values_of(teacher, TINY_GRID)
    of_layer = [*itertools.product(enumerate(values["kv_groups"]), enumerate(values["mlp"]))]
    whole = itertools.product(values["embed"], values["layers"], values["head_dim"])
    for embed, layers, head_dim in whole:
        for combination in itertools.combinations_with_replacement(of_layer, layers):
            sizes = {"embed": embed, "layers": layers, "head_dim": head_dim}
            sizes["kv_groups"] = tuple(groups for (_, groups), _ in combination)
            sizes["mlp"] = tuple(neurons for _, (_, neurons) in combination)
            sums = (sum(i for (i, _), _ in combination), sum(j for _, (j, _) in combination))
            found = amounts.setdefault((embed, layers, head_dim, *sums), set())
            found.add(teacher.amount({**teacher.sizes, **sizes}, measure, 32))
    return amounts


def shapes_of(rows: Rows) -> Iterator[Shape]:
    columns = (rows.embed, rows.layers, rows.head_dim, rows.groups, rows.first, rows.last)
    for *shape, first, last in zip(*(column.tolist() for column in columns), strict=True):
        assert first <= last
        yield from ((*shape, neurons) for neurons in range(first, last + 1))


def bins_of(amounts: list[int], measure: str) -> Iterator[Bin]:
    """The middle half, the two ends, single amounts, and everything."""
    amounts, generator = sorted(amounts), random.Random(0)
    last = len(amounts) - 1
    for low, high in [(last // 4, last * 3 // 4), (0, last // 9), (last * 8 // 9, last)]:
        yield Bin(amounts[low], amounts[high], measure, 32)
    for amount in generator.sample(amounts, 3):
        yield Bin(amount, amount, measure, 32)
    yield Bin(1, 10 * amounts[-1], measure, 32)


@each_grid
@each_measure
def test_uniform_rows_are_the_stock_shapes_in_the_bin(kind, measure):
    teacher, amounts = teacher_of(kind), every_uniform(kind, measure)
    for bin in bins_of(list(amounts.values()), measure):
        rows = rows_in_bin(teacher, GRIDS[kind], bin, True)
        shapes = list(shapes_of(rows))
        expected = {shape for shape, found in amounts.items() if bin.low <= found <= bin.high}
        assert set(shapes) == expected
        assert len(shapes) == len(expected) == rows.num_shapes()
        assert (rows.smallest, rows.largest) == (min(amounts.values()), max(amounts.values()))
        order = list(zip(rows.embed, rows.layers, rows.head_dim, rows.groups, strict=True))
        assert order == sorted(order)


@each_grid
def test_stock_code_takes_every_uniform_row(kind):
    teacher, grid = teacher_of(kind), GRIDS[kind]
    rows, ladders = rows_in_bin(teacher, grid, Bin(1, 10**9), True), ladders_of(teacher, grid)
    shapes = list(shapes_of(rows))
    shapes = random.Random(0).sample(shapes, min(60, len(shapes)))
    for embed, layers, head_dim, groups, neurons in shapes:
        inner = (Units(ladders["kv_groups"].size(groups)),), (Units(ladders["mlp"].size(neurons)),)
        candidate = Candidate(Units(layers), Units(embed), head_dim, *inner)
        teacher.student(candidate.spec(teacher, Orders.of_teacher(teacher.sizes)))


@each_tiny
@each_measure
def test_layerwise_rows_are_the_sums_of_some_layers_in_the_bin(kind, measure):
    teacher, amounts = teacher_of(kind), every_layerwise(kind, measure)
    assert all(len(found) == 1 for found in amounts.values())  # only the sums weigh
    single = {shape: min(found) for shape, found in amounts.items()}
    for bin in bins_of(list(single.values()), measure):
        rows = rows_in_bin(teacher, TINY_GRID, bin, False)
        shapes = list(shapes_of(rows))
        expected = {shape for shape, found in single.items() if bin.low <= found <= bin.high}
        assert set(shapes) == expected
        assert len(shapes) == len(expected) == rows.num_shapes()


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "layerwise"])
@each_measure
@pytest.mark.parametrize("family", TINY)
def test_an_unreachable_bin_names_the_range_and_the_nearest(family, measure, uniform):
    kind = {"llama": "llama-tied-gqa", "gpt_neox": "gpt_neox-tied"}[family] if uniform else family
    grid = GRIDS[kind] if uniform else TINY_GRID
    every = every_uniform(kind, measure).values() if uniform else every_layerwise(kind, measure)
    every = every if uniform else itertools.chain(*every.values())
    amounts = sorted(set(every))
    gaps = [(a, b) for a, b in itertools.pairwise(amounts) if b - a > 1]
    cases = [(a + 1, b - 1, f"{a:,} and {b:,}") for a, b in random.Random(0).sample(gaps, 5)]
    cases.append((1, amounts[0] - 1, f"{amounts[0]:,}"))
    cases.append((amounts[-1] + 1, amounts[-1] + 9, f"{amounts[-1]:,}"))
    what = measure.replace("_", " ")
    for low, high, nearest in cases:
        expected = (
            f"between {low:,} and {high:,} {what}; this space reaches {amounts[0]:,} to "
            f"{amounts[-1]:,}, and the nearest to the bin are {nearest}: move"
        )
        with pytest.raises(ValueError, match=expected):
            rows_in_bin(teacher_of(kind), grid, Bin(low, high, measure, 32), uniform)


@each_tiny
@each_measure
def test_a_table_that_would_be_too_long_is_thinned(kind, measure, monkeypatch):
    teacher, amounts = teacher_of(kind), every_layerwise(kind, measure)
    *_, everything = bins_of([min(found) for found in amounts.values()], measure)
    whole = rows_in_bin(teacher, TINY_GRID, everything, False)
    for max_rows in (1, 7, 40):
        monkeypatch.setattr(grid_module, "MAX_ROWS", max_rows)
        thinned = rows_in_bin(teacher, TINY_GRID, everything, False)
        assert 0 < len(thinned.groups) < len(whole.groups)
        assert set(shapes_of(thinned)) < set(shapes_of(whole))


@each_tiny
@each_measure
def test_a_thinned_table_misses_no_bin(kind, measure, monkeypatch):
    teacher, amounts = teacher_of(kind), every_layerwise(kind, measure)
    bins = list(bins_of([min(found) for found in amounts.values()], measure))
    whole = [rows_in_bin(teacher, TINY_GRID, bin, False) for bin in bins]
    for max_rows in (1, 7, 40):
        monkeypatch.setattr(grid_module, "MAX_ROWS", max_rows)
        monkeypatch.setattr(grid_module, "PIECE_ROWS", 3 * max_rows)
        for bin, rows in zip(bins, whole, strict=True):
            thinned = rows_in_bin(teacher, TINY_GRID, bin, False)
            assert set(shapes_of(thinned)) <= set(shapes_of(rows))
            assert (thinned.smallest, thinned.largest) == (rows.smallest, rows.largest)


@pytest.mark.parametrize("axis", ["layers", "embed", "kv_groups", "mlp"])
def test_a_step_beyond_the_teacher_keeps_the_axis_whole(axis):
    teacher, grid = teacher_of("llama-tied-gqa"), GridSettings(**{f"{axis}_step": 1000})
    ladder = ladders_of(teacher, grid)[axis]
    assert (ladder.low, ladder.num_levels) == (teacher.sizes[axis], 1)


def test_the_teachers_own_shape_gives_the_defaults(teacher):
    sizes, ladders = teacher.sizes, ladders_of(teacher, GridSettings())
    values = {axis: [ladder.size(i) for i in range(ladder.num_levels)]
              for axis, ladder in ladders.items()}  # fmt: skip
    assert values["layers"] == list(range(1, sizes["layers"] + 1))
    assert values["kv_groups"] == list(range(1, sizes["kv_groups"] + 1))
    assert values["mlp"] == list(range(values["mlp"][0], sizes["mlp"] + 1, values["mlp"][0]))
    for axis, ladder in ladders.items():
        assert values[axis][-1] == sizes[axis] == ladder.size(ladder.top)
        assert [ladder.level(size) for size in values[axis]] == list(range(ladder.num_levels))
    heads = teacher.config.num_attention_heads
    assert all(embed % heads == 0 == embed % 8 for embed in values["embed"])
    assert head_values(teacher, GridSettings()) == [sizes["head_dim"]]


@pytest.fixture(params=GRIDS)
def teacher(request: pytest.FixtureRequest) -> Architecture:
    return teacher_of(request.param)


@pytest.mark.parametrize(
    ("mlp", "step"),
    [(80, 2), (96, 4), (192, 8), (1536, 64), (2560, 80), (8192, 256), (5461, 127), (23, 1)],
)
def test_neurons_go_in_multiples_of_8_of_24_steps_or_more(mlp, step):
    config = LlamaConfig(hidden_size=48, num_attention_heads=6, intermediate_size=mlp)
    assert ladders_of(Architecture.of(config), GridSettings())["mlp"].step == step


@pytest.mark.parametrize(
    ("layers", "grid", "least"),
    [
        (5, GridSettings(), 1),
        (30, GridSettings(), 5),
        (30, GridSettings(layers_step=2), 4),
        (30, GridSettings(layers_step=7), 7),
        (30, GridSettings(layers_min=2), 2),
    ],
)
def test_depth_begins_at_a_sixth_of_the_teachers(layers, grid, least):
    config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=layers)
    assert ladders_of(Architecture.of(config), grid)["layers"].low == least


def test_heads_shrink_where_the_grid_says_so():
    teacher = teacher_of("llama-tied-gqa")
    assert head_values(teacher, GridSettings(head_dim_min=1)) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert head_values(teacher, GridSettings(head_dim_min=6, head_dim_step=4)) == [8, 12, 16]
    assert head_values(teacher, GridSettings(head_dim_min=16)) == [16]
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0}
    yarn = Architecture.of(config)
    assert head_values(yarn, GridSettings()) == head_values(yarn, GridSettings(head_dim_min=16))
    with pytest.raises(ValueError, match="kind 'yarn'"):
        head_values(yarn, GridSettings(head_dim_min=8))


@pytest.mark.parametrize(
    "entries",
    [
        {"mlp_min": 81},
        {"mlp_step": -8},
        {"layers_min": -1},
        {"embed_min": 49},
        {"kv_groups_min": 3},
        {"head_dim_min": 17},
        {"head_dim_min": -2},
        {"head_dim_min": 4, "head_dim_step": -1},
    ],
)
def test_errors_name_the_setting(entries):
    *_, name = entries
    axis = name.rsplit("_", 1)[0]
    message = rf"{name} {entries[name]}\b.*teacher's {axis} is \d+; choose 1 <= {axis}_min"
    with pytest.raises(ValueError, match=message):
        rows_in_bin(teacher_of("llama-tied-gqa"), GridSettings(**entries), Bin(1, 10**9), True)


def test_a_grid_without_a_stock_shape_is_refused():
    grid = GridSettings(embed_min=17, embed_step=30)
    with pytest.raises(ValueError, match=r"no shape of search\.grid is a legal gpt_neox model"):
        rows_in_bin(teacher_of("gpt_neox-tied"), grid, Bin(1, 10**9), True)
    assert rows_in_bin(teacher_of("gpt_neox-tied"), grid, Bin(1, 10**9), False).num_shapes()


def test_square_attention_keeps_the_shapes_whose_heads_are_as_wide_as_the_stream():
    teacher, everything = teacher_of("llama-tied-gqa"), Bin(1, 10**9)
    grid = GridSettings(embed_min=8, embed_step=4, head_dim_min=2)
    square = replace(grid, square_attention=True)
    shapes, kept = (
        set(shapes_of(rows_in_bin(teacher, which, everything, True))) for which in (grid, square)
    )
    of_width = {
        (embed, layers, head_dim, groups, neurons)
        for embed, layers, head_dim, groups, neurons in shapes
        if (groups + 1) * teacher.sizes["q_per_kv"] * head_dim == embed
    }
    assert kept == of_width and 0 < len(kept) < len(shapes)
    with pytest.raises(ValueError, match="needs the same groups in all layers; choose a uniform"):
        rows_in_bin(teacher, square, everything, False)


@pytest.mark.parametrize(("num_layers", "depths"), [(12, {6, 12}), (15, {6, 12})])
def test_layers_go_by_whole_periods_of_their_kinds(num_layers, depths):
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(num_layers)]
    entries = random_teacher("gemma3_text-tied").config.to_dict()
    entries |= {"layer_types": kinds, "num_hidden_layers": num_layers}
    teacher = Architecture.of(Gemma3TextConfig.from_dict(entries))
    assert teacher.layer_period == 6
    everything = Bin(1, 10**9, "parameters", 32)
    grid = GridSettings(embed_step=24, mlp_step=20, layer_periods=True)
    shuffled = random.Random(0).sample(range(num_layers), num_layers)
    layers = by_periods(tuple(shuffled), 6)
    assert sorted(layers) == list(range(num_layers))
    orders = replace(Orders.of_teacher(teacher.sizes), layers=layers)
    found = set()
    for space in ("coarse-uniform", "coarse-layerwise"):
        sampled = Space.build(teacher, space, everything, grid)
        for seed in range(20):
            candidate = sampled.sample(random.Random(seed))
            student = teacher.student(candidate.spec(teacher, orders))
            found.add(student.sizes["layers"])
            assert student.config.layer_types == kinds[: student.sizes["layers"]]
    assert found == depths
    with pytest.raises(UserError, match=r"fine-uniform removes any layers, and .*layer_periods"):
        Space.build(teacher, "fine-uniform", everything, grid)
    with pytest.raises(UserError, match=r"with layer_periods both are multiples of 6; mend them"):
        Space.build(teacher, "coarse-uniform", everything, replace(grid, layers_min=4))
