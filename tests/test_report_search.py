"""The section on a search, against candidates whose numbers are set by hand."""

import copy
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from headstart.report_search import MEASURES, search_charts, search_section, write_search_html

Search = dict[str, Any]
HOSTILE = "<script>alert('&')</script>"
SIZES = {"layers": 4, "embed": 64, "kv_groups": 4, "q_per_kv": 2, "head_dim": 16, "mlp": 256}


def make_candidate(generation: int, parameters: int, loss: float | None, **more: Any) -> Search:
    sizes = {"layers": 2, "embed": 32, "kv_groups": 2, "mlp": 128}
    found = {"generation": generation, "origin": "sample", "parameters": parameters, "loss": loss}
    return {**found, "sizes": sizes, **more}


def make_search(*candidates: Search, winner: int = 0, **more: Any) -> Search:
    found = {"space": "fine-uniform", "order": "activation", "bin": [1_000, 2_000]}
    found |= {"teacher": {"name": "org/teacher", "sizes": SIZES}, "candidates": list(candidates)}
    return copy.deepcopy({**found, "winner": winner, **more})


PLAIN = make_search(
    make_candidate(0, 1_100, 9.4), make_candidate(0, 1_900, 9.6), make_candidate(1, 1_500, 9.1)
)
RACED = make_search(
    make_candidate(0, 1_100, 8.0, tokens=256),
    make_candidate(0, 1_900, 9.6, tokens=1_024),
    make_candidate(1, 1_500, 9.1, tokens=1_024),
    make_candidate(1, 1_400, 7.0, tokens=512),
    winner=2,
)


def read_section(search: Search) -> ElementTree.Element:
    """The section, which has to be well-formed."""
    return ElementTree.fromstring(search_section(search, search_charts(search)))


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def best_table(search: Search) -> list[dict[str, str]]:
    """The rows of the table of the best candidates, each by its header."""
    header, *rows = ([text_of(cell) for cell in row] for row in read_section(search).iter("tr"))
    return [dict(zip(header, row, strict=True)) for row in rows]


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
    row = best_table(search)[0]
    assert (row["parameters"], row[MEASURES[measure]]) == ("77", "1,100")


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
    assert "2 paler ones were raced out" in text_of(read_section(RACED))
    assert "raced out" not in text_of(read_section(PLAIN))


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
def test_a_loss_that_is_no_number_is_no_best_and_ranks_last(nothing: float | None) -> None:
    search = make_search(make_candidate(0, 1_100, nothing), make_candidate(0, 1_200, 9.0), winner=1)
    charts = search_charts(search)
    assert charts["search-size"]["data"][0]["y"] == [None, 9.0]
    assert charts["search-order"]["data"][1]["y"] == [None, 9.0]
    assert [row["rank"] for row in best_table(search)] == ["1, winner", "2"]
    assert [row["loss"] for row in best_table(search)] == ["9.000", "–"]


def test_front_is_a_step_line_from_the_smallest_up() -> None:
    candidates = [
        make_candidate(0, size, loss) for size, loss in ((1_900, 8), (1_100, 9), (1_500, 9.5))
    ]
    search = make_search(*candidates, front=[0, 1])
    line = search_charts(search)["search-size"]["data"][1]
    assert (line["x"], line["y"]) == ([1_100, 1_900], [9, 8])
    assert (line["mode"], line["line"]["shape"]) == ("lines", "hv")
    assert "Pareto" in text_of(read_section(search))


@pytest.mark.parametrize("front", [None, [], [0, 2]])
def test_no_line_without_a_front_along_the_bins_measure(front: list[int] | None) -> None:
    """Candidate 2 is larger than 0 and worse: such a front is in another measure."""
    candidates = [make_candidate(0, size, size / 100) for size in (1_100, 1_200, 1_300)]
    search = make_search(*candidates, front=front)
    assert len(search_charts(search)["search-size"]["data"]) == 2
    assert "Pareto" not in text_of(read_section(search))


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


