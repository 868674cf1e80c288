"""The report's words are checked against a result whose numbers are set by hand."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headstart.report import (
    COLUMNS,
    FORMAT,
    best_arm,
    charts_of,
    factor_text,
    headline,
    load_result,
    markdown_table,
    result_rows,
    result_table,
    write_html,
)
from headstart.report_page import arm_colours, count_text, inline_json, page, size_text

Result = dict[str, Any]
HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


def make_arm(name: str, **changes: Any) -> Result:
    arm = {
        "name": name,
        "init": "subnet",
        "kd": None,
        "learning_rate": 1e-3,
        "parameters": 12_345_678,
        "tokens": 50_176,
        "loss_before": 9.1,
        "loss_final": 6.0,
        "tokens_to_match": 4_300.4,
        "tokens_factor": 50_176 / 4_300.4,
        "flops_to_match": 2.0e12,
        "flops_factor": 2.0,
        "loss_difference": -0.71,
        "seconds": 95.0,
        "curve": [
            {"tokens": 0, "flops": 1e12, "loss": 9.1},
            {"tokens": 50_176, "flops": 5e12, "loss": 6.0},
        ],
    }
    return arm | changes


def never_matched(name: str, difference: float) -> Result:
    nothing = dict.fromkeys(
        ("tokens_to_match", "tokens_factor", "flops_to_match", "flops_factor"), None
    )
    return make_arm(name, loss_final=6.71 + difference, loss_difference=difference, **nothing)


def matched_before(name: str, loss_final: float = 5.9) -> Result:
    difference = loss_final - 6.71
    return make_arm(
        name,
        loss_before=6.5,
        loss_final=loss_final,
        tokens_to_match=0,
        tokens_factor=None,
        loss_difference=difference,
    )


SCRATCH_ARM = make_arm(
    "scratch",
    init="random",
    loss_before=10.83,
    loss_final=6.71,
    tokens_to_match=50_176,
    tokens_factor=1.0,
    flops_to_match=4e12,
    flops_factor=1.0,
    loss_difference=0.0,
    curve=[
        {"tokens": 0, "flops": 0.0, "loss": 10.83},
        {"tokens": 50_176, "flops": 4e12, "loss": 6.71},
    ],
)


def make_result(*arms: Result, target_loss: float | None = 6.71) -> Result:
    sizes = {"layers": 4, "embed": 64, "kv_groups": 3, "q_per_kv": 2, "head_dim": 16}
    sizes |= {"mlp": 256, "vocab": 1000}
    counts = {"parameters": 20_000_000, "non_embedding_parameters": 9_000_000}
    candidate = {"generation": 0, "origin": "sample", "parameters": 12_000_000, "loss": 9.4}
    candidate["sizes"] = {"layers": 2, "embed": 32, "kv_groups": 2, "mlp": 128}
    better = {**candidate, "generation": 1, "origin": "mutation", "loss": 9.1}
    return copy.deepcopy(
        {
            "format": FORMAT,
            "name": "demo",
            "created": "2026-11-23T19:00:00+00:00",
            "command": "headstart demo",
            "teacher": {"name": "org/teacher", "note": "", "loss": 3.4, "sizes": sizes, **counts},
            "student": {
                **counts,
                "sizes": {**sizes, "layers": 2, "embed": 32, "kv_groups": 2, "mlp": 128},
                "kept_layers": [0, 3],
                "training_flops_per_token": 7.4e7,
                "bin": [11_000_000, 13_000_000],
            },
            "budget": {
                "tokens": 50_176,
                "tokens_per_step": 512,
                "block_length": 128,
                "validation_tokens": 16_384,
            },
            "costs": {
                "calibration_flops": 4e11,
                "search_flops": 6e11,
                "search_tokens": 196_608,
                "search_seconds": 41.2,
                "teacher_flops_per_token": 2.7e8,
            },
            "target_loss": target_loss,
            "arms": list(arms),
            "search": {
                "space": "fine-uniform",
                "order": "importance",
                "candidates": [candidate, better],
                "winner": 1,
            },
            "recipe": {"train": {"learning_rate": 1e-3}},
            "environment": {"headstart": "0.1.0", "device": "cpu"},
        }
    )


def cells(result: Result, arm: str) -> dict[str, str]:
    (row,) = [row for row in result_rows(result) if row[0] == arm]
    return dict(zip(COLUMNS, row, strict=True))


def test_cells_of_a_matched_arm() -> None:
    assert cells(make_result(SCRATCH_ARM, make_arm("subnet")), "subnet") == {
        "arm": "subnet",
        "parameters": "12.3M",
        "loss before": "9.100",
        "loss final": "6.000 (−0.710)",
        "tokens to match": "4,300",
        "fewer tokens": "11.7x",
        "FLOPs to match": "2.00e12",
        "fewer FLOPs": "2.00x",
        "time": "1m35s",
    }


def test_scratch_is_not_compared_with_itself() -> None:
    row = cells(make_result(SCRATCH_ARM, make_arm("subnet")), "scratch")
    assert row["loss final"] == "6.710"
    assert {row[column] for column in COLUMNS[4:8]} == {"–"}


def test_cells_of_an_arm_that_matched_before_training() -> None:
    row = cells(make_result(SCRATCH_ARM, matched_before("subnet")), "subnet")
    assert row["tokens to match"] == "before training"
    assert row["fewer tokens"] == "–"
    assert row["loss final"] == "5.900 (−0.810)"
    assert row["FLOPs to match"] == "2.00e12"


def test_cells_of_an_arm_that_never_matched() -> None:
    row = cells(make_result(SCRATCH_ARM, never_matched("subnet", 0.12)), "subnet")
    assert row["tokens to match"] == "not within 50,176 tokens"
    assert (row["fewer tokens"], row["FLOPs to match"], row["fewer FLOPs"]) == ("–", "–", "–")
    assert row["loss final"] == "6.830 (+0.120)"


def test_cells_without_a_scratch_arm() -> None:
    arm = never_matched("subnet", 0.0) | {"loss_final": 6.0, "loss_difference": None}
    row = cells(make_result(arm, target_loss=None), "subnet")
    assert row["loss final"] == "6.000"
    assert {row[column] for column in COLUMNS[4:8]} == {"–"}


def test_both_tables_show_the_same_cells() -> None:
    arms = (SCRATCH_ARM, make_arm("a|b"), matched_before("[bold]"), never_matched("c", 0.1))
    result = make_result(*arms)
    lines = markdown_table(result).splitlines()
    assert [len(re.split(r"(?<!\\)\|", line)) for line in lines] == [len(COLUMNS) + 2] * 6
    columns = [[str(cell) for cell in column.cells] for column in result_table(result).columns]
    # The terminal's table has the parameters, the same for all arms, in its title.
    without_parameters = [(row[0], *row[2:]) for row in result_rows(result)]
    assert list(zip(*columns, strict=True)) == without_parameters
    assert count_text(result["student"]["parameters"]) in str(result_table(result).title)
    assert r"a\|b" in lines[3]


def test_terminal_table_takes_no_markup_from_names(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=300).print(result_table(make_result(SCRATCH_ARM, make_arm("[bold]x[/bold]"))))
    assert "[bold]x[/bold]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arms", "best"),
    [
        ((make_arm("late"), make_arm("early", tokens_to_match=100.0)), "early"),
        ((make_arm("trained"), matched_before("before")), "before"),
        ((matched_before("high", 6.0), matched_before("low", 5.5)), "low"),
        ((never_matched("far", 0.5), never_matched("near", 0.1)), "near"),
        ((never_matched("far", 0.5), make_arm("matched", loss_final=7.5)), "matched"),
        ((), "scratch"),
    ],
)
def test_best_arm(arms: tuple[Result, ...], best: str) -> None:
    assert best_arm(make_result(SCRATCH_ARM, *arms))["name"] == best


def test_headline_of_a_matched_arm() -> None:
    assert headline(make_result(SCRATCH_ARM, make_arm("subnet+kd"))) == (
        "subnet+kd reaches scratch's loss of 6.71 nats after 4,300 of 50,176 tokens: 11.7x fewer. "
        "Counting the search, it needs 2.00x fewer FLOPs."
    )


def test_headline_says_plainly_when_it_costs_more() -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet", flops_factor=0.5))
    assert headline(result).endswith(
        "Counting the search, it costs 2.00x more FLOPs at this budget."
    )


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (
            make_result(SCRATCH_ARM, matched_before("subnet")),
            "subnet is at or below scratch's loss of 6.71 nats before training; "
            "at equal tokens it ends 0.81 nats lower. "
            "Counting the search, it needs 2.00x fewer FLOPs.",
        ),
        (
            make_result(SCRATCH_ARM, never_matched("subnet", 0.12)),
            "No arm reaches scratch's loss of 6.71 nats within 50,176 tokens; "
            "the closest, subnet, ends 0.12 nats higher.",
        ),
        (
            make_result(make_arm("subnet"), target_loss=None),
            "subnet ends at 6.00 nats after 50,176 tokens; "
            "no scratch arm was run to compare it with.",
        ),
        (
            make_result(SCRATCH_ARM),
            "scratch ends at 6.71 nats after 50,176 tokens; "
            "no other arm was run to compare it with.",
        ),
    ],
)
def test_headline_of_the_other_cases(result: Result, sentence: str) -> None:
    assert headline(result) == sentence


@pytest.mark.parametrize(
    ("factor", "text"), [(0.476, "0.48x"), (9.999, "10.0x"), (11.68, "11.7x"), (1234.0, "1,234x")]
)
def test_factor_text(factor: float, text: str) -> None:
    assert factor_text(factor) == text


def test_load_result_returns_what_was_written(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert load_result(tmp_path) == result


def test_load_result_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"result\.json cannot be read .* finished run"):
        load_result(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has format None"),
        ('{"format": "headstart-result/2"}', "has format 'headstart-result/2'"),
        (json.dumps({"format": FORMAT}), "lacks name, created"),
        (json.dumps(make_result()), "has no arms"),
        (json.dumps(make_result({"name": "subnet"})), "arm 'subnet' lacks init, kd"),
        (json.dumps(make_result(SCRATCH_ARM) | {"arms": ["x"]}), "arm 0 lacks name"),
    ],
)
def test_load_result_refuses_what_it_cannot_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_result(tmp_path)
    assert str(path) in str(raised.value)
    assert "run again" in str(raised.value)


class PageReader(HTMLParser):
    """Collects tags, loads and text, and fails on a tag that is not closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
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
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
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
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.text.count(HOSTILE) >= 10
    # plotly reads tags in names and hover texts, so none may reach it
    assert "<script" not in json.dumps(charts_of(result))


