"""The charts of runs and of searches, against numbers set by hand."""

import math

import pytest
from tests.reports.examples import (
    PLAIN,
    RACED,
    SCRATCH_ARM,
    Search,
    make_arm,
    make_candidate,
    make_result,
    make_search,
)

from headstart.model.count import MEASURES
from headstart.reports.charts import (
    GENERATIONS,
    arm_colours,
    generation_colour,
    highest_shown,
    loss_charts,
    search_charts,
)


def test_arm_colours_are_distinct_and_scratch_is_always_grey() -> None:
    colours = arm_colours(make_result(make_arm("subnet"), SCRATCH_ARM, make_arm("subnet+kd")))
    assert len(set(colours.values())) == 3
    assert colours["scratch"] == arm_colours(make_result(SCRATCH_ARM))["scratch"]


def test_loss_charts_draw_the_curves_points_and_the_target() -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    for name, key in (("loss-tokens", "tokens"), ("loss-flops", "flops")):
        views = loss_charts(result)[name]
        assert [(view, chart.x.is_log) for view, chart in views.items()] == [
            ("linear", False),
            ("log", True),
        ]
        for chart in views.values():
            for series, arm in zip(chart.series, result["arms"], strict=True):
                assert series.x == [point[key] for point in arm["curve"]]
                assert series.y == [point["loss"] for point in arm["curve"]]
                assert series.colour == arm_colours(result)[arm["name"]]
            assert chart.level == (6.71, "scratch’s final loss 6.710")
    tips = loss_charts(result)["loss-flops"]["linear"].series[1].tips
    assert tips[1] == "subnet\n1.100e+12 FLOPs\n8.100 nats"


def test_a_loss_that_diverged_is_left_out() -> None:
    curve = [{"tokens": 0, "flops": 0, "loss": 9.0}, {"tokens": 9, "flops": 9, "loss": math.nan}]
    (series,) = loss_charts(make_result(make_arm("subnet", curve=curve)))["loss-tokens"][
        "linear"
    ].series
    assert series.y == [9.0, None]


def test_sizes_stand_in_the_bin() -> None:
    views = search_charts(PLAIN | {"winner": 2})["search-size"]
    assert list(views) == [""]
    chart = views[""]
    (points,) = chart.series
    assert (points.x, points.y) == ([1_100, 1_900, 1_500], [9.4, 9.6, 9.1])
    assert points.colours[0] == points.colours[1] == generation_colour(0)
    assert points.colours[2] == generation_colour(1)
    assert chart.ring == (1_500, 9.1)
    assert chart.band == (1_000, 2_000)
    low, high = chart.x.limits
    assert low is not None and high is not None and low < 1_000 and high > 2_000
    assert chart.x.title == "parameters"


@pytest.mark.parametrize("measure", [key for key in MEASURES if key != "parameters"])
def test_sizes_are_in_the_measure_of_the_bin(measure: str) -> None:
    candidates = (
        make_candidate(0, 77, 9.4, amount=1_100),
        make_candidate(0, 88, 9.6, amount=1_900),
    )
    search = make_search(*candidates, measure=measure)
    chart = search_charts(search)["search-size"][""]
    assert chart.series[0].x == [1_100, 1_900]
    assert chart.ring == (1_100, 9.4)
    assert chart.x.title == MEASURES[measure]
    assert f"\n77 parameters\n1,100 {MEASURES[measure]}\n" in chart.series[0].tips[0]


def test_best_so_far_falls_with_each_better_candidate() -> None:
    views = search_charts(PLAIN)["search-order"]
    assert list(views) == [""]  # no candidate says how many tokens it took
    chart = views[""]
    points, best = chart.series
    assert points.x == best.x == [1, 2, 3]
    assert (points.y, best.y) == ([9.4, 9.6, 9.1], [9.4, 9.4, 9.1])
    assert chart.ring == (1, 9.4)
    assert best.line == "step"


def test_candidates_that_were_raced_out_are_paler_and_are_no_best() -> None:
    for views in search_charts(RACED).values():
        for chart in views.values():
            assert chart.series[0].pale == [True, False, False, True]
    assert search_charts(RACED)["search-order"]["tokens"].series[1].y == [None, 9.6, 9.1, 9.1]


def test_without_a_race_no_candidate_is_pale() -> None:
    alike = make_search(*(make_candidate(0, 1_100, 9.0, tokens=64) for _ in range(3)))
    some = make_search(make_candidate(0, 1_100, 9.0), make_candidate(0, 1_200, 9.0, tokens=64))
    for search in (PLAIN, alike, some):
        for views in search_charts(search).values():
            assert not any(flag for chart in views.values() for flag in chart.series[0].pale)