def test_without_a_spec_nothing_is_said_of_its_axes() -> None:
    section = read_section(PLAIN)
    assert "shrank" not in text_of(section)
    assert section.find(".//svg") is None


SPEC = {"layers": "0,3", "embed": "0-15,32-47", "kv_groups": ["1", "0-3"], "mlp": ["0-63", "0-127"]}


def axis_rows(search: Search) -> list[ElementTree.Element]:
    return read_section(search).findall(".//div[@class='axis']")


@pytest.mark.parametrize(("head_dim", "kept"), [(None, 16), ("0-3,8-11", 8)])
def test_bars_are_as_long_as_what_is_kept(head_dim: str | None, kept: int) -> None:
    rows = axis_rows(PLAIN | {"spec": {**SPEC, "head_dim": head_dim}})
    assert [text_of(row) for row in rows[:3]] == [
        "depth2 of 4",
        "embed32 of 64",
        f"head dim{kept} of 16",
    ]
    bars = [row.find(".//div[@style]") for row in rows[:3]]
    widths = [bar.attrib["style"] for bar in bars if bar is not None]
    assert widths == ["width:50.0%", "width:50.0%", f"width:{100 * kept / 16}%"]


def test_teacher_without_a_head_dim_has_no_bar_for_it() -> None:
    search = copy.deepcopy(PLAIN) | {"spec": SPEC}
    del search["teacher"]["sizes"]["head_dim"]
    assert len(axis_rows(search)) == 4


@pytest.mark.parametrize(
    ("place", "fractions"), [(3, {0: 1 / 4, 3: 4 / 4}), (4, {0: 64 / 256, 3: 128 / 256})]
)
def test_cells_are_filled_as_far_as_units_are_kept(place: int, fractions: dict[int, float]) -> None:
    (drawing,) = axis_rows(PLAIN | {"spec": SPEC})[place].findall("svg")
    assert drawing.attrib["viewBox"] == "0 0 4 1"
    cells: dict[str, list[dict[str, float]]] = {"dropped": [], "room": [], "kept": []}
    for cell in drawing.iter("rect"):
        name = cell.attrib.pop("class")
        cells[name].append({key: float(value) for key, value in cell.attrib.items()})
    assert [int(cell["x"]) for cell in cells["dropped"]] == [1, 2]
    assert [int(cell["x"]) for cell in cells["room"]] == [0, 3]
    assert {int(cell["x"]): cell["height"] for cell in cells["kept"]} == fractions
    for cell in cells["kept"]:
        assert cell["y"] + cell["height"] == 1
    small, large = sorted(cells["kept"], key=lambda cell: cell["height"])
    assert small["fill-opacity"] < large["fill-opacity"] <= 1


def test_cells_say_what_they_are() -> None:
    row = axis_rows(PLAIN | {"spec": SPEC})[4]
    titles = list(dict.fromkeys(title.text for title in row.iter("title")))
    assert titles == [
        "layer 0: 64 of 256 mlp",
        "layer 1: dropped",
        "layer 2: dropped",
        "layer 3: 128 of 256 mlp",
    ]
    assert "64–128 of 256 in a kept layer" in text_of(row)


def test_the_ten_best_are_ranked_by_loss() -> None:
    candidates = [make_candidate(index, 1_000 + index, 9 - index % 7) for index in range(12)]
    rows = best_table(make_search(*candidates, winner=6))
    assert [row["rank"] for row in rows] == ["1, winner", *map(str, range(2, 11))]
    ranked = sorted(range(12), key=lambda index: (9 - index % 7, index))[:10]
    assert [row["parameters"] for row in rows] == [f"{1_000 + index:,}" for index in ranked]
    assert rows[0] == {
        "rank": "1, winner",
        "generation": "7",
        "origin": "sample",
        "parameters": "1,006",
        "loss": "3.000",
        "layers": "2",
        "embed": "32",
        "kv groups": "2",
        "mlp": "128",
    }


