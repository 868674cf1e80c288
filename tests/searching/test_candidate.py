"""What a candidate says is what its spec keeps, and sets of units are what they claim."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from headstart.model.architecture import Architecture
from headstart.model.rotary import head_channels
from headstart.model.spec import SubnetSpec
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.units import Units, even, exchanged, filled, resized, spread

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=5,
    num_attention_heads=6, num_key_value_heads=3, head_dim=8,
)  # fmt: skip
TEACHER = Architecture.of(CONFIG)
CANDIDATE = Candidate(
    layers=Units(3, dropped=(1,), added=(4,)),
    embed=Units(10, dropped=(0, 9), added=(12, 23)),
    head_dim=4,
    kv_groups=(Units(2), Units(1, dropped=(0,), added=(2,)), Units(3)),
    mlp=(Units(4), Units(20), Units(7, dropped=(6,), added=(19,))),
)
properties = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)
seeds = st.integers(0, 1 << 30).map(random.Random)


@st.composite
def units_of(draw: st.DrawFn, total: int) -> Units:
    """Any set of ranks of an axis."""
    return as_units(draw(st.sets(st.integers(0, total - 1), min_size=1)))


def as_units(kept: set[int]) -> Units:
    size = len(kept)
    dropped = tuple(rank for rank in range(size) if rank not in kept)
    return Units(size, dropped, tuple(sorted(rank for rank in kept if rank >= size)))


def assert_sound(units: Units, total: int) -> None:
    assert len(units.dropped) == len(units.added)
    assert list(units.dropped) == sorted(set(units.dropped))
    assert list(units.added) == sorted(set(units.added))
    assert all(0 <= rank < units.size for rank in units.dropped)
    assert all(units.size <= rank < total for rank in units.added)
    ranks = units.ranks()
    assert list(ranks) == sorted(set(ranks))
    assert len(ranks) == units.size
    assert Units.parse(str(units)) == units


totals = st.integers(1, 40)
one_of_a_total = totals.flatmap(lambda total: st.tuples(st.just(total), units_of(total)))


# Sets of units


@properties
@given(totals.flatmap(lambda total: st.sets(st.integers(0, total - 1), min_size=1)))
def test_any_set_can_be_written_as_units(kept):
    units = as_units(kept)
    assert set(units.ranks()) == kept
    assert_sound(units, max(kept) + 1)


@properties
@given(one_of_a_total, st.integers(1, 40))
def test_a_resized_set_keeps_what_it_can(axis, size):
    total, units = axis
    size = min(size, total)
    other = resized(units, size)
    assert other.size == size
    assert_sound(other, total)
    assert set(other.dropped) <= set(units.dropped)
    assert set(other.added) <= set(units.added)
    assert resized(units, units.size) == units
    if not units.dropped:
        assert other == Units(size)


@properties
@given(one_of_a_total, st.integers(0, 20), st.floats(0, 2), seeds)
def test_exchanges_keep_the_size_and_are_few(axis, count, reach, rng):
    total, units = axis
    other = exchanged(rng, units, total, count, reach)
    assert other.size == units.size
    assert_sound(other, total)
    assert len(set(units.ranks()) - set(other.ranks())) <= 2 * count
    assert not count or units.size == total or other.size < total
    if count == 0 or units.size == total:
        assert other == units


def test_exchanges_near_the_edge_are_the_common_ones():
    """Of 100 ranks 50 are kept: what goes and what comes lies as far as the reach says."""
    for reach in (0.1, 0.5, 1.0):
        rng, outs, ins = random.Random(0), [], []
        for _ in range(400):
            units = exchanged(rng, Units(500), 1000, 1, reach)
            outs += [499 - rank for rank in units.dropped]
            ins += [rank - 500 for rank in units.added]
        for distances in (outs, ins):
            assert sum(distances) / len(distances) < 500 * reach / 2
            assert sum(distances) / len(distances) > 500 * reach / 2 * 0.5


def test_exchanges_are_undone_as_well():
    rng, numbers, units = random.Random(0), [], Units(50)
    for _ in range(400):
        units = exchanged(rng, units, 100, 1, 0.5)
        numbers.append(len(units.dropped))
    assert max(numbers) > 2
    assert min(numbers[50:]) <= 1


@pytest.mark.parametrize("text", ["", "a", "4 -1", "4 +1", "4 -1 +", "-4", "4  -1 +6", "4 1 6"])
def test_malformed_units_are_quoted(text):
    with pytest.raises(ValueError, match=r"is not a set of units|is not a list of indices"):
        Units.parse(text)


# Levels shared among layers


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Levels of some layers, the highest level, and a total that can be met."""
    top = draw(st.integers(0, 12))
    levels = draw(st.lists(st.integers(0, top), min_size=1, max_size=10))
    return levels, top, draw(st.integers(0, top * len(levels)))


