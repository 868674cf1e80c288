"""What a plan promises, against every shape counted one by one and against races that were run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.searching.conftest import CONFIG
from transformers import LlamaConfig

from headstart.model.architecture import Architecture
from headstart.searching import plan as module
from headstart.searching.bins import BinSettings
from headstart.searching.candidate import Candidate
from headstart.searching.evolution import EvolutionSettings, evolve
from headstart.searching.finalists import FinalistSettings
from headstart.searching.grid import GridSettings
from headstart.searching.journal import Journal
from headstart.searching.plan import SearchPlan, plan_search, plan_table
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.run import space_of
from headstart.searching.settings import SearchSettings

TEACHER = Architecture.of(CONFIG)
SETTINGS = SearchSettings(
    init="slice",
    bin=BinSettings(low=40_000, high=90_000),
    grid=GridSettings(embed_step=16, mlp_step=16),
    evolution=EvolutionSettings(population=8, generations=5, elites=3),
    tokens=16 * 16,
    calibration_tokens=16 * 40,
    scored_as="slice",
    racing=RacingSettings(rungs=3),
)
BLOCK_LENGTH = 16


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1 MFLOP/s."""
    monkeypatch.setattr(module, "_flops_per_second", lambda: 1e6)


def shape_of(layers: int, embed: int, kv_groups: int, mlp: int) -> Architecture:
    config = LlamaConfig(
        **{
            **CONFIG.to_dict(),
            "num_hidden_layers": layers,
            "hidden_size": embed,
            "num_attention_heads": 2 * kv_groups,
            "num_key_value_heads": kv_groups,
            "intermediate_size": mlp,
        }
    )
    return Architecture.of(config)


@cache
def every_shape() -> list[tuple[tuple[int, int, int, int], int]]:
    """Each legal shape of the grid, whatever the bin, with its parameters."""
    axes = range(1, 7), range(16, 65, 16), range(1, 5), range(16, 161, 16)
    return [
        (shape, shape_of(*shape).count(BLOCK_LENGTH).parameters)
        for shape in itertools.product(*axes)
        if shape[1] % (2 * shape[2]) == 0
    ]


def test_shapes_and_ranges_are_those_of_a_loop() -> None:
    shapes = every_shape()
    inside = [shape for shape, parameters in shapes if 40_000 <= parameters <= 90_000]
    plan = plan_search(TEACHER, SETTINGS, BLOCK_LENGTH)
    assert (plan.measure, plan.bin) == ("parameters", (40_000, 90_000))
    assert plan.num_shapes == len(inside) > 100
    sizes = [parameters for _, parameters in shapes]
    assert plan.reachable == (min(sizes), max(sizes))
    for place, axis in enumerate(("layers", "embed", "kv_groups", "mlp")):
        low, high = plan.ranges[axis]
        values = {shape[place] for shape in inside}
        assert min(values) <= low <= high <= max(values)
        assert low < high and {low, high} <= values
    assert plan.ranges["head_dim"] == (8, 8)
    least, median, most = plan.parameters
    assert 40_000 <= least < median < most <= 90_000


class MadeUpFitness:
    """Losses by a rule, on 16 blocks."""

    num_blocks, block_length = 16, BLOCK_LENGTH

    def __init__(self, loss: Callable[[int], float]) -> None:
        self.loss, self.tokens = loss, 0
        self.numbers: dict[Candidate, int] = {}

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        self.tokens += (stop - start) * self.block_length
        number = self.numbers.setdefault(candidate, len(self.numbers))
        return self.loss(number) * (stop - start)


def tokens_of_a_search(settings: SearchSettings, loss: Callable[[int], float], folder: Path) -> int:
    folder.mkdir()
    fitness, journal = MadeUpFitness(loss), Journal(folder / "j", {})
    race = Race(fitness, lambda candidate: 1, journal, settings.racing, settings.evolution.elites)
    evolve(space_of(TEACHER, settings, BLOCK_LENGTH), race, settings.evolution)
    return fitness.tokens


