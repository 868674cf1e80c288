"""Every candidate that a space proposes lies in its bin, is valid, and runs."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from statistics import pstdev
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import random_teacher

from headstart.model.architecture import Architecture
from headstart.model.cut import build_student
from headstart.model.spec import SubnetSpec
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.grid import GridSettings, ladders_of
from headstart.searching.space import Space, SpaceName

KINDS = ("llama-tied-gqa", "llama-untied-mha-biases", "gpt_neox-untied", "gpt_neox-tied")
TEACHERS = {kind: random_teacher(kind) for kind in KINDS}
MEASURES = ("parameters", "flops_per_token", "kv_cache_bytes_per_token", "weight_bytes")
GRID = GridSettings(embed_step=8, mlp_min=8, mlp_step=8, head_dim_min=4, head_dim_step=4)
CONTEXT = 64

properties = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)


def shuffled_orders(teacher: Architecture, rng: random.Random) -> Orders:
    teacher_order = Orders.of_teacher(teacher.sizes)

    def shuffled(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rng.sample(units, len(units)))

    return Orders(
        shuffled(teacher_order.layers),
        shuffled(teacher_order.embed),
        tuple(map(shuffled, teacher_order.kv_groups)),
        tuple(map(shuffled, teacher_order.mlp)),
    )


def size_of(teacher: Architecture, candidate: Candidate, measure: Any) -> int:
    return int(teacher.amount({**teacher.sizes, **candidate.sizes()}, measure, CONTEXT))


def proposals(space: Space, rng: random.Random, count: int) -> list[Candidate]:
    """A random walk through sampling, mutation and crossover."""
    population = [space.sample(rng), space.sample(rng)]
    for _ in range(count):
        operator = rng.choice(("sample", "mutate", "cross"))
        parents = rng.sample(population, {"sample": 0, "mutate": 1, "cross": 2}[operator])
        population.append(getattr(space, operator)(rng, *parents))
    return population


@properties
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(get_args(SpaceName)),
    measure=st.sampled_from(MEASURES),
    tolerance=st.sampled_from((0, 0.01, 0.1, 0.5)),
    seed=st.integers(0, 1 << 30),
)
def test_every_proposal_is_valid_and_in_its_bin(
    kind: str, name: SpaceName, measure: Any, tolerance: float, seed: int
) -> None:
    """Also where the bin holds the amount of a single shape."""
    model, rng = TEACHERS[kind], random.Random(seed)
    teacher = Architecture.of(model.config)
    anything = Space.build(teacher, name, Bin(1, 1 << 40, measure, CONTEXT), GRID).sample(rng)
    reference = size_of(teacher, anything, measure)
    bin = Bin.around(reference, tolerance, measure, CONTEXT)
    space = Space.build(teacher, name, bin, GRID)
    orders = shuffled_orders(teacher, rng)
    for candidate in proposals(space, rng, 12):
        assert bin.low <= size_of(teacher, candidate, measure) <= bin.high
        assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate
        spec = candidate.spec(teacher, orders)
        teacher.check(spec)
        assert SubnetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        everything = (candidate.layers, candidate.embed, *candidate.kv_groups, *candidate.mlp)
        assert name.startswith("fine") or not any(units.dropped for units in everything)
        for units in everything:
            assert len(set(units.ranks())) == units.size
        if name.endswith("uniform"):
            teacher.student(spec)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    student = build_student(state.items(), teacher, spec)
    with torch.no_grad():
        logits = student(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 128) and logits.isfinite().all()
    assert student.num_parameters() == size_of(teacher, candidate, "parameters")


@pytest.mark.parametrize("name", get_args(SpaceName))
def test_samples_spread_over_widths_and_depths(name: SpaceName) -> None:
    teacher = Architecture.of(TEACHERS["llama-tied-gqa"].config)
    space = Space.build(teacher, name, Bin(15_000, 45_000), GRID)
    rng = random.Random(0)
    samples = [space.sample(rng) for _ in range(2000)]
    widths = Counter(candidate.embed.size for candidate in samples)
    assert set(widths) == set(space.rows.embed.tolist())
    assert min(widths.values()) > 0.8 * 2000 / len(widths)
    depths = Counter(candidate.layers.size for candidate in samples)
    assert set(depths) == set(space.rows.layers.tolist())
    assert min(depths.values()) > 2000 * 0.4 / len(depths)


@pytest.mark.parametrize("name", get_args(SpaceName))
def test_mutations_are_small_and_of_every_kind(name: SpaceName) -> None:
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    space = Space.build(teacher, name, Bin(40_000, 60_000), GRID)
    rng = random.Random(0)
    changed: Counter[str] = Counter()
    repeats = 0
    for _ in range(400):
        parent = space.sample(rng)
        child = space.mutate(rng, parent)
        axes = [axis for axis in parent._fields if getattr(parent, axis) != getattr(child, axis)]
        repeats += not axes
        changed.update(axes)
        assert abs(parent.layers.size - child.layers.size) <= 2
    assert set(changed) == {"layers", "embed", "head_dim", "kv_groups", "mlp"}
    assert repeats < 160  # at the edge of the bin; the search asks again


def test_each_move_of_a_mutation_occurs() -> None:
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    space = Space.build(teacher, "fine-layerwise", Bin(40_000, 60_000), GRID)
    rng, moves, num_changed = random.Random(0), Counter[str](), []
    for _ in range(400):
        parent = space.sample(rng)
        child = space.mutate(rng, parent)
        before, after = parent.sizes(), child.sizes()
        num_changed.append(sum(old != new for old, new in zip(parent, child, strict=True)))
        for axis in before:
            if before[axis] != after[axis]:
                same_sum = np.sum(before[axis]) == np.sum(after[axis])
                moves[f"{axis} {'shared' if same_sum else 'resized'}"] += 1
            elif getattr(parent, axis) != getattr(child, axis):
                moves[f"{axis} exchanged"] += 1
    assert np.mean(num_changed) < 1.5
    for axis in ("layers", "embed", "head_dim", "kv_groups", "mlp"):
        assert moves[f"{axis} resized"] > 3
    for axis in ("layers", "embed", "kv_groups", "mlp"):
        assert moves[f"{axis} exchanged"] > 3
    for axis in ("kv_groups", "mlp"):
        assert moves[f"{axis} shared"] > 3


def test_layers_that_stay_keep_their_sizes_when_others_are_exchanged() -> None:
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    space = Space.build(teacher, "fine-layerwise", Bin(40_000, 60_000), GRID)
    rng, exchanged = random.Random(0), 0
    for _ in range(600):
        parent = space.sample(rng)
        child = space.mutate(rng, parent)
        if parent.layers.size == child.layers.size and parent.layers != child.layers:
            exchanged += 1
            for axis in ("kv_groups", "mlp"):
                old, new = (
                    dict(zip(candidate.layers.ranks(), getattr(candidate, axis), strict=True))
                    for candidate in (parent, child)
                )
                assert all(new[rank] == old[rank] for rank in old.keys() & new.keys())
                assert Counter(new.values()) == Counter(old.values())
    assert exchanged > 10


@pytest.mark.parametrize("name", get_args(SpaceName))
def test_a_child_has_the_shape_of_its_parents_or_the_nearest(name: SpaceName) -> None:
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    space = Space.build(teacher, name, Bin(40_000, 60_000), GRID)
    rows, sizes = space.rows, teacher.sizes
    cells = set(zip(*(x.tolist() for x in (rows.embed, rows.layers, rows.head_dim)), strict=True))

    def shape_of(candidate: Candidate) -> tuple[int, int, int]:
        return candidate.embed.size, candidate.layers.size, candidate.head_dim

    def distance(cell: tuple[int, ...], other: tuple[int, ...]) -> float:
        scale = sizes["embed"], sizes["layers"], sizes["head_dim"]
        return sum(abs(a - b) / whole for a, b, whole in zip(cell, other, scale, strict=True))

    rng = random.Random(0)
    for _ in range(40):
        mother, father = space.sample(rng), space.sample(rng)
        assert space.cross(rng, mother, mother) == mother
        child = shape_of(space.cross(rng, mother, father))
        mixes = itertools.product(*zip(shape_of(mother), shape_of(father), strict=True))
        assert any(
            distance(child, mix) == pytest.approx(min(distance(cell, mix) for cell in cells))
            for mix in mixes
        )


def test_a_child_has_its_layers_from_its_parents() -> None:
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    space = Space.build(teacher, "fine-layerwise", Bin(40_000, 60_000), GRID)
    rng = random.Random(1)
    inherited = total = 0
    for _ in range(200):
        mother, father = space.sample(rng), space.sample(rng)
        child = space.cross(rng, mother, father)
        for rank, units in zip(child.layers.ranks(), child.kv_groups, strict=True):
            parents = [
                dict(zip(candidate.layers.ranks(), candidate.kv_groups, strict=True)).get(rank)
                for candidate in (mother, father)
            ]
            total += any(parents)
            inherited += units in parents
    assert inherited > 0.5 * total  # the rest was fitted to the bin


def test_proportional_layers_share_evenly_and_lie_in_the_bin() -> None:
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    space = Space.build(teacher, "fine-layerwise", Bin(40_000, 60_000), GRID)
    found = space.proportional(10)
    assert len(set(found)) == 10
    spreads = []
    for candidate in found:
        assert 40_000 <= size_of(teacher, candidate, "parameters") <= 60_000
        layers = [[units.size for units in inner] for inner in (candidate.kv_groups, candidate.mlp)]
        assert all(max(sizes) - min(sizes) <= step for sizes, step in zip(layers, (1, 8)))  # noqa: B905
        kept = [np.mean(layers[0]) / 6, np.mean(layers[1]) / 80]
        spreads.append(pstdev([candidate.layers.size / 4, candidate.embed.size / 48, *kept]))
    assert spreads == pytest.approx(sorted(spreads))


def test_proportional_shapes_are_the_evenest_of_all() -> None:
    """Of all shapes in the bin, for each width, depth and number of groups only the evenest."""
    teacher = Architecture.of(TEACHERS["llama-untied-mha-biases"].config)
    whole, bin = teacher.sizes, Bin(40_000, 60_000)
    grid = GridSettings(embed_step=8, mlp_min=8, mlp_step=8)
    ladders = ladders_of(teacher, grid)
    values = [
        [ladders[axis].size(level) for level in range(ladders[axis].num_levels)]
        for axis in ("embed", "layers", "kv_groups", "mlp")
    ]
    evenest: dict[tuple[int, ...], tuple[float, int]] = {}
    for embed, layers, groups, neurons in itertools.product(*values):
        shape = {"embed": embed, "layers": layers, "kv_groups": groups, "mlp": neurons}
        size = teacher.amount({**whole, **shape}, "parameters", CONTEXT)
        if bin.low <= size <= bin.high and embed % groups == 0:
            found = (pstdev(shape[axis] / whole[axis] for axis in shape), neurons)
            key = (embed, layers, groups)
            evenest[key] = min(found, evenest.get(key, found))
    ours = Space.build(teacher, "coarse-uniform", bin, grid).proportional(1000)
    shapes = [candidate.sizes() for candidate in ours]
    keys = [(shape["embed"], shape["layers"], shape["kv_groups"]) for shape in shapes]
    assert sorted(keys) == sorted(evenest)
    spreads = [pstdev(shape[axis] / whole[axis] for axis in shape if axis != "head_dim")
               for shape in shapes]  # fmt: skip
    assert spreads == pytest.approx(sorted(spread for spread, _ in evenest.values()))
    assert spreads == pytest.approx([evenest[key][0] for key in keys])


def test_the_seed_decides_every_proposal() -> None:
    teacher = Architecture.of(TEACHERS["gpt_neox-untied"].config)
    space = Space.build(teacher, "fine-layerwise", Bin(40_000, 80_000), GRID)
    first, second = (proposals(space, random.Random(3), 30) for _ in range(2))
    assert first == second
