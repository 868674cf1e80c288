"""Every candidate that a space proposes lies in the bin, and the spaces are what they say."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from headstart.search.space import (
    SEARCHED_AXES,
    Bin,
    BinSettings,
    Candidate,
    GridSettings,
    Orders,
    Space,
    grid_values,
    parse_count,
    shapes_in_bin,
)
from headstart.subnet.rules import sizes_of
from headstart.subnet.spec import student_config

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
)
GRID = GridSettings(embed_step=16, mlp_step=16)
TOTALS = (6, 64, 4, 160)
SHAPES = shapes_in_bin(CONFIG, GRID, Bin(60_000, 70_000))
ROWS = set(map(tuple, SHAPES.tolist()))
VALUES = [sorted(set(column)) for column in zip(*ROWS, strict=True)]

both_granularities = pytest.mark.parametrize("fine", [False, True], ids=["coarse", "fine"])
two_families = pytest.mark.parametrize(
    "teacher", ["llama-tied-gqa", "gpt_neox-untied"], indirect=True
)


def space(fine: bool, unit_noise: float = 0.5) -> Space:
    return Space(SHAPES, TOTALS, fine, unit_noise)


def ranks(candidate: Candidate) -> list[tuple[int, ...]]:
    return [candidate.layers, candidate.embed, candidate.kv_groups, candidate.mlp]


def shape_of(candidate: Candidate) -> tuple[int, ...]:
    return tuple(map(len, ranks(candidate)))


def is_nearest(shape: tuple[int, ...], target: tuple[int, ...], rows: set[tuple[int, ...]]) -> bool:
    """In fractions of each axis."""
    gaps = {row: sum(np.abs(np.subtract(row, target)) / TOTALS) for row in rows}
    return gaps[shape] == pytest.approx(min(gaps.values()))


def stock_parameters(config: PreTrainedConfig, shape: tuple[int, ...]) -> int | None:
    """Parameters of a real model of this shape; None when stock code cannot express it."""
    layers, embed, kv_groups, mlp = shape
    entries = {"num_hidden_layers": layers, "hidden_size": embed, "intermediate_size": mlp}
    if config.model_type == "llama":
        heads = kv_groups * config.num_attention_heads // config.num_key_value_heads
        legal = embed % heads == 0
        entries |= {"num_attention_heads": heads, "num_key_value_heads": kv_groups}
    else:
        legal = embed == kv_groups * config.hidden_size // config.num_attention_heads
        entries |= {"num_attention_heads": kv_groups}
    if not legal:
        return None
    with torch.device("meta"):
        shaped = type(config).from_dict({**config.to_dict(), **entries})
        return AutoModelForCausalLM.from_config(shaped).num_parameters()


@two_families
def test_shapes_equal_a_loop_over_real_models(teacher: PreTrainedModel) -> None:
    config = teacher.config
    embed_step = 9 if config.model_type == "llama" else 8
    grid = GridSettings(layers_min=2, embed_step=embed_step, mlp_min=16, mlp_step=40)
    embed, mlp = config.hidden_size, config.intermediate_size
    axes = (
        [2, 3, 4],
        sorted({*range(embed_step, embed + 1, embed_step), embed}),
        list(range(1, sizes_of(config)["kv_groups"] + 1)),
        [16, 56, mlp],
    )
    counts = {shape: stock_parameters(config, shape) for shape in itertools.product(*axes)}
    legal = sorted(found for found in counts.values() if found)
    assert None in counts.values()
    bin = Bin(legal[len(legal) // 4], legal[len(legal) * 3 // 4])
    expected = [shape for shape, found in counts.items() if found and bin.low <= found <= bin.high]
    shapes = [tuple(row) for row in shapes_in_bin(config, grid, bin).tolist()]
    assert sorted(shapes) == sorted(expected)
    orders = Orders.of_teacher(config)
    for shape in shapes:
        student_config(config, Candidate(*map(tuple, map(range, shape))).spec(orders))


@two_families
def test_unreachable_bin_names_the_range_and_the_nearest_counts(teacher: PreTrainedModel) -> None:
    config, whole = teacher.config, teacher.num_parameters()
    grid = GridSettings(layers_step=2, mlp_min=40, mlp_step=20)
    everything = shapes_in_bin(config, grid, Bin(1, whole))
    counts = sorted({stock_parameters(config, tuple(row)) for row in everything.tolist()})
    middle = max(range(1, len(counts)), key=lambda i: counts[i] - counts[i - 1])
    below, above = counts[middle - 1], counts[middle]
    reach = rf"reaches {counts[0]:,} to {whole:,}"
    for low, high, nearest in [
        (below + 1, above - 1, rf"{below:,} and {above:,}"),
        (1, counts[0] - 1, rf"{counts[0]:,}"),
        (whole + 1, whole + 9, rf"{whole:,}"),
    ]:
        with pytest.raises(ValueError, match=rf"{reach}, and .* are {nearest}: move"):
            shapes_in_bin(config, grid, Bin(low, high))


def test_grid_defaults_and_the_teachers_own_size(teacher: PreTrainedModel) -> None:
    config, sizes = teacher.config, sizes_of(teacher.config)
    uneven = grid_values(config, GridSettings(3, 3, 5, 7, 1, 2, 11, 13))
    assert uneven["mlp"][:2] == [11, 24]
    values = grid_values(config, GridSettings())
    for axis in SEARCHED_AXES:
        assert values[axis][-1] == uneven[axis][-1] == sizes[axis]
    assert values["layers"] == [1, 2, 3, 4]
    assert values["kv_groups"] == list(range(1, sizes["kv_groups"] + 1))
    assert values["mlp"] == list(range(8, config.intermediate_size + 1, 8))
    assert all(embed % config.num_attention_heads == 0 == embed % 8 for embed in values["embed"])


@pytest.mark.parametrize(
    "grid", [{"mlp_min": 161}, {"mlp_step": -8}, {"layers_min": -1}, {"embed_step": 65}]
)
def test_grid_errors_name_the_setting(grid: dict[str, int]) -> None:
    (name,) = grid
    axis = name.split("_")[0]
    with pytest.raises(ValueError, match=rf"{name} {grid[name]}.*teacher's {axis} is \d+"):
        grid_values(CONFIG, GridSettings(**grid))


@both_granularities
def test_every_operator_stays_in_the_space_and_obeys_its_seed(fine: bool) -> None:
    def walk(seed: int) -> list[Candidate]:
        rng, ours = random.Random(seed), space(fine)
        found = [ours.sample(rng)]
        for _ in range(5):
            father = ours.sample(rng)
            mutant = ours.mutate(rng, found[-1])
            found += [father, mutant, ours.cross(rng, mutant, father)]
        return found

    walks = [walk(seed) for seed in range(60)]
    for candidate in itertools.chain(*walks):
        assert shape_of(candidate) in ROWS
        for units, total in zip(ranks(candidate), TOTALS, strict=True):
            assert list(units) == sorted(set(units))
            assert set(units) <= set(range(total))
            assert fine or units == tuple(range(len(units)))
    assert walk(7) == walks[7] != walks[8]


@both_granularities
def test_samples_spread_evenly_over_widths(fine: bool) -> None:
    rows_of_width = Counter(row[1] for row in ROWS)
    assert max(rows_of_width.values()) > 5 * min(rows_of_width.values())  # rows alone would clump
    rng, ours, num_samples = random.Random(0), space(fine), 1500
    widths = Counter(len(ours.sample(rng).embed) for _ in range(num_samples))
    expected = num_samples / len(VALUES[1])
    assert set(widths) == set(VALUES[1])
    assert all(0.8 < found / expected < 1.2 for found in widths.values())


def test_unit_noise_sets_how_far_samples_stray_from_the_order() -> None:
    def stray(unit_noise: float) -> float:
        """Mean share of kept channels beyond the prefix."""
        rng, ours = random.Random(0), space(True, unit_noise)
        kept = [ours.sample(rng).embed for _ in range(200)]
        return float(np.mean([np.mean(np.array(units) >= len(units)) for units in kept]))

    assert stray(0) == 0
    assert 0 < stray(0.1) < stray(0.5) < stray(1)


@both_granularities
def test_mutation_moves_on_from_every_shape(fine: bool) -> None:
    rng, ours, changed = random.Random(0), space(fine), []
    for row in sorted(ROWS):
        whole = zip(TOTALS, row, strict=True)
        parent = Candidate(*(tuple(sorted(rng.sample(range(t), n))) for t, n in whole))
        mutants = [ours.mutate(rng, parent) for _ in range(30)]
        changed += [mutant != parent for mutant in mutants]
        assert len({shape_of(mutant) for mutant in mutants} - {row}) >= 2
    assert np.mean(changed) > 0.6


@both_granularities
def test_mutation_is_small(fine: bool) -> None:
    """One axis moves by at most two steps and the rest follows, or one axis exchanges units."""
    rng, ours = random.Random(1), space(fine)
    parent = ours.sample(rng)
    for _ in range(300):
        mutant = ours.mutate(rng, parent)
        before, after = shape_of(parent), shape_of(mutant)
        if before == after:
            assert sum(a != b for a, b in zip(ranks(parent), ranks(mutant), strict=True)) <= 1
        moved = []
        for column, values in enumerate(VALUES):
            num_steps = abs(values.index(before[column]) - values.index(after[column]))
            target = (*before[:column], after[column], *before[column + 1 :])
            rows = {row for row in ROWS if row[column] == after[column]}
            moved.append(num_steps <= 2 and is_nearest(after, target, rows))
        assert any(moved)
        parent = mutant


@both_granularities
def test_a_child_has_its_parents_sizes_and_shared_units(fine: bool) -> None:
    rng, ours = random.Random(0), space(fine)
    for _ in range(100):
        mother, father = ours.sample(rng), ours.sample(rng)
        assert ours.cross(rng, mother, mother) == mother
        child = ours.cross(rng, mother, father)
        mixes = itertools.product(*zip(shape_of(mother), shape_of(father), strict=True))
        assert any(is_nearest(shape_of(child), mix, ROWS) for mix in mixes)
        for kept, hers, his in zip(ranks(child), ranks(mother), ranks(father), strict=True):
            shared = set(hers) & set(his)
            assert shared <= set(kept) or set(kept) <= shared


def test_a_candidate_reads_each_layer_through_its_order() -> None:
    rng = random.Random(0)
    layers, embed, *per_layer = (
        [tuple(rng.sample(range(total), total)) for _ in range(6)] for total in TOTALS
    )
    orders = Orders(layers[0], embed[0], *map(tuple, per_layer))
    candidate = space(True).sample(rng)
    spec = candidate.spec(orders)
    assert spec.layers == tuple(sorted(orders.layers[rank] for rank in candidate.layers))
    assert spec.embed == tuple(sorted(orders.embed[rank] for rank in candidate.embed))
    for position, layer in enumerate(spec.layers):
        for axis in ("kv_groups", "mlp"):
            order = getattr(orders, axis)[layer]
            kept = {order[rank] for rank in getattr(candidate, axis)}
            assert getattr(spec, axis)[position] == tuple(sorted(kept))
    spec.validate(sizes_of(CONFIG))


@both_granularities
def test_candidates_survive_json(fine: bool) -> None:
    for seed in range(20):
        candidate = space(fine).sample(random.Random(seed))
        assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate
        assert tuple(candidate.sizes.values()) == shape_of(candidate)


def test_counts_are_read() -> None:
    texts: list[int | str] = [7, "12", "1_000", "385M", "1.5k", "2b"]
    assert list(map(parse_count, texts)) == [7, 12, 1000, 385 * 10**6, 1500, 2 * 10**9]
    for text in ["", "M", "-5", -5, "1.5.2M", "4T", "1 M", "1e9", "1_", "nan"]:
        with pytest.raises(ValueError, match="is not a count"):
            parse_count(text)


def test_bins_are_read(teacher_folder: Path, tmp_path: Path) -> None:
    assert BinSettings(low="385M", high=426_000_000).resolve() == Bin(385 * 10**6, 426 * 10**6)
    assert BinSettings(around="410M", tolerance=0.1).resolve() == Bin(369 * 10**6, 451 * 10**6)
    num_parameters = AutoModelForCausalLM.from_pretrained(teacher_folder).num_parameters()
    (tmp_path / "config.json").write_text((teacher_folder / "config.json").read_text())
    assert BinSettings(around=str(tmp_path), tolerance=0).resolve() == Bin(*[num_parameters] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either low and high"),
        ({"low": 1, "high": 2, "around": 3}, "either low and high"),
        ({"high": 2, "around": "3M"}, "either low and high"),
        ({"low": "2M"}, "empty"),
        ({"high": "2M"}, "empty"),
        ({"low": "2M", "high": "1M"}, "the bin 2,000,000 to 1,000,000 is empty"),
        ({"low": "many", "high": "2M"}, "'many' is not a count"),
        ({"around": "2M", "tolerance": 1}, "tolerance is 1"),
        ({"around": "2M", "tolerance": -0.1}, "tolerance is -0.1"),
        ({"around": "/no/such/model"}, "'/no/such/model' is neither a count such as 410M nor"),
    ],
)
def test_bin_errors_tell_the_mistake(settings: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinSettings(**settings).resolve()
