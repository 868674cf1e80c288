"""The charts of runs and of searches, against numbers set by hand."""

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
from headstart.reports.charts import arm_colours, loss_charts, search_charts


def test_arm_colours_are_distinct_and_scratch_is_always_grey() -> None:
    colours = arm_colours(make_result(make_arm("subnet"), SCRATCH_ARM, make_arm("subnet+kd")))
    assert len(set(colours.values())) == 3
    assert colours["scratch"] == arm_colours(make_result(SCRATCH_ARM))["scratch"]


def test_loss_charts_draw_the_curves_points_and_the_target() -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    for name, key in (("loss-tokens", "tokens"), ("loss-flops", "flops")):
        chart = loss_charts(result)[name]
        for trace, arm in zip(chart["data"], result["arms"], strict=True):
            assert trace["x"] == [point[key] for point in arm["curve"]]
            assert trace["y"] == [point["loss"] for point in arm["curve"]]
            assert trace["line"]["color"] == arm_colours(result)[arm["name"]]
        (target,) = chart["layout"]["shapes"]
        assert target["y0"] == target["y1"] == 6.71


def test_the_log_view_drops_what_has_no_logarithm() -> None:
    chart = loss_charts(make_result(SCRATCH_ARM, make_arm("subnet")))["loss-flops"]
    assert list(chart["views"]) == ["linear", "log"]
    (linear, linear_axis), (log, log_axis) = chart["views"].values()
    assert (
        linear["x"]
        == [trace["x"] for trace in chart["data"]]
        == [[0.0, 4e12], [1e12, 1.1e12, 5e12]]
    )
    assert log["x"] == [[None, 4e12], [1e12, 1.1e12, 5e12]]
    assert (linear_axis["xaxis.type"], log_axis["xaxis.type"]) == ("linear", "log")
    assert linear_axis.keys() == log_axis.keys()  # so that each undoes the other


def test_sizes_stand_in_the_bin() -> None:
    chart = search_charts(PLAIN | {"winner": 2})["search-size"]
    points, ring = chart["data"]
    assert (points["x"], points["y"]) == ([1_100, 1_900, 1_500], [9.4, 9.6, 9.1])
    assert points["marker"]["color"] == [1, 1, 2]  # counted from 1, as on the screen
    assert (ring["x"], ring["y"]) == ([1_500], [9.1])
    (band,) = chart["layout"]["shapes"]
    assert (band["x0"], band["x1"]) == (1_000, 2_000)
    low, high = chart["layout"]["xaxis"]["range"]
    assert low < 1_000 and high > 2_000
    assert chart["layout"]["xaxis"]["title"]["text"] == "parameters"
    assert "views" not in chart


@pytest.mark.parametrize("measure", [key for key in MEASURES if key != "parameters"])
def test_sizes_are_in_the_measure_of_the_bin(measure: str) -> None:
    candidates = (
        make_candidate(0, 77, 9.4, amount=1_100),
        make_candidate(0, 88, 9.6, amount=1_900),
    )
    search = make_search(*candidates, measure=measure)
    chart = search_charts(search)["search-size"]
    assert chart["data"][0]["x"] == [1_100, 1_900]
    assert chart["data"][-1]["x"] == [1_100]
    assert chart["layout"]["xaxis"]["title"]["text"] == MEASURES[measure]
    assert f"77 parameters<br>1,100 {MEASURES[measure]}<br>" in chart["data"][0]["text"][0]


def test_best_so_far_falls_with_each_better_candidate() -> None:
    chart = search_charts(PLAIN)["search-order"]
    points, best, ring = chart["data"]
    assert points["x"] == best["x"] == [1, 2, 3]
    assert (points["y"], best["y"]) == ([9.4, 9.6, 9.1], [9.4, 9.4, 9.1])
    assert (ring["x"], ring["y"]) == ([1], [9.4])
    assert "views" not in chart  # no candidate says how many tokens it took


def test_candidates_that_were_raced_out_are_paler_and_are_no_best() -> None:
    charts = search_charts(RACED)
    for chart in charts.values():
        first, second, third, fourth = chart["data"][0]["marker"]["opacity"]
        assert first == fourth < second == third
    assert charts["search-order"]["data"][1]["y"] == [None, 9.6, 9.1, 9.1]


def test_without_a_race_no_candidate_is_pale() -> None:
    alike = make_search(*(make_candidate(0, 1_100, 9.0, tokens=64) for _ in range(3)))
    some = make_search(make_candidate(0, 1_100, 9.0), make_candidate(0, 1_200, 9.0, tokens=64))
    for search in (PLAIN, alike, some):
        for chart in search_charts(search).values():
            assert len(set(chart["data"][0]["marker"]["opacity"])) == 1


def test_the_order_can_be_read_in_tokens() -> None:
    chart = search_charts(RACED)["search-order"]
    assert list(chart["views"]) == ["candidates", "tokens"]
    (candidates, first_axis), (tokens, second_axis) = chart["views"].values()
    assert candidates["x"] == [trace["x"] for trace in chart["data"]]
    spent = [256, 1_280, 2_304, 2_816]
    assert tokens["x"] == [spent, spent, [2_304]]
    assert first_axis["xaxis.title.text"] == chart["layout"]["xaxis"]["title"]["text"]
    assert second_axis["xaxis.title.text"] == "tokens evaluated"


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_drawn_and_is_no_best(nothing: float | None) -> None:
    search = make_search(make_candidate(0, 1_100, nothing), make_candidate(0, 1_200, 9.0), winner=1)
    charts = search_charts(search)
    assert charts["search-size"]["data"][0]["y"] == [None, 9.0]
    assert charts["search-order"]["data"][1]["y"] == [None, 9.0]


def test_front_is_a_step_line_from_the_smallest_up() -> None:
    candidates = [
        make_candidate(0, size, loss) for size, loss in ((1_900, 8), (1_100, 9), (1_500, 9.5))
    ]
    search = make_search(*candidates, front=[0, 1])
    line = search_charts(search)["search-size"]["data"][1]
    assert (line["x"], line["y"]) == ([1_100, 1_900], [9, 8])
    assert (line["mode"], line["line"]["shape"]) == ("lines", "hv")


@pytest.mark.parametrize("front", [None, [], [0, 2]])
def test_no_line_without_a_front_along_the_bins_measure(front: list[int] | None) -> None:
    """Candidate 2 is larger than 0 and worse: such a front is in another measure."""
    candidates = [make_candidate(0, size, size / 100) for size in (1_100, 1_200, 1_300)]
    search = make_search(*candidates, front=front)
    assert len(search_charts(search)["search-size"]["data"]) == 2


def test_hover_text_gives_lists_as_ranges() -> None:
    sizes = {"layers": 2, "embed": 32, "kv_groups": [1, 4], "mlp": [96, 1_024]}
    search = make_search(make_candidate(4, 12_345, 9.4, tokens=2_048) | {"sizes": sizes})
    for chart in search_charts(search).values():
        assert chart["data"][0]["text"] == [
            "generation 5, sample<br>12,345 parameters<br>"
            "layers 2, embed 32, kv_groups 1–4, mlp 96–1,024<br>on 2,048 tokens"
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
    for chart in search_charts(PLAIN | fitness).values():
        assert chart["layout"]["yaxis"]["title"]["text"] == title
