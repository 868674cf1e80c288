"""The section on a search and its page."""

import copy
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.reports.examples import HOSTILE, PLAIN, RACED, Search, make_candidate, make_search

from headstart.reports.charts import search_charts
from headstart.reports.drawing import Tips, draw_all
from headstart.reports.render import render
from headstart.reports.search import section_of, write_search_html


def section_html(search: Search) -> str:
    charts = draw_all(search_charts(search), Tips())
    return render("search_section.html", charts=charts, search=section_of(search))


def read_section(search: Search) -> ElementTree.Element:
    """The section, which has to be well-formed."""
    return ElementTree.fromstring(section_html(search))


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def best_table(search: Search) -> list[dict[str, str]]:
    """The rows of the table of the best candidates, each by its header."""
    header, *rows = ([text_of(cell) for cell in row] for row in read_section(search).iter("tr"))
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_candidates_that_were_raced_out_are_counted() -> None:
    assert "2 paler ones were raced out" in text_of(read_section(RACED))
    assert "raced out" not in text_of(read_section(PLAIN))


@pytest.mark.parametrize(("front", "drawn"), [([0, 1], True), ([0, 2], False), (None, False)])
def test_a_front_that_is_drawn_is_explained(front: list[int] | None, drawn: bool) -> None:
    candidates = [
        make_candidate(0, size, loss) for size, loss in ((1_900, 8), (1_100, 9), (2_000, 9.5))
    ]
    text = text_of(read_section(make_search(*candidates, front=front)))
    assert ("Pareto" in text) == drawn


def test_without_a_spec_nothing_is_said_of_its_axes() -> None:
    section = read_section(PLAIN)
    assert "shrank" not in text_of(section)
    assert section.find(".//svg[@class='layers']") is None


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
    assert [row["last round"] for row in rows] == ["5.500", "6.000", "–", "–"]
    assert [row["rank"] for row in rows] == ["1, winner", "2", "3", "4"]


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ranks_last(nothing: float | None) -> None:
    search = make_search(make_candidate(0, 1_100, nothing), make_candidate(0, 1_200, 9.0), winner=1)
    assert [row["rank"] for row in best_table(search)] == ["1, winner", "2"]
    assert [row["loss"] for row in best_table(search)] == ["9.000", "–"]


def test_table_has_the_measure_of_the_bin() -> None:
    candidate = make_candidate(0, 77, 9.4, amount=1_100)
    (row,) = best_table(make_search(candidate, measure="weight_bytes"))
    assert (row["parameters"], row["bytes of weights"]) == ("77", "1,100")


def test_table_has_ranges_and_only_the_axes_there_are() -> None:
    first = make_candidate(0, 1, 5.0) | {"sizes": {"layers": 2, "kv_groups": [1, 4]}}
    second = make_candidate(0, 2, 6.0) | {"sizes": {"layers": 3, "head_dim": 8}}
    better, worse = best_table(make_search(first, second))
    assert "last round" not in better
    assert (better["layers"], better["kv groups"], better["head dim"]) == ("2", "1–4", "–")
    assert (worse["layers"], worse["kv groups"], worse["head dim"]) == ("3", "–", "8")


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


def test_page_has_the_section_under_a_header(tmp_path: Path) -> None:
    page = read_page(STAND_ALONE, tmp_path)
    assert section_html(STAND_ALONE) in page
    assert page.count('data-tip="0"') == 2  # the first candidate, in both charts
    (header,) = re.findall(r"<header>.*?</header>", page, re.DOTALL)
    assert text_of(ElementTree.fromstring(header)) == (
        "headstart search · org/teacher 12.3M parameters at a loss of 9.400 nats before training: "
        "the best of 2 candidates The last round takes it to 4.250 nats. "
        "11.0M to 13.0M parameters · 196,608 tokens in 1m35s"
    )
    assert "space: fine-uniform\nevolution:\n  population: 16\n" in page


def test_page_says_nothing_of_a_training_that_was_not(tmp_path: Path) -> None:
    search = copy.deepcopy(STAND_ALONE)
    del search["candidates"][0]["trained_loss"]
    del search["settings"]
    page = read_page(search, tmp_path)
    assert "last round" not in page
    assert "<h2>Settings</h2>" not in page


def test_page_escapes_every_string_and_loads_nothing(tmp_path: Path) -> None:
    search = copy.deepcopy(STAND_ALONE)
    search |= {"space": HOSTILE, "order": HOSTILE, "settings": {HOSTILE: (HOSTILE,)}}
    search["teacher"]["name"] = HOSTILE
    for candidate in search["candidates"]:
        candidate["origin"] = HOSTILE
    page = read_page(search, tmp_path)
    assert HOSTILE not in page
    assert page.count("<script") == read_page(STAND_ALONE, tmp_path).count("<script")
    assert not re.search(r"\b(src|href)=|<(link|iframe|img)\b", page)
