"""What a search would do and cost, from configs alone: no weights, no text."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.calibration.activations import can_propagate
from headstart.calibration.costs import propagation_flops
from headstart.calibration.start import calibration_flops, cut_architecture
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.count import Measure, inference_flops_per_token
from headstart.searching.costs import (
    candidate_cut_flops,
    fitness_flops_per_token,
    fitness_preparation_flops,
    importance_flops,
)
from headstart.searching.orders import measured_kinds
from headstart.searching.racing import rung_blocks
from headstart.searching.run import space_of
from headstart.searching.settings import SearchSettings
from headstart.system.device import default_device, has_fast_bf16

NUM_SAMPLES = 200


@dataclass(frozen=True)
class SearchPlan:
    """What a search would do.

    Attributes:
        measure: of the bin.
        bin: its low and high end.
        reachable: the least and greatest amount that the space holds, whatever the bin.
        num_shapes: shapes in the bin; layers that may differ count by their sums.
        ranges: axis -> smallest and largest size among sampled candidates.
        parameters: the least, the median and the greatest among them.
        calibration_tokens: of training text, for orders and for what `init` needs.
        num_candidates: that would be scored.
        tokens: that scoring them reads at least (all but the elites drop out at the first rung),
            and at most (none drops out).
        flops: of the same, with the calibration.
        finals_flops: of the last round's refits, training and scoring.
        flops_per_second: of a large matrix product on this machine, measured now.
    """

    measure: Measure
    bin: tuple[int, int]
    reachable: tuple[int, int]
    num_shapes: int
    ranges: dict[str, tuple[int, int]]
    parameters: tuple[int, int, int]
    calibration_tokens: int
    num_candidates: int
    tokens: tuple[int, int]
    flops: tuple[int, int]
    finals_flops: int
    flops_per_second: float

    def seconds(self) -> tuple[float, float]:
        """At least and at most, if every FLOP went as fast as in a large matrix product."""
        low, high = (flops + self.finals_flops for flops in self.flops)
        return low / self.flops_per_second, high / self.flops_per_second


def plan_search(teacher: Architecture, settings: SearchSettings, context_length: int) -> SearchPlan:
    """Plan a search of a single bin, on blocks of `context_length` tokens.

    Raises:
        UserError: the bin or grid is malformed, or no candidate can meet the bin.
    """
    settings = settings.for_teacher(teacher)
    space = space_of(teacher, settings, context_length)
    teacher = cut_architecture(teacher, settings.init)
    bin, evolution = settings.bin.resolve(context_length), settings.evolution
    rng = random.Random(evolution.seed)
    shapes = [space.sample(rng).sizes() for _ in range(NUM_SAMPLES)]
    samples = [{**teacher.sizes, **shape} for shape in shapes]
    flops_per_token = statistics.mean(
        fitness_flops_per_token(teacher, sizes, settings, context_length) for sizes in samples
    )
    plain_flops_per_token = statistics.mean(
        inference_flops_per_token(teacher.layouts, sizes, context_length) for sizes in samples
    )
    num_refit_blocks = 0
    if settings.scored_as == "refitted":
        num_refit_blocks = -(-settings.refit_tokens // context_length)
    flops_per_cut = statistics.mean(
        candidate_cut_flops(teacher, sizes, num_refit_blocks, context_length) for sizes in samples
    )
    counts = sorted(teacher.amount(sizes, "parameters", context_length) for sizes in samples)
    ranges = {}
    for axis in shapes[0]:
        values = np.hstack([shape[axis] for shape in shapes])
        ranges[axis] = (int(values.min()), int(values.max()))

    num_candidates = evolution.population * evolution.generations
    if settings.space == "coarse-uniform":  # a candidate is its shape
        num_candidates = min(num_candidates, space.rows.num_shapes())
    if evolution.method == "importance":  # one for each row
        num_candidates = min(num_candidates, len(space.rows.embed))
    rungs = rung_blocks(-(-settings.tokens // context_length), settings.racing)
    all_tokens, first_tokens = rungs[-1] * context_length, rungs[0] * context_length
    survivors = min(num_candidates, settings.racing.keep or evolution.elites)
    least_tokens = num_candidates * first_tokens + survivors * (all_tokens - first_tokens)
    tokens = (least_tokens, num_candidates * all_tokens)
    cuts = (num_candidates + survivors * (len(rungs) - 1), num_candidates * len(rungs))
    least_flops, most_flops = (
        round(number * flops_per_token + num_cuts * flops_per_cut)
        + fitness_preparation_flops(teacher, settings, num_refit_blocks, all_tokens, context_length)
        for number, num_cuts in zip(tokens, cuts, strict=True)
    )
    calibration = _calibration_flops(teacher, settings, samples, context_length)
    finals = settings.finalists
    refits = _finals_refit_flops(teacher, settings, samples, context_length)
    trained_tokens = finals.steps * finals.batch_size * context_length
    finals_tokens = finals.count * (3 * trained_tokens + all_tokens)
    return SearchPlan(
        measure=bin.measure,
        bin=(bin.low, bin.high),
        reachable=(space.rows.smallest, space.rows.largest),
        num_shapes=space.rows.num_shapes(),
        ranges=ranges,
        parameters=(counts[0], counts[len(counts) // 2], counts[-1]),
        calibration_tokens=settings.calibration_tokens,
        num_candidates=num_candidates,
        tokens=tokens,
        flops=(calibration + least_flops, calibration + most_flops),
        finals_flops=round(finals_tokens * plain_flops_per_token + refits),
        flops_per_second=_flops_per_second(),
    )


def _calibration_flops(
    teacher: Architecture, settings: SearchSettings, samples: Sequence[Sizes], context_length: int
) -> int:
    """Of the axis orders, of what `init` measures, and of refitting the chosen candidate."""
    num_blocks = -(-settings.calibration_tokens // context_length)
    kinds = measured_kinds(settings) or ()
    flops = importance_flops(teacher, kinds, num_blocks * context_length, context_length)
    is_refitted = settings.init != "slice" and not can_propagate(teacher)
    if is_refitted or settings.is_measured:
        flops += calibration_flops(teacher, settings.init, num_blocks, context_length)
    if settings.init == "slice":
        return flops
    return flops + _refit_flops(teacher, samples, num_blocks, context_length)


def _refit_flops(
    teacher: Architecture, samples: Sequence[Sizes], num_blocks: int, context_length: int
) -> int:
    """Of refitting one candidate layer by layer."""
    refits = (propagation_flops(teacher, sizes, num_blocks, context_length) for sizes in samples)
    return round(statistics.mean(refits))


def _finals_refit_flops(
    teacher: Architecture, settings: SearchSettings, samples: Sequence[Sizes], context_length: int
) -> int:
    """Of refitting all finalists, and of the teacher's moments if the search has not got them."""
    init, count = settings.finals_init, settings.finalists.count
    if init == "slice" or not count:
        return 0
    num_blocks = -(-settings.finals_calibration_tokens // context_length)
    flops = count * _refit_flops(teacher, samples, num_blocks, context_length)
    if not settings.is_measured and not can_propagate(teacher):
        flops += calibration_flops(teacher, init, num_blocks, context_length)
    return flops


def plan_table(plan: SearchPlan, title: str) -> Table:
    """A plan for the terminal."""

    def span(ends: tuple[float, float]) -> str:
        low, high = (f"{end:,.0f}" if end < 1e12 else f"{end:.2e}" for end in ends)
        return low if low == high else f"{low} to {high}"

    table = Table(title=title, show_header=False, box=SIMPLE_HEAD)
    table.add_row(plan.measure.replace("_", " ") + " in the bin", span(plan.bin))
    table.add_row("reachable in this space", span(plan.reachable))
    table.add_row("shapes in the bin", f"{plan.num_shapes:,}")
    for axis, ends in plan.ranges.items():
        table.add_row(f"{axis} of {NUM_SAMPLES} samples", span(ends))
    least, median, most = plan.parameters
    table.add_row("parameters of the same", f"{least:,} to {most:,}, median {median:,}")
    table.add_row("tokens of calibration", f"{plan.calibration_tokens:,}")
    table.add_row("candidates", f"{plan.num_candidates:,}")
    table.add_row("tokens scored", span(plan.tokens))
    table.add_row("FLOPs, calibration included", span(plan.flops))
    if plan.finals_flops:
        table.add_row("FLOPs of the finals", f"{plan.finals_flops:.2e}")
    low, high = (seconds / 60 for seconds in plan.seconds())
    rate = f"{plan.flops_per_second / 1e9:,.0f} GFLOP/s"
    table.add_row(f"minutes at this machine's {rate}", f"{low:,.1f} to {high:,.1f}, or more")
    return table


def _flops_per_second() -> float:
    """The rate of a matrix product of the kind that candidates are made of."""
    device, size = default_device(), 1024
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    (left @ right).sum().item()
    start, repeats = time.perf_counter(), 8
    for _ in range(repeats):
        product = left @ right
    product.sum().item()
    return 2.0 * size**3 * repeats / (time.perf_counter() - start)