def test_the_order_can_be_read_in_tokens() -> None:
    views = search_charts(RACED)["search-order"]
    candidates, tokens = views.values()
    assert [chart.x.title for chart in views.values()] == ["candidates scored", "tokens evaluated"]
    assert list(views) == ["candidates", "tokens"]
    assert candidates.series[0].x == [1, 2, 3, 4]
    for series in tokens.series:
        assert series.x == [256, 1_280, 2_304, 2_816]
    assert tokens.ring == (2_304, 9.1)


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_drawn_and_is_no_best(nothing: float | None) -> None:
    search = make_search(make_candidate(0, 1_100, nothing), make_candidate(0, 1_200, 9.0), winner=1)
    charts = search_charts(search)
    assert charts["search-size"][""].series[0].y == [None, 9.0]
    assert charts["search-order"][""].series[1].y == [None, 9.0]
    assert search_charts(search | {"winner": 0})["search-size"][""].ring is None


def test_losses_far_above_the_others_stand_at_the_edge() -> None:
    """Quartiles of 0, 1, ..., 8 are 2 and 6, so the fence is at 6 + 1.5 * 4 = 12."""
    losses = [*map(float, range(9))]
    search = make_search(*(make_candidate(0, 1_500, loss) for loss in losses))
    assert highest_shown(search) is None
    for beyond, shown in ((11.0, None), (30.0, 7.0)):
        changed = [*losses[:-1], beyond]
        search = make_search(*(make_candidate(0, 1_500, loss) for loss in changed))
        assert highest_shown(search) == shown
        for views in search_charts(search).values():
            assert all(chart.y.limits == (None, shown) for chart in views.values())


@pytest.mark.parametrize("losses", [[1.0] * 7 + [99.0], [1.0, 2.0, 3.0, 99.0]])
def test_no_edge_where_nothing_says_what_is_usual(losses: list[float]) -> None:
    """All alike, or too few of them."""
    search = make_search(*(make_candidate(0, 1_500, loss) for loss in losses))
    assert highest_shown(search) is None


def test_generations_run_from_the_first_colour_to_the_last() -> None:
    hexadecimal = ["#" + "".join(f"{channel:02x}" for channel in at) for at in GENERATIONS]
    assert [generation_colour(part) for part in (0, 0.5, 1)] == hexadecimal
    between = [round((start + end) / 2) for start, end in zip(*GENERATIONS[:2], strict=True)]
    assert generation_colour(0.25) == "#" + "".join(f"{channel:02x}" for channel in between)


def test_front_is_a_step_line_from_the_smallest_up() -> None:
    candidates = [
        make_candidate(0, size, loss) for size, loss in ((1_900, 8), (1_100, 9), (1_500, 9.5))
    ]
    search = make_search(*candidates, front=[0, 1])
    line = search_charts(search)["search-size"][""].series[1]
    assert (line.x, line.y) == ([1_100, 1_900], [9, 8])
    assert (line.line, line.radius) == ("step", 0)


@pytest.mark.parametrize("front", [None, [], [0, 2]])
def test_no_line_without_a_front_along_the_bins_measure(front: list[int] | None) -> None:
    """Candidate 2 is larger than 0 and worse: such a front is in another measure."""
    candidates = [make_candidate(0, size, size / 100) for size in (1_100, 1_200, 1_300)]
    search = make_search(*candidates, front=front)
    assert len(search_charts(search)["search-size"][""].series) == 1


def test_tips_give_lists_as_ranges() -> None:
    sizes = {"layers": 2, "embed": 32, "kv_groups": [1, 4], "mlp": [96, 1_024]}
    search = make_search(make_candidate(4, 12_345, 9.4, tokens=2_048) | {"sizes": sizes})
    for views in search_charts(search).values():
        assert next(iter(views.values())).series[0].tips == [
            "9.400 nats\ngeneration 5, sample\n12,345 parameters\n"
            "layers 2, embed 32, kv_groups 1–4, mlp 96–1,024\non 2,048 tokens"
        ]


@pytest.mark.parametrize(
    ("fitness", "title"),
    [
        ({}, "loss, untrained (nats per token)"),
        ({"fitness": "loss"}, "loss, untrained (nats per token)"),
        ({"fitness": "kl"}, "divergence from the teacher, untrained (nats per token)"),
    ],
)
def test_charts_say_what_candidates_were_scored_by(fitness: Search, title: str) -> None:
    for views in search_charts(PLAIN | fitness).values():
        assert {chart.y.title for chart in views.values()} == {title}
