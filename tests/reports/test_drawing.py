"""Where the parts of a chart lie, computed by hand."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.reports.charts import Axis, Chart, Series
from headstart.reports.drawing import MAX_TICKS, Scale, Tips, draw


def chart(x: Axis, y: Axis, *series: Series) -> Chart:
    return Chart(x, y, series)


ZERO_TO_TEN = Axis("x", limits=(0, 10))


def test_places_are_percent_from_the_left_and_the_top() -> None:
    series = Series([0, 5, 10], [0, 10, 2.5], "#123456", "solid", radius=3)
    drawing = draw(chart(ZERO_TO_TEN, ZERO_TO_TEN, series), Tips())
    (line,) = drawing.lines
    assert [(mark.x, mark.y) for mark in line.marks] == [(0, 100), (50, 0), (100, 75)]
    assert line.path == "M0 1000L500 0L1000 750"
    assert drawing.x_ticks == [(at, str(at // 10)) for at in range(0, 101, 20)]
    assert drawing.y_ticks[0] == (100, "0")


def test_a_step_goes_across_and_then_down() -> None:
    series = Series([0, 5, 10], [10, 4, 1], "", "step")
    (line,) = draw(chart(ZERO_TO_TEN, ZERO_TO_TEN, series), Tips()).lines
    assert line.path == "M0 0H500V600H1000V900"
    assert line.marks == ()


def test_a_point_without_a_place_breaks_the_line() -> None:
    series = Series([0, 5, 10, 10], [10, None, 5, 0], "", "solid", radius=1)
    (line,) = draw(chart(ZERO_TO_TEN, ZERO_TO_TEN, series), Tips()).lines
    assert line.path == "M0 0M1000 500L1000 1000"
    assert len(line.marks) == 3


def test_what_is_no_number_is_drawn_nowhere() -> None:
    series = Series([0, 5, math.nan, 10], [10, math.nan, 2, 5], "", "solid", radius=1)
    plain = Chart(ZERO_TO_TEN, ZERO_TO_TEN, (series,), level=(math.nan, "goal"))
    drawing = draw(plain, Tips())
    assert drawing.lines[0].path == "M0 0M1000 500"
    assert drawing.level is None and len(drawing.lines[0].marks) == 2


def test_values_one_rounding_apart_have_ticks() -> None:
    axis = Axis("")
    assert Scale.of(axis, [3.0, math.nextafter(3.0, 4.0)]).ticks(axis)


def test_a_log_scale_drops_what_has_no_logarithm() -> None:
    log = Axis("x", limits=(1, 100), is_log=True)
    series = Series([0, 1, 10, 100], [1, 2, 3, 4], "", "solid", radius=1)
    (line,) = draw(chart(log, ZERO_TO_TEN, series), Tips()).lines
    assert [mark.x for mark in line.marks] == [0, 50, 100]
    assert line.path.startswith("M0 ")


def test_what_lies_above_the_limit_stands_at_the_edge() -> None:
    y = Axis("y", limits=(None, 5))
    series = Series([1, 2, 3], [0, 5, 900], "", radius=1, pale=[False, False, True])
    drawing = draw(chart(ZERO_TO_TEN, y, series), Tips())
    below, at, beyond = drawing.lines[0].marks
    assert (beyond.y, beyond.is_beyond, beyond.style) == (0, True, "pale")
    assert 0 < at.y < below.y < 100 and not at.is_beyond
    assert drawing.num_beyond == 1


def test_tips_are_told_once_and_found_by_their_number() -> None:
    tips = Tips()
    series = Series([1, 2, 3], [1, 2, 3], "", radius=1, tips=["a", "b", "a"])
    for _ in range(2):
        drawing = draw(chart(ZERO_TO_TEN, ZERO_TO_TEN, series), tips)
        assert [mark.tip for mark in drawing.lines[0].marks] == [0, 1, 0]
    assert [*tips.numbers] == ["a", "b"]


def test_band_level_cut_and_ring() -> None:
    plain = Chart(ZERO_TO_TEN, ZERO_TO_TEN, (), level=(4, "goal"), cut=9, band=(2, 5), ring=(1, 10))
    drawing = draw(plain, Tips())
    assert (drawing.level, drawing.cut) == ((60, "goal"), 90)
    assert (drawing.band, drawing.ring) == ((20, 30), (10, 0))


@pytest.mark.parametrize("values", [[], [None, math.nan], [3.0], [3.0, 3.0], [0.0]])
def test_too_few_values_for_a_range_still_have_one(values: list[float | None]) -> None:
    for is_log in (False, True):
        scale = Scale.of(Axis("", is_log=is_log), values)
        assert scale.high > scale.low
        if 3.0 in values:
            assert scale.place(3.0) == 50


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 53_000, ["0", "10,000", "20,000", "30,000", "40,000", "50,000"]),
        (6.69, 6.74, ["6.69", "6.70", "6.71", "6.72", "6.73", "6.74"]),
        (-0.4, 0.4, ["-0.4", "-0.2", "0.0", "0.2", "0.4"]),
    ],
)
def test_ticks_have_the_decimals_that_tell_them_apart(
    low: float, high: float, ticks: list[str]
) -> None:
    axis = Axis("", limits=(low, high))
    assert [text for _, text in Scale.of(axis, []).ticks(axis)] == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.4, 12, [0.5, 1, 2, 5, 10]),
        (1, 1e5, [1, 10, 100, 1e3, 1e4, 1e5]),
        (1, 1e12, [1, 100, 1e4, 1e6, 1e8, 1e10, 1e12]),
        (2.1, 2.9, [2.2, 2.4, 2.6, 2.8]),  # no power in sight
    ],
)
def test_log_ticks(low: float, high: float, ticks: list[float]) -> None:
    axis = Axis("", is_log=True, limits=(low, high))
    assert [at for at, _ in Scale.of(axis, []).ticks(axis)] == pytest.approx(ticks)


@given(
    low=st.floats(-1e12, 1e12),
    span=st.floats(1e-3, 1e12),
    is_log=st.booleans(),
)
def test_ticks_are_few_and_within_what_is_shown(low: float, span: float, is_log: bool) -> None:
    if is_log:
        low = abs(low) + 1e-3
    if low + span <= low or span < abs(low) * 1e-6:
        return  # no difference that a double or a label could show
    axis = Axis("", is_log=is_log, limits=(low, low + span))
    scale = Scale.of(axis, [])
    ticks = scale.ticks(axis)
    assert 1 <= len(ticks) <= MAX_TICKS
    for at, text in ticks:
        assert -0.01 <= scale.place(at) <= 100.01
        assert re.fullmatch(r"-?[\d,]+(\.\d+)?", text)
    assert len({text for _, text in ticks}) == len(ticks)