@pytest.mark.parametrize("space", ["fine-uniform", "coarse-layerwise"])
@pytest.mark.parametrize(
    "racing",
    [
        RacingSettings(rungs=3),
        RacingSettings(rungs=1),
        RacingSettings(4, 2, 5),
        RacingSettings(2, 4, 12),
    ],
)
def test_tokens_are_true_bounds(space: Any, racing: RacingSettings, tmp_path: Path) -> None:
    settings = replace(SETTINGS, space=space, racing=racing)
    plan = plan_search(TEACHER, settings, BLOCK_LENGTH)
    assert plan.num_candidates == 40
    least, most = plan.tokens
    if racing.rungs == 1:
        assert least == most == 40 * 256
    # Where none that comes later is as good as the first, only the first go on.
    assert tokens_of_a_search(settings, lambda number: number, tmp_path / "worse") == least
    better = tokens_of_a_search(settings, lambda number: -number, tmp_path / "better")
    assert least < better <= most or least == better == most
    for seed in range(5):
        rng = random.Random(seed)
        tokens = tokens_of_a_search(settings, lambda number: rng.random(), tmp_path / str(seed))  # noqa: B023
        assert least <= tokens <= most
    # Where all are equally good, all go on.
    assert tokens_of_a_search(settings, lambda number: 1.0, tmp_path / "equal") == most


def test_a_small_space_is_not_promised_twice(tmp_path: Path) -> None:
    """There are no more candidates than shapes, where shapes are all that candidates are."""
    settings = replace(SETTINGS, bin=BinSettings(low=60_000, high=62_000))
    plan = plan_search(TEACHER, settings, BLOCK_LENGTH)
    assert plan.num_candidates == plan.num_shapes < 40
    tokens = tokens_of_a_search(settings, lambda number: number, tmp_path / "coarse")
    assert plan.tokens[0] == tokens
    importance = replace(settings.evolution, method="importance")
    fine = replace(settings, space="fine-uniform", evolution=importance)
    plan = plan_search(TEACHER, fine, BLOCK_LENGTH)
    tokens = tokens_of_a_search(fine, lambda number: number, tmp_path / "importance")
    assert plan.tokens[0] <= tokens <= plan.tokens[1]


def calibration_by_hand(passes: int) -> int:
    """Of 640 tokens; a single pass needs no logits."""
    flops = passes * TEACHER.count(BLOCK_LENGTH).inference_flops_per_token
    if passes == 1:
        flops -= 2 * TEACHER.sizes["vocab"] * TEACHER.sizes["embed"]
    return 640 * flops


@pytest.mark.parametrize(
    ("order", "layer_order", "passes"),
    [
        ("teacher", "teacher", 0),
        ("magnitude", "teacher", 0),
        ("activation", "magnitude", 1),
        ("contribution", "teacher", 1),
        ("teacher", "block_influence", 1),
        ("activation", "taylor", 3),
        ("taylor", "block_influence", 3),
    ],
)
def test_flops_are_of_calibration_and_scores(order: Any, layer_order: Any, passes: int) -> None:
    settings = replace(SETTINGS, order=order, layer_order=layer_order)
    plan = plan_search(TEACHER, settings, BLOCK_LENGTH)
    calibration = calibration_by_hand(passes)
    per_token = [
        (flops - calibration) / tokens
        for flops, tokens in zip(plan.flops, plan.tokens, strict=True)
    ]
    assert per_token[0] == pytest.approx(per_token[1], rel=1e-5)
    inside = [
        shape_of(*shape).count(BLOCK_LENGTH).inference_flops_per_token
        for shape, parameters in every_shape()
        if 40_000 <= parameters <= 90_000
    ]
    assert min(inside) < per_token[0] < max(inside)
    assert plan.finals_flops == 0
    assert plan.seconds() == (plan.flops[0] / 1e6, plan.flops[1] / 1e6)