def test_inline_json_cannot_end_its_script() -> None:
    assert "<" not in inline_json({"name": HOSTILE})
    assert json.loads(inline_json({"name": HOSTILE})) == {"name": HOSTILE}


def test_page_without_a_search(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet")) | {"search": None}
    result["costs"] |= {"search_flops": 0}
    page = read_page(result, tmp_path)
    assert "without a search" in page.text
    assert "With no search to count, it needs 2.00x fewer FLOPs" in page.text
    assert set(charts_of(result)) == {"loss-tokens", "loss-flops"}


def test_page_without_scratch_draws_no_target(tmp_path: Path) -> None:
    result = make_result(make_arm("subnet"), target_loss=None)
    assert "no scratch arm was run" in read_page(result, tmp_path).text
    assert "shapes" not in charts_of(result)["loss-tokens"]["layout"]


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


def test_loss_charts_draw_the_curves_points_and_the_target() -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    for name, key in (("loss-tokens", "tokens"), ("loss-flops", "flops")):
        chart = charts_of(result)[name]
        for trace, arm in zip(chart["data"], result["arms"], strict=True):
            assert trace["x"] == [point[key] for point in arm["curve"]]
            assert trace["y"] == [point["loss"] for point in arm["curve"]]
            assert trace["line"]["color"] == arm_colours(result)[arm["name"]]
        (target,) = chart["layout"]["shapes"]
        assert target["y0"] == target["y1"] == 6.71


def test_the_log_view_drops_what_has_no_logarithm() -> None:
    chart = charts_of(make_result(SCRATCH_ARM, make_arm("subnet")))["loss-flops"]
    assert list(chart["views"]) == ["linear", "log"]
    (linear, linear_axis), (log, log_axis) = chart["views"].values()
    assert linear["x"] == [trace["x"] for trace in chart["data"]] == [[0.0, 4e12], [1e12, 5e12]]
    assert log["x"] == [[None, 4e12], [1e12, 5e12]]
    assert (linear_axis["xaxis.type"], log_axis["xaxis.type"]) == ("linear", "log")
    assert linear_axis.keys() == log_axis.keys()  # so that each undoes the other


def test_every_view_has_its_button(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    for candidate in result["search"]["candidates"]:
        candidate["tokens"] = 1024
    buttons = [found for tag, found in read_page(result, tmp_path).tags if tag == "button"]
    assert [(one["data-chart"], one["data-view"]) for one in buttons] == [
        (name, view) for name, chart in charts_of(result).items() for view in chart.get("views", {})
    ]
    pressed = [one["data-view"] for one in buttons if one["aria-pressed"] == "true"]
    assert pressed == ["linear", "linear", "candidates"]


def test_a_search_without_a_bin_of_its_own_shows_that_of_the_student() -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    (band,) = charts_of(result)["search-size"]["layout"]["shapes"]
    assert (band["x0"], band["x1"]) == (11_000_000, 13_000_000)
    result["search"] |= {"bin": [1, 2], "measure": "weight_bytes"}
    (band,) = charts_of(result)["search-size"]["layout"]["shapes"]
    assert (band["x0"], band["x1"]) == (1, 2)


def test_what_the_winner_keeps_is_measured_against_the_teacher(tmp_path: Path) -> None:
    result = make_result(SCRATCH_ARM, make_arm("subnet"))
    assert "shrank" not in read_page(result, tmp_path).text
    spec = {"layers": "0,3", "embed": "0-31", "head_dim": None}
    result["search"]["spec"] = spec | {"kv_groups": ["0", "0-1"], "mlp": ["0-127", "0-63"]}
    text = read_page(result, tmp_path).text
    assert "2 of 4" in text and "32 of 64" in text and "16 of 16" in text
    assert "64–128 of 256 in a kept layer" in text


@pytest.mark.parametrize(
    ("size", "text"), [(1024, "1,024"), ([5, 5], "5"), ([4, 1024, 7], "4–1,024")]
)
def test_size_text(size: int | list[int], text: str) -> None:
    assert size_text(size) == text


def test_frame_escapes_its_title() -> None:
    assert "<title>&lt;b&gt; · headstart</title>" in page("<b>", "", [], {})


def test_drawing_highlights_the_kept_layers(tmp_path: Path) -> None:
    page = read_page(make_result(SCRATCH_ARM, make_arm("subnet")), tmp_path)
    bars = [attributes["class"] for tag, attributes in page.tags if tag == "rect"]
    assert bars == ["kept", "dropped", "dropped", "kept", "kept", "kept"]
    widths = [float(attributes["width"] or 0) for tag, attributes in page.tags if tag == "rect"]
    assert widths[-1] / widths[0] == pytest.approx(32 / 64)
    assert [tag for tag, _ in page.tags].count("path") == 2


def test_arm_colours_are_distinct_and_scratch_is_always_grey() -> None:
    colours = arm_colours(make_result(make_arm("subnet"), SCRATCH_ARM, make_arm("subnet+kd")))
    assert len(set(colours.values())) == 3
    assert colours["scratch"] == arm_colours(make_result(SCRATCH_ARM))["scratch"]