def test_losses_after_training_rank_first_and_raced_out_ones_last() -> None:
    search = make_search(
        make_candidate(0, 1, 5.0, tokens=64),
        make_candidate(0, 2, 9.0, tokens=64, trained_loss=6.0),
        make_candidate(0, 3, 1.0, tokens=8),
        make_candidate(0, 4, 7.0, tokens=64, trained_loss=5.5),
        winner=3,
    )
    rows = best_table(search)
    assert [row["parameters"] for row in rows] == ["4", "2", "1", "3"]
    assert [row["trained"] for row in rows] == ["5.500", "6.000", "–", "–"]
    assert [row["rank"] for row in rows] == ["1, winner", "2", "3", "4"]


def test_table_has_ranges_and_only_the_axes_there_are() -> None:
    first = make_candidate(0, 1, 5.0) | {"sizes": {"layers": 2, "kv_groups": [1, 4]}}
    second = make_candidate(0, 2, 6.0) | {"sizes": {"layers": 3, "head_dim": 8}}
    one, other = best_table(make_search(first, second))
    assert "trained" not in one
    assert (one["layers"], one["kv groups"], one["head dim"]) == ("2", "1–4", "–")
    assert (other["layers"], other["kv groups"], other["head dim"]) == ("3", "–", "8")


STAND_ALONE = make_search(
    make_candidate(0, 12_345_678, 9.4, trained_loss=4.25),
    make_candidate(0, 11_000_000, 9.6),
    bin=[11_000_000, 13_000_000],
    spec=SPEC,
    loss=9.4,
    parameters=12_345_678,
    settings={"space": "fine-uniform", "evolution": {"population": 16}},
    search_tokens=196_608,
    search_seconds=95.0,
)


def read_page(search: Search, folder: Path) -> str:
    write_search_html(search, folder / "search.html")
    assert [file.name for file in folder.iterdir()] == ["search.html"]
    return (folder / "search.html").read_text(encoding="utf-8")


def test_page_has_the_section_under_a_header_of_its_own(tmp_path: Path) -> None:
    page = read_page(STAND_ALONE, tmp_path)
    assert search_section(STAND_ALONE, search_charts(STAND_ALONE)) in page
    (header,) = re.findall(r"<header>.*?</header>", page, re.DOTALL)
    assert text_of(ElementTree.fromstring(header)) == (
        "headstart search · org/teacher 12.3M parameters at a loss of 9.400 nats before training: "
        "the best of 2 candidates A short training takes it to 4.250 nats. "
        "11.0M to 13.0M parameters · 196,608 tokens in 1m35s"
    )
    assert "space: fine-uniform\nevolution:\n  population: 16\n" in page


def test_page_says_nothing_of_a_training_that_was_not(tmp_path: Path) -> None:
    search = copy.deepcopy(STAND_ALONE)
    del search["candidates"][0]["trained_loss"]
    del search["settings"]
    page = read_page(search, tmp_path)
    assert "short training" not in page
    assert "<h2>Settings</h2>" not in page


def test_page_escapes_every_string_and_loads_nothing(tmp_path: Path) -> None:
    search = copy.deepcopy(STAND_ALONE)
    search |= {"space": HOSTILE, "order": HOSTILE, "settings": {HOSTILE: (HOSTILE,)}}
    search["teacher"]["name"] = HOSTILE
    for candidate in search["candidates"]:
        candidate["origin"] = HOSTILE
    page = read_page(search, tmp_path)
    assert page.count("<script") == read_page(STAND_ALONE, tmp_path).count("<script")
    own = page.replace(page[page.index("<script>") : page.rindex("<script>const charts")], "")
    assert not re.search(r"\b(src|href)=|<(link|iframe|img)\b", own)
    # plotly reads tags in names and hover texts, so none may reach it
    assert "<script" not in json.dumps(search_charts(search))
