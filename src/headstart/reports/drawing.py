"""Where on the page the parts of a chart lie.

All places are in percent of the plot from its left and its top, so a drawing fits any width, while
its text and strokes keep their size. The macro `drawing` in `templates/macros.html` writes it as
SVG, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headstart.reports.charts import Axis, Chart, Charts, Numbers, Series

PADDING = 0.06
"""Share of the shown range that is left free beyond the data."""
MAX_TICKS = 7
LINE_UNITS = 10
"""Units of the lines' own coordinates in a percent: fewer digits are too coarse, more are waste."""


@dataclass(frozen=True)
class Mark:
    """A point of a series.

    Attributes:
        x, y: its place.
        tip: the number of what a reader is told of it, in the page's tips; None for nothing.
        colour: where it is not that of the series.
        style: classes for how it is drawn: "pale", "hollow".
        is_beyond: whether it lies above what is shown, and stands at the edge.
    """

    x: float
    y: float
    tip: int | None
    colour: str
    style: str
    is_beyond: bool


@dataclass(frozen=True)
class Line:
    """A series: the path through its points, in `LINE_UNITS` for each percent, and its marks."""

    colour: str
    style: str
    path: str
    radius: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Drawing:
    """One view of a chart; ticks are places and texts, all else is as in `Chart`."""

    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    level: tuple[float, str] | None
    cut: float | None
    band: tuple[float, float] | None
    ring: tuple[float, float] | None
    num_beyond: int


@dataclass
class Tips:
    """What readers are told of marks, each text once; marks refer to it by number."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def draw_all(charts: Charts, tips: Tips) -> dict[str, dict[str, Drawing]]:
    """The drawing of every view of every chart; what is told of marks goes into the tips."""
    return {
        name: {view: draw(chart, tips) for view, chart in views.items()}
        for name, views in charts.items()
    }


def draw(chart: Chart, tips: Tips) -> Drawing:
    """Lay out one view of a chart."""
    xs = [x for series in chart.series for x in series.x]
    ys = [y for series in chart.series for y in series.y]
    level = chart.level if chart.level and _has_place(chart.level[0], chart.y) else None
    if level:
        ys.append(level[0])
    if chart.cut is not None:
        xs.append(chart.cut)
    x_scale, y_scale = Scale.of(chart.x, xs), Scale.of(chart.y, ys)

    def across(x: float) -> float:
        return x_scale.place(x)

    def down(y: float) -> float:
        return round(100 - y_scale.place(y), 2)

    lines = [_line(series, x_scale, y_scale, chart.x, chart.y, tips) for series in chart.series]
    band = None
    if chart.band:
        start, end = map(across, chart.band)
        band = (start, round(end - start, 2))
    return Drawing(
        x_title=chart.x.title,
        y_title=chart.y.title,
        x_ticks=[(across(at), text) for at, text in x_scale.ticks(chart.x)],
        y_ticks=[(down(at), text) for at, text in y_scale.ticks(chart.y)],
        lines=lines,
        level=(down(level[0]), level[1]) if level else None,
        cut=None if chart.cut is None else across(chart.cut),
        band=band,
        ring=(across(chart.ring[0]), max(down(chart.ring[1]), 0)) if chart.ring else None,
        num_beyond=sum(mark.is_beyond for line in lines for mark in line.marks),
    )


@dataclass(frozen=True)
class Scale:
    """From values to percent of the plot, along one axis."""

    low: float
    high: float
    is_log: bool

    @staticmethod
    def of(axis: Axis, values: Numbers) -> Scale:
        """One that shows an axis' limits, and where it has none all values with some room."""
        as_place = _as_place(axis.is_log)
        places = [
            as_place(value) for value in values if value is not None and _has_place(value, axis)
        ]
        least, most = (min(places), max(places)) if places else (0.0, 1.0)
        lowest, highest = axis.limits
        low = least if lowest is None else as_place(lowest)
        high = most if highest is None else as_place(highest)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = abs(low) * PADDING or 1.0
            low, high = low - room, low + room
        room = PADDING * (high - low)
        # Limits on both sides are what shall be seen; a single one is the end of the data.
        if None in axis.limits:
            low, high = low if lowest is not None else low - room, high + room
        return Scale(low, high, axis.is_log)

    def place(self, value: float) -> float:
        at = _as_place(self.is_log)(value)
        return round(100 * (at - self.low) / (self.high - self.low), 2)

    def ticks(self, axis: Axis) -> list[tuple[float, str]]:
        """Values and texts of the ticks, ascending."""
        low, high = self.low, self.high
        if self.is_log:
            low, high = 10**low, 10**high
        if axis.ticks:
            ticks = [tick for tick in axis.ticks if low <= tick <= high]
        elif self.is_log and len(powers := _log_ticks(low, high)) > 1:
            ticks = powers
        else:
            ticks = _linear_ticks(low, high)
        if axis.text:
            return [(tick, axis.text(tick)) for tick in ticks]
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(tick, f"{tick:,.{decimals}f}") for tick in ticks]


def _has_place(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.is_log)


def _as_place(is_log: bool) -> Callable[[float], float]:
    return math.log10 if is_log else float


def _linear_ticks(low: float, high: float) -> list[float]:
    """At most `MAX_TICKS` multiples of 1, 2 or 5 times a power of ten."""
    step = next(
        step
        for step in _steps(10 ** math.floor(math.log10((high - low) / MAX_TICKS)))
        if (high - low) / step <= MAX_TICKS - 1
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _steps(power: float) -> Iterator[float]:
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; where these are too many, powers alone, or some of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MAX_TICKS:
            return ticks
    return ticks[:: math.ceil(len(ticks) / MAX_TICKS)]


def _line(series: Series, x: Scale, y: Scale, x_axis: Axis, y_axis: Axis, tips: Tips) -> Line:
    ceiling = y_axis.limits[1]
    marks, path, is_joined = [], "", False
    for index, (at, value) in enumerate(zip(series.x, series.y, strict=True)):
        if (
            at is None
            or value is None
            or not (_has_place(at, x_axis) and _has_place(value, y_axis))
        ):
            is_joined = False
            continue
        across, down = x.place(at), round(100 - y.place(value), 2)
        if series.line:
            path += _stroke(across, down, is_joined, series.line == "step")
            is_joined = True
        if not series.radius:
            continue
        is_beyond = ceiling is not None and value > ceiling
        marks.append(
            Mark(
                x=across,
                y=0 if is_beyond else down,
                tip=tips.number(series.tips[index]) if series.tips else None,
                colour=series.colours[index] if series.colours else "",
                style=" ".join(
                    name
                    for name, drawn_so in (("pale", series.pale), ("hollow", series.hollow))
                    if drawn_so and drawn_so[index]
                ),
                is_beyond=is_beyond,
            )
        )
    return Line(series.colour, series.line, path, series.radius, tuple(marks))


def _stroke(across: float, down: float, is_joined: bool, is_step: bool) -> str:
    """The next piece of a path, from the point before or, where there is none, anew."""
    x, y = (f"{LINE_UNITS * place:.5g}" for place in (across, down))
    if not is_joined:
        return f"M{x} {y}"
    return f"H{x}V{y}" if is_step else f"L{x} {y}"
