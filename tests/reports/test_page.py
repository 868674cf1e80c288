"""The page of a run."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.reports.examples import (
    HOSTILE,
    SCRATCH_ARM,
    Result,
    budgeted,
    make_arm,
    make_result,
)

from headstart.reports.page import charts_of, write_html
from headstart.reports.table import result_rows

VOID = {"meta", "br", "hr", "img", "link", "input"}


class PageReader(HTMLParser):
    """Collects tags, text and scripts, and fails on a tag that is not closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data


def read_page(result: Result, folder: Path) -> PageReader:
    write_html(result, folder / "report.html")
    reader = PageReader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    page = read_page(make_result(SCRATCH_ARM, make_arm("subnet")), tmp_path)
    assert [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)] == []
    assert [tag for tag, _ in page.tags if tag in ("link", "iframe", "img")] == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    (policy,) = [found["content"] for _, found in page.tags if "http-equiv" in found]
    assert str(policy).startswith("default-src 'none';")
    for cell in result_rows(make_result(SCRATCH_ARM, make_arm("subnet")))[1]:
        assert cell in page.text


def test_page_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert "11.7x fewer" in read_page(make_result(SCRATCH_ARM, make_arm("b")), tmp_path).text


def test_every_string_is_escaped(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm(HOSTILE))
    for key in ("name", "created", "command"):
        result[key] = HOSTILE
    result["teacher"] |= {"name": HOSTILE, "note": HOSTILE}
    result["search"] |= {"space": HOSTILE, "order": HOSTILE}
    result["recipe"] = {HOSTILE: HOSTILE}
    result["environment"] = {HOSTILE: HOSTILE}
    for candidate in result["search"]["candidates"]:
        candidate["origin"] = HOSTILE
    page = read_page(result, tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(HOSTILE) >= 10
    assert HOSTILE not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_tips_cannot_end_their_script(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm(HOSTILE))
    page = read_page(result, tmp_path)
    declaration = page.scripts[-1].splitlines()[0]
    written = declaration.removeprefix("const tips = ").removesuffix(";")
    assert "<" not in written  # though an arm's name has tags
    tips = json.loads(written)
    told = [tips[int(found["data-tip"] or 0)] for _, found in page.tags if "data-tip" in found]
    shown = charts_of(result)
    assert told == [
        tip
        for views in shown.values()
        for chart in views.values()
        for series in chart.series
        if series.tips
        for tip, x in zip(series.tips, series.x, strict=True)
        if x or not chart.x.is_log
    ]
    assert len(tips) == len(set(tips))


def test_a_page_of_a_large_search_is_below_a_megabyte(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    candidate = result["search"]["candidates"][0]
    result["search"]["candidates"] = [
        candidate | {"parameters": 11_000_000 + 977 * place, "loss": 9 + place % 97 / 100}
        for place in range(2_000)
    ]
    read_page(result, tmp_path)
    assert 200_000 < (tmp_path / "report.html").stat().st_size < 1_000_000


def test_page_without_a_search(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet")) | {"search": None}
    result["costs"] |= {"search_flops": 0}
    page = read_page(result, tmp_path)
    assert "without a search" in page.text
    assert "With no search to count, it needs 2.00x fewer FLOPs" in page.text
    assert set(charts_of(result)) == {"loss-tokens", "loss-flops"}


def test_page_without_scratch_draws_no_target(tmp_path: Path) -> None:
    result = make_result(make_arm("subnet"), target_loss=None)
    assert "no arm with random weights was run" in read_page(result, tmp_path).text
    assert charts_of(result)["loss-tokens"]["linear"].level is None


def test_page_shows_what_only_newer_files_hold(tmp_path: Path) -> None:
    spent = dict.fromkeys(("calibration", "search", "training", "teacher", "evaluation"), 2.5e9)
    rates = [
        {"loss_final": 6.0, "learning_rate": 1e-3},
        {"loss_final": 6.25, "learning_rate": 3e-4},
    ]
    newer = {"loss_spread": 0.125, "sweep": rates, "baseline_tokens": [None], "flops": spent}
    result = make_result(SCRATCH_ARM | {"baseline_tokens": [40_000.0]}, make_arm("subnet", **newer))
    result["baselines"] = [{"name": "org/small", "parameters": 10_000_000, "loss": 6.8}]
    text = read_page(result, tmp_path).text
    assert "6.000 ± 0.125" in text and "standard deviation over seeds" in text
    assert "subnet ended at 6.000 at 0.001, 6.250 at 0.0003." in text
    assert "scratch after 40,000 tokens, subnet not within 50,176." in text
    assert "2.50e9" in text


def test_page_shows_a_layer_wise_student_by_its_ranges(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    result["student"]["sizes"] |= {"kv_groups": [1, 3], "mlp": [96, 160]}
    text = read_page(result, tmp_path).text
    assert "96–160" in text
    assert "2–6" in text  # heads: two queries for each key/value group


def test_every_chart_has_its_place(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    page = read_page(result, tmp_path)
    places = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert places == list(charts_of(result))


def test_every_view_has_its_button(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    for candidate in result["search"]["candidates"]:
        candidate["tokens"] = 1024
    page = read_page(result, tmp_path)
    buttons = [found for tag, found in page.tags if tag == "button"]
    views = [list(views) for views in charts_of(result).values()]
    several = [view for names in views if len(names) > 1 for view in names]
    assert [button["data-view"] for button in buttons] == several
    pressed = [button["data-view"] for button in buttons if button["aria-pressed"] == "true"]
    assert pressed == ["linear", "linear", "candidates"]
    drawn = [found for _, found in page.tags if found.get("class") == "chart"]
    assert [found["data-view"] for found in drawn] == [view for names in views for view in names]
    shown = [found["data-view"] for found in drawn if "hidden" not in found]
    assert shown == ["linear", "linear", "", "candidates"]


def test_a_search_without_a_bin_shows_that_of_the_student() -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    assert charts_of(result)["search-size"][""].band == (11_000_000, 13_000_000)
    result["search"] |= {"bin": [1, 2], "measure": "weight_bytes"}
    assert charts_of(result)["search-size"][""].band == (1, 2)


def test_what_the_winner_keeps_is_measured_against_the_teacher(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    assert "shrank" not in read_page(result, tmp_path).text
    spec = {"layers": "0,3", "embed": "0-31", "head_dim": None}
    result["search"]["spec"] = spec | {"kv_groups": ["0", "0-1"], "mlp": ["0-127", "0-63"]}
    text = read_page(result, tmp_path).text
    assert "2 of 4" in text and "32 of 64" in text and "16 of 16" in text
    assert "64–128 of 256 in a kept layer" in text


def test_drawing_highlights_the_kept_layers(tmp_path: Path) -> None:
    page = read_page(make_result(SCRATCH_ARM, make_arm("subnet")), tmp_path)
    bars = [found for tag, found in page.tags if tag == "rect" and found["class"] != "band"]
    assert [bar["class"] for bar in bars] == [
        "kept", "dropped", "dropped", "kept", "kept", "kept"
    ]  # fmt: skip
    widths = [float(bar["width"] or 0) for bar in bars]
    assert widths[-1] / widths[0] == pytest.approx(32 / 64)
    ribbons = [found for tag, found in page.tags if tag == "path" and found["class"] == "path"]
    assert len(ribbons) == 2


def test_a_page_of_several_budgets_draws_what_each_saves(tmp_path: Path) -> None:
    scratch = budgeted("scratch", "random", [7.0, 6.0, 5.0])
    start = budgeted("start", "subnet", [5.5, 5.0, 4.5], 0, 2, 3.5)
    result = make_result(scratch, start)
    charts = charts_of(result)
    tokens, flops = charts["factor-budget"][""].series
    assert tokens.y == [None, 2, 3.5] and flops.y == [0, 1, 1.75]
    assert tokens.hollow == [False, True, False]
    assert (tokens.line, flops.line) == ("solid", "dotted")
    assert tokens.tips[2] == "start, tokens\n4,000 tokens\n3.50x fewer"
    assert charts["loss-tokens"]["linear"].series[0].y == [7.0, 6.0, 5.0]
    text = read_page(result, tmp_path).text
    assert "What it saves at every budget" in text and "3.50x" in text
    assert "What it saves" not in read_page(make_result(SCRATCH_ARM, make_arm("a")), tmp_path).text
    for match in start["matches"]:
        match |= {"tokens_factor": None, "flops_factor": None}
    without = make_result(scratch, start)
    assert "factor-budget" not in charts_of(without)
    assert "Every budget" in read_page(without, tmp_path).text


def test_page_shows_what_models_write_with_their_losses(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    assert "What the models write" not in read_page(result, tmp_path).text
    named = [("teacher", "teacher"), ("student", "student"), ("arm", "scratch"), ("arm", "subnet")]
    models = [{"kind": kind, "name": name, "text": f"{HOSTILE} by {name}"} for kind, name in named]
    result["continuations"] = [{"prompt": f"{HOSTILE} once", "models": models}]
    page = read_page(result, tmp_path)
    assert f"{HOSTILE} once …" in page.text
    words = " ".join(page.text.split())
    for name, loss in (
        ("teacher", "teacher, 3.40 nats"),
        ("student", "student, untrained, 9.10 nats"),
        ("scratch", "scratch, 6.71 nats"),
        ("subnet", "subnet, 6.00 nats"),
    ):
        assert f"{loss} {HOSTILE} by {name}" in words


def test_page_shows_zero_shot_scores(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    assert "Zero-shot" not in read_page(result, tmp_path).text
    scores = {"piqa": {"acc": 0.3, "items": 84}}
    result["zero_shot"] = [
        {
            "kind": "teacher",
            "name": "teacher",
            "tasks": scores | {"copa": {"acc": 1.0, "items": 9}},
        },
        {"kind": "student", "name": "student", "tasks": scores},
        {"kind": "arm", "name": "subnet", "tasks": scores},
    ]
    words = " ".join(read_page(result, tmp_path).text.split())
    assert "teacher 0.300 ± 0.050 1.000 ± 0.000" in words
    assert "student, untrained 0.300 ± 0.050 –" in words
    assert "subnet 0.300 ± 0.050 –" in words