def test_finals_are_paid_for_training_and_scoring() -> None:
    finals = FinalistSettings(count=2, refitted=False, steps=10, batch_size=3)
    plan, plain = (
        plan_search(TEACHER, settings, BLOCK_LENGTH)
        for settings in (replace(SETTINGS, finalists=finals, order="teacher"), SETTINGS)
    )
    calibration = calibration_by_hand(passes=1)
    per_token = (plain.flops[1] - calibration) / plain.tokens[1]
    trained, scored = 10 * 3 * BLOCK_LENGTH, 256
    tokens = 2 * (3 * trained + scored)
    assert plan.finals_flops == pytest.approx(tokens * per_token, rel=1e-5)
    without = replace(SETTINGS, init="least_squares")
    refit = plan_search(TEACHER, without, BLOCK_LENGTH).flops[0] - plain.flops[0]
    num_tokens = SETTINGS.calibration_tokens
    finals = replace(finals, refitted=True, calibration_tokens=num_tokens)
    for init in ("slice", "least_squares"):
        settings = replace(SETTINGS, init=init, finalists=finals)
        refitted = plan_search(TEACHER, settings, BLOCK_LENGTH)
        assert refitted.finals_flops == pytest.approx(plan.finals_flops + 2 * refit, rel=1e-5)
    assert plan.seconds()[0] == pytest.approx((plan.flops[0] + plan.finals_flops) / 1e6)


@pytest.mark.parametrize(
    ("init", "neurons", "tokens"),
    [("slice", 4096, 32_768), ("least_squares", 160, 32_768), ("least_squares", 4096, 49_152)],
)
def test_calibration_grows_with_what_is_refitted(init: Any, neurons: int, tokens: int) -> None:
    """To 12 tokens for each input of the widest matrix."""
    teacher = Architecture.of(LlamaConfig(**{**CONFIG.to_dict(), "intermediate_size": neurons}))
    bin = BinSettings(low=20_000, high=teacher.count(1).parameters)
    settings = replace(SETTINGS, init=init, bin=bin)
    grown, given = (
        plan_search(teacher, replace(settings, calibration_tokens=number), BLOCK_LENGTH)
        for number in (0, tokens)
    )
    assert grown == given and grown.calibration_tokens == tokens
    outputs = teacher.sizes["vocab"] * teacher.sizes["embed"] * 12
    assert grown.flops[0] > 2 * tokens * (teacher.count(1).parameters - outputs)


def test_a_bin_in_another_measure() -> None:
    bin = BinSettings(low=256, high=512, measure="kv_cache_bytes_per_token")
    plan = plan_search(TEACHER, replace(SETTINGS, bin=bin), BLOCK_LENGTH)
    amounts = [
        2 * shape[0] * shape[2] * 8 * 2  # keys and values; 2 bytes, as no precision is named
        for shape, _ in every_shape()
    ]
    assert plan.num_shapes == sum(256 <= amount <= 512 for amount in amounts)
    assert plan.reachable == (min(amounts), max(amounts))


def test_the_table_says_it_all() -> None:
    plan = SearchPlan(
        "flops_per_token", (1_000, 3_000), (500, 9_000), 1_234_567,
        {"layers": (2, 7), "head_dim": (8, 8)}, (11_000, 22_000, 33_000), 4_321, 77,
        (5_000, 6_000), (2 * 10**12, 9 * 10**12), 3_000_000_000, 1e10,
    )  # fmt: skip
    page = StringIO()
    Console(width=120, file=page).print(plan_table(plan, "the title"))
    lines = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    for line in (
        "the title",
        "flops per token in the bin 1,000 to 3,000",
        "reachable in this space 500 to 9,000",
        "shapes in the bin 1,234,567",
        "layers of 200 samples 2 to 7",
        "head_dim of 200 samples 8",
        "parameters of the same 11,000 to 33,000, median 22,000",
        "tokens of calibration 4,321",
        "candidates 77",
        "tokens scored 5,000 to 6,000",
        "FLOPs, calibration included 2.00e+12 to 9.00e+12",
        "FLOPs of the finals 3.00e+09",
        "minutes at this machine's 10 GFLOP/s 3.3 to 15.0, or more",
    ):
        assert line in lines, line
