"""What each chart of the pages shows, as plain data; `drawing.py` says where on the page it lies.

A chart may have several views, between which buttons switch; one that has a single view has it
under the empty name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from headstart.reports.candidates import (
    Candidate,
    Search,
    amount_of,
    fitness_text,
    front_of,
    loss_of,
    measure_text,
    raced_out,
)
from headstart.reports.table import Result, size_text
from headstart.system.formats import tick_of_count, tick_of_power

Numbers = Sequence[float | None]

# Mid-tones, each with enough contrast on the page's white and on its near-black.
GREY = "#858d9a"
ACCENT = "#22a06b"
COLOURS = ("#3f86e0", "#e5732e", "#22a06b", "#b067d9", "#d6506e", "#1f9eb5", "#b08a1e")
GENERATIONS = ((127, 147, 181), (168, 115, 184), (229, 115, 46))
"""Red, green and blue of the first generation, of the middle one and of the last."""

FEWEST_FOR_FENCE = 8
FENCE = 1.5
"""Losses above the upper quartile by more than this many times the distance between the quartiles
stand at the edge of a search's charts (Tukey's fence)."""


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        title: what it shows, with its unit.
        text: writes a tick; None writes it with the decimals that tell ticks apart.
        is_log: values at or below 0 then have no place.
        limits: lowest and highest value shown; None leaves either to what is drawn.
        ticks: where they are; empty leaves that to the drawing.
    """

    title: str
    text: Callable[[float], str] | None = None
    is_log: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points of one kind, with a line through them or without.

    Attributes:
        x, y: of each point; None where there is none, which breaks the line.
        colour: of the line and the marks.
        line: how points are joined; empty for not at all.
        radius: of the marks in pixels; 0 for none.
        tips: what a reader is told of each mark, in lines; empty tells nothing.
        colours: of each mark, where they differ.
        pale, hollow: the marks that are drawn so; empty for none.
    """

    x: Numbers
    y: Numbers
    colour: str
    line: Literal["", "solid", "thin", "dotted", "step"] = ""
    radius: float = 0
    tips: Sequence[str] = ()
    colours: Sequence[str] = ()
    pale: Sequence[bool] = ()
    hollow: Sequence[bool] = ()


@dataclass(frozen=True)
class Chart:
    """One view of a chart.

    Attributes:
        x, y: the axes.
        series: drawn in this order.
        level: a height and its label, drawn as a dashed line across.
        cut: a place, drawn as a dashed line from top to bottom.
        band: from where to where the ground is shaded.
        ring: the point that is marked.
    """

    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: tuple[float, str] | None = None
    cut: float | None = None
    band: tuple[float, float] | None = None
    ring: tuple[float, float] | None = None


Views = Mapping[str, Chart]
Charts = Mapping[str, Views]
"""Every chart of a page by the id of its place."""


def arm_colours(result: Result) -> dict[str, str]:
    """One colour per arm, the same in every table and chart; the reference is grey."""
    names = [arm["name"] for arm in result["arms"]]
    others = [name for name in names if name != result["reference"]]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
    return {name: colours.get(name, GREY) for name in names}


def loss_charts(result: Result) -> dict[str, Views]:
    """Each arm's loss against what it cost, and with several budgets what was saved at each."""
    several = len(result["arms"][0]["budgets"]) > 1
    has_factor = any(
        match.get("tokens_factor") or match.get("flops_factor")
        for arm in result["arms"]
        if arm["init"] != "random"
        for match in arm["matches"]
    )
    factors = {"factor-budget": {"": _factor_chart(result)}} if several and has_factor else {}
    return factors | {
        "loss-tokens": _loss_views(result, "tokens", Axis("training tokens", tick_of_count)),
        "loss-flops": _loss_views(
            result, "flops", Axis("FLOPs spent, all costs counted", tick_of_power)
        ),
    }


def _loss_views(result: Result, key: str, x: Axis) -> Views:
    unit = {"tokens": "{:,} tokens", "flops": "{:.3e} FLOPs"}[key]
    colours = arm_colours(result)
    series = []
    for arm in result["arms"]:
        points = compared_points(arm)
        tips = [
            f"{arm['name']}\n{unit.format(point[key])}\n{point['loss']:.3f} nats"
            for point in points
        ]
        at, losses = [point[key] for point in points], [point["loss"] for point in points]
        series.append(
            Series(at, _finite(losses), colours[arm["name"]], "solid", radius=3, tips=tips)
        )
    target = result["target_loss"]
    level = None
    if target is not None:
        level = (target, f"{result['reference']}’s final loss {target:.3f}")
    y = Axis(f"{result['compared_on']} loss (nats per token)")
    linear = Chart(replace(x, limits=(0, None)), y, tuple(series), level)
    return {"linear": linear, "log": replace(linear, x=replace(x, is_log=True))}


def compared_points(arm: Result) -> list[Result]:
    """The points of an arm's own curve, or what its budgets end with if there are several."""
    budgets: list[Result] = arm["budgets"]
    curve: list[Result] = arm["curve"]
    return budgets if len(budgets) > 1 else curve


