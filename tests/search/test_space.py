"""Every candidate that a space proposes lies in its bin, is valid, and runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import random_teacher

from headstart.search.bins import Bin
from headstart.search.candidate import Candidate, Orders, Units
from headstart.search.grid import GridSettings
from headstart.search.space import Space, SpaceName
from headstart.subnet.count import amount
from headstart.subnet.extract import build_student
from headstart.subnet.rules import sizes_of
from headstart.subnet.spec import SubnetSpec, check_spec, student_config

KINDS = ("llama-tied-gqa", "llama-untied-mha-biases", "gpt_neox-untied", "gpt_neox-tied")
TEACHERS = {kind: random_teacher(kind) for kind in KINDS}
MEASURES = ("parameters", "flops_per_token", "kv_cache_bytes_per_token", "weight_bytes")
GRID = GridSettings(embed_step=8, mlp_min=8, mlp_step=8, head_dim_min=4, head_dim_step=4)
CONTEXT = 64

properties = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)


def shuffled_orders(config: Any, rng: random.Random) -> Orders:
    own = Orders.of_teacher(config)

    def shuffled(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rng.sample(units, len(units)))

    return Orders(
        shuffled(own.layers),
        shuffled(own.embed),
        tuple(map(shuffled, own.kv_groups)),
        tuple(map(shuffled, own.mlp)),
    )


def size_of(config: Any, candidate: Candidate, measure: Any) -> int:
    own = candidate.sizes()
    sizes = {axis: tuple(size) if isinstance(size, list) else size for axis, size in own.items()}
    return int(amount(config, {**sizes_of(config), **sizes}, measure, CONTEXT))


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
    share=st.floats(0.2, 0.9),
    seed=st.integers(0, 1 << 30),
)
def test_every_proposal_is_valid_and_in_its_bin(
    kind: str, name: SpaceName, measure: Any, share: float, seed: int
) -> None:
    teacher, rng = TEACHERS[kind], random.Random(seed)
    config = teacher.config
    whole = amount(config, sizes_of(config), measure, CONTEXT)
    bin = Bin(round(whole * share * 0.85), round(whole * share * 1.1), measure, CONTEXT)
    try:
        space = Space.build(config, name, bin, GRID)
    except ValueError as error:  # few shapes have a legal width
        assert "no sub-network has between" in str(error)
        assert name.endswith("uniform")
        return
    orders = shuffled_orders(config, rng)
    for candidate in proposals(space, rng, 12):
        assert bin.low <= size_of(config, candidate, measure) <= bin.high
        assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate
        spec = candidate.spec(config, orders)
        check_spec(config, spec)
        assert SubnetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        everything = (candidate.layers, candidate.embed, *candidate.kv_groups, *candidate.mlp)
        for units in everything:
            assert len(units.dropped) == len(units.added)
            assert name.startswith("fine") or not units.dropped
            assert len(set(units.ranks())) == units.size
        if name.endswith("uniform"):
            student_config(config, spec)
    state = teacher.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    student = build_student(state, config, spec)
    with torch.no_grad():
        logits = student(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 128) and logits.isfinite().all()
    assert student.num_parameters() == size_of(config, candidate, "parameters")


@properties
@given(
    total=st.integers(2, 40),
    data=st.data(),
)
def test_any_set_can_be_written_as_units(total: int, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, total - 1), min_size=1))
    size = len(kept)
    units = Units(
        size,
        tuple(rank for rank in range(size) if rank not in kept),
        tuple(sorted(rank for rank in kept if rank >= size)),
    )
    assert set(units.ranks()) == kept
    assert Units.parse(str(units)) == units


@pytest.mark.parametrize("name", get_args(SpaceName))
def test_samples_spread_over_widths_and_depths(name: SpaceName) -> None:
    config = TEACHERS["llama-tied-gqa"].config
    space = Space.build(config, name, Bin(15_000, 45_000), GRID)
    rng = random.Random(0)
    samples = [space.sample(rng) for _ in range(2000)]
    widths = Counter(one.embed.size for one in samples)
    assert set(widths) == set(space.rows.embed.tolist())
    assert min(widths.values()) > 0.8 * 2000 / len(widths)
    depths = Counter(one.layers.size for one in samples)
    assert set(depths) == set(space.rows.layers.tolist())
    assert min(depths.values()) > 2000 * 0.4 / len(depths)


@pytest.mark.parametrize("name", get_args(SpaceName))
def test_mutations_are_small_and_of_every_kind(name: SpaceName) -> None:
    config = TEACHERS["llama-untied-mha-biases"].config
    space = Space.build(config, name, Bin(40_000, 60_000), GRID)
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


def test_a_child_has_its_layers_from_its_parents() -> None:
    config = TEACHERS["llama-untied-mha-biases"].config
    space = Space.build(config, "fine-layerwise", Bin(40_000, 60_000), GRID)
    rng = random.Random(1)
    inherited = total = 0
    for _ in range(200):
        mother, father = space.sample(rng), space.sample(rng)
        child = space.cross(rng, mother, father)
        for rank, units in zip(child.layers.ranks(), child.kv_groups, strict=True):
            parents = [
                dict(zip(one.layers.ranks(), one.kv_groups, strict=True)).get(rank)
                for one in (mother, father)
            ]
            total += any(parents)
            inherited += units in parents
    assert inherited > 0.5 * total  # the rest was fitted to the bin


def test_proportional_shapes_come_first_by_their_evenness() -> None:
    config = TEACHERS["llama-untied-mha-biases"].config
    sizes = sizes_of(config)
    for name in ("coarse-uniform", "fine-layerwise"):
        space = Space.build(config, name, Bin(40_000, 60_000), GRID)  # type: ignore[arg-type]
        found = space.proportional(10)
        assert len(set(found)) == 10
        spreads = []
        for one in found:
            assert 40_000 <= size_of(config, one, "parameters") <= 60_000
            kept = [one.layers.size / sizes["layers"], one.embed.size / sizes["embed"]]
            for axis in ("kv_groups", "mlp"):
                of_layers = [units.size for units in getattr(one, axis)]
                kept.append(sum(of_layers) / len(of_layers) / sizes[axis])
            spreads.append(torch.tensor(kept, dtype=torch.float64).std(correction=0).item())
        assert spreads == pytest.approx(sorted(spreads))


def test_the_seed_decides_every_proposal() -> None:
    config = TEACHERS["gpt_neox-untied"].config
    space = Space.build(config, "fine-layerwise", Bin(40_000, 80_000), GRID)
    first, second = (proposals(space, random.Random(3), 30) for _ in range(2))
    assert first == second