@properties
@given(shares(), seeds)
def test_shares_meet_their_total(share, rng):
    levels, top, total = share
    evenly = even(len(levels), total)
    assert max(evenly) - min(evenly) <= 1
    assert evenly == sorted(evenly, reverse=True)
    roughly = spread(rng, len(levels), total, top)
    repaired = filled(rng, list(levels), total, top)
    for found in (evenly, roughly, repaired):
        assert sum(found) == total
        assert len(found) == len(levels)
        assert all(0 <= level <= top for level in found)
    grown = total >= sum(levels)
    assert all((new >= old) == grown or new == old for new, old in zip(repaired, levels))  # noqa: B905


def test_shares_are_from_even_to_rough():
    rng, ranges = random.Random(0), Counter()
    for _ in range(300):
        levels = spread(rng, 12, 60, 10)
        ranges[max(levels) - min(levels)] += 1
    assert ranges[0] > 5
    assert sum(ranges[wide] for wide in range(6, 11)) > 30


# Candidates


def random_orders(rng: random.Random) -> Orders:
    def shuffled(total: int) -> tuple[int, ...]:
        return tuple(rng.sample(range(total), total))

    groups, mlp = (tuple(shuffled(total) for _ in range(5)) for total in (3, 20))
    return Orders(shuffled(5), shuffled(24), groups, mlp)


@pytest.mark.parametrize("seed", range(20))
def test_a_candidate_reads_each_layer_through_its_order(seed):
    orders = random_orders(random.Random(seed))
    spec = CANDIDATE.spec(TEACHER, orders)
    TEACHER.check(spec)
    assert set(spec.embed) == {orders.embed[rank] for rank in (*range(1, 9), 12, 23)}
    assert spec.head_dim == head_channels(CONFIG.rope_parameters, 8, 4)
    of_layer = {  # rank of the layer -> kept ranks of its groups and neurons
        0: ({0, 1}, set(range(4))),
        2: ({2}, set(range(20))),
        4: ({0, 1, 2}, {*range(6), 19}),
    }
    kept = {orders.layers[rank]: ranks for rank, ranks in of_layer.items()}
    assert spec.layers == tuple(sorted(kept))
    for position, layer in enumerate(spec.layers):
        groups, neurons = kept[layer]
        assert set(spec.kv_groups[position]) == {orders.kv_groups[layer][rank] for rank in groups}
        assert set(spec.mlp[position]) == {orders.mlp[layer][rank] for rank in neurons}


def test_one_entry_holds_for_all_layers():
    candidate = CANDIDATE._replace(kv_groups=(Units(2),), mlp=(Units(5, (0,), (9,)),), head_dim=8)
    spec = candidate.spec(TEACHER, Orders.of_teacher(TEACHER.sizes))
    assert spec.layers == (0, 2, 4)
    assert spec.kv_groups == ((0, 1),) * 3
    assert spec.mlp == ((1, 2, 3, 4, 9),) * 3
    assert spec.head_dim is None
    sizes = {"layers": 3, "embed": 10, "head_dim": 8, "kv_groups": 2, "mlp": 5}
    assert candidate.sizes() == sizes
    assert CANDIDATE.sizes() == sizes | {
        "head_dim": 4, "kv_groups": (2, 1, 3), "mlp": (4, 20, 7)
    }  # fmt: skip


def test_the_teachers_order_keeps_the_first_units():
    whole = TEACHER.sizes
    candidate = Candidate(
        Units(whole["layers"]), Units(whole["embed"]), whole["head_dim"],
        (Units(whole["kv_groups"]),), (Units(whole["mlp"]),),
    )  # fmt: skip
    spec = candidate.spec(TEACHER, Orders.of_teacher(TEACHER.sizes))
    assert spec == SubnetSpec.identity(whole)


@properties
@given(units_of(9), units_of(30), st.lists(units_of(5), min_size=1), st.lists(units_of(40)))
def test_candidates_survive_json(layers, embed, kv_groups, mlp):
    candidate = Candidate(layers, embed, 4, tuple(kv_groups), tuple(mlp))
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate


def test_the_journals_form_is_stable():
    assert CANDIDATE.to_json() == {
        "layers": "3 -1 +4",
        "embed": "10 -0,9 +12,23",
        "head_dim": 4,
        "kv_groups": ["2", "1 -0 +2", "3"],
        "mlp": ["4", "20", "7 -6 +19"],
    }