def _factor_chart(result: Result) -> Chart:
    """How many times fewer tokens, and FLOPs, each arm needs than the reference at every budget."""
    colours, series = arm_colours(result), []
    for arm in result["arms"]:
        if arm["init"] == "random":
            continue
        matches = arm["matches"]
        for unit, name in (("tokens", "tokens"), ("flops", "FLOPs")):
            factors = [match[f"{unit}_factor"] for match in matches]
            tips = [
                f"{arm['name']}, {name}\n{match['tokens']:,} tokens\n{factor or 0:.2f}x fewer"
                for match, factor in zip(matches, factors, strict=True)
            ]
            series.append(
                Series(
                    [match["tokens"] for match in matches],
                    factors,
                    colours[arm["name"]],
                    "solid" if unit == "tokens" else "dotted",
                    radius=4,
                    tips=tips,
                    hollow=[bool(match["is_bound"]) for match in matches],
                )
            )
    x = Axis("training tokens of the budget", tick_of_count, is_log=True)
    y = Axis("times fewer", "{:g}x".format, is_log=True)
    return Chart(x, y, tuple(series), level=(1, ""))


def search_charts(search: Search) -> dict[str, Views]:
    """Each candidate's loss against its size, and in the order of scoring."""
    return {"search-size": {"": _size_chart(search)}, "search-order": _order_views(search)}


def highest_shown(search: Search) -> float | None:
    """The loss above which candidates stand at the edge, so that the others are told apart; None
    where all are near one another."""
    losses = [loss_of(candidate) for candidate in search["candidates"]]
    finite = sorted(filter(math.isfinite, losses))
    if len(finite) < FEWEST_FOR_FENCE:
        return None
    low, high = (finite[round(part * (len(finite) - 1))] for part in (0.25, 0.75))
    fence = high + FENCE * (high - low)
    shown = [loss for loss in finite if loss <= fence]
    return shown[-1] if high > low and shown[-1] < finite[-1] else None


def _loss_axis(search: Search) -> Axis:
    title = f"{fitness_text(search)}, untrained (nats per token)"
    return Axis(title, limits=(None, highest_shown(search)))


def _size_chart(search: Search) -> Chart:
    candidates = search["candidates"]
    amounts = [amount_of(candidate) for candidate in candidates]
    most = max(candidate["generation"] for candidate in candidates)
    colours = [
        generation_colour(candidate["generation"] / most if most else 0) for candidate in candidates
    ]
    series = [replace(_points(search, amounts), radius=3.5, colours=colours)]
    if front := front_of(search):
        x, y = [amount_of(candidate) for candidate in front], [loss_of(best) for best in front]
        series.append(Series(x, y, GREY, "step"))
    low, high = search["bin"]
    margin = 0.08 * (high - low)
    return Chart(
        Axis(measure_text(search), tick_of_count, limits=(low - margin, high + margin)),
        _loss_axis(search),
        tuple(series),
        band=(low, high),
        ring=_ring(search, amounts),
    )


def generation_colour(part: float) -> str:
    """The colour at a part, from 0 to 1, of the way through `GENERATIONS`."""
    half = min(int(2 * part), 1)
    within = 2 * part - half
    mixed = (
        round(start + within * (end - start))
        for start, end in zip(GENERATIONS[half], GENERATIONS[half + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _order_views(search: Search) -> Views:
    candidates, dropped = search["candidates"], raced_out(search)
    losses = [
        math.inf if out else loss_of(candidate)
        for candidate, out in zip(candidates, dropped, strict=True)
    ]
    best = _finite(list(accumulate(losses, min)))

    def view(x: list[float], title: str) -> Chart:
        series = (_points(search, x), Series(x, best, ACCENT, "step"))
        axis = Axis(title, tick_of_count)
        return Chart(axis, _loss_axis(search), series, ring=_ring(search, x))

    scored = view([*range(1, len(candidates) + 1)], "candidates scored")
    if not all("tokens" in candidate for candidate in candidates):
        return {"": scored}
    tokens: list[float] = list(accumulate(candidate["tokens"] for candidate in candidates))
    return {"candidates": scored, "tokens": view(tokens, "tokens evaluated")}


def _points(search: Search, x: Sequence[float]) -> Series:
    candidates = search["candidates"]
    losses = _finite([loss_of(candidate) for candidate in candidates])
    tips = [_tip(search, candidate) for candidate in candidates]
    return Series(x, losses, GREY, radius=2.5, tips=tips, pale=raced_out(search))


def _tip(search: Search, candidate: Candidate) -> str:
    lines = [
        f"{loss_of(candidate):.3f} nats",
        f"generation {candidate['generation'] + 1}, {candidate['origin']}",
        f"{candidate['parameters']:,} parameters",
        ", ".join(f"{axis} {size_text(size)}" for axis, size in candidate["sizes"].items()),
    ]
    if measure_text(search) != "parameters":
        lines.insert(3, f"{amount_of(candidate):,} {measure_text(search)}")
    if "tokens" in candidate:
        lines.append(f"on {candidate['tokens']:,} tokens")
    return "\n".join(lines)


def _ring(search: Search, x: Sequence[float]) -> tuple[float, float] | None:
    winner = search["winner"]
    loss = loss_of(search["candidates"][winner])
    return (x[winner], loss) if math.isfinite(loss) else None


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
