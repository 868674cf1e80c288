"""Several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.reports.examples import HOSTILE, SCRATCH_ARM, Result, budgeted, make_arm, make_result
from tests.reports.test_page import PageReader

from headstart.cli import main
from headstart.reports.several import (
    RUN_COLUMNS,
    caution_sentences,
    differing_keys,
    run_rows,
    runs_charts,
    runs_table,
    write_comparison,
)


def with_bits(result: Result) -> Result:
    for arm in result["arms"]:
        for point in (*arm["curve"], *arm["budgets"]):
            point["bits_per_byte"] = point["loss"] / 4
        result["teacher"]["bits_per_byte"] = result["teacher"]["loss"] / 4
        arm["bits_per_byte_final"] = arm["loss_final"] / 4
    return result


def two_runs() -> dict[str, Result]:
    first = make_result(SCRATCH_ARM, make_arm("subnet"))
    second = make_result(SCRATCH_ARM, make_arm("subnet", loss_final=5.5))
    second["recipe"] = {"train": {"learning_rate": 3e-3}, "output": "elsewhere"}
    return {"runs/a": with_bits(first), "runs/b": with_bits(second)}


def test_every_arm_has_its_row() -> None:
    runs = two_runs()
    _, subnet = (dict(zip(RUN_COLUMNS, row, strict=True)) for row in run_rows(runs["runs/b"]))
    assert subnet == {
        "arm": "subnet",
        "parameters": "12.3M",
        "tokens": "50.2k",
        "loss final": "5.500 (−0.710)",
        "bits per byte": "1.375",
        "fewer tokens": "11.7x",
        "fewer FLOPs": "2.00x",
        "FLOPs in all": "5.00e12",
        "time": "1m35s",
    }
    console = Console(record=True, width=200)
    console.print(runs_table(runs))
    lines = [line.split()[:2] for line in console.export_text().splitlines() if "runs/" in line]
    assert lines == [[run, arm] for run in runs for arm in ("scratch", "subnet")]
    older = make_result(SCRATCH_ARM)
    assert run_rows(older)[0][RUN_COLUMNS.index("bits per byte")] == "–"


def test_charts_have_a_colour_for_each_run_and_dots_for_random_weights() -> None:
    runs = two_runs()
    for name, key in (("runs-tokens", "tokens"), ("runs-flops", "flops")):
        views = runs_charts(runs)[name]
        assert [chart.x.is_log for chart in views.values()] == [False, True]
        series = views["linear"].series
        assert [of_arm.line for of_arm in series] == ["dotted", "solid"] * 2
        assert series[0].colour == series[1].colour != series[2].colour == series[3].colour
        arm = runs["runs/a"]["arms"][1]
        assert series[1].x == [point[key] for point in arm["curve"]]
        assert series[1].y == [point["loss"] / 4 for point in arm["curve"]]
        assert views["linear"].y.title == "loss (bits per byte)"
    tips = runs_charts(runs)["runs-tokens"]["linear"].series[3].tips
    assert tips[0] == "runs/b, subnet\n0 tokens\n2.275 bits per byte"


def test_charts_are_in_nats_where_an_older_result_has_no_bits() -> None:
    runs = two_runs() | {"runs/old": make_result(SCRATCH_ARM)}
    chart = runs_charts(runs)["runs-tokens"]["linear"]
    assert chart.y.title == "loss (nats per token)"
    assert chart.series[0].y == [10.83, 6.71]


def test_only_what_differs_is_shown_of_recipes() -> None:
    runs = two_runs()
    assert differing_keys(runs) == {"train.learning_rate": [1e-3, 3e-3]}
    runs["runs/c"] = make_result(SCRATCH_ARM) | {"recipe": {"search": {"init": "slice"}}}
    assert differing_keys(runs) == {
        "train.learning_rate": [1e-3, 3e-3, None],
        "train": [{"learning_rate": 1e-3}, {"learning_rate": 3e-3}, None],
        "search": [None, None, {"init": "slice"}],
    }


def test_arms_are_compared_by_name() -> None:
    runs = two_runs()
    for result, rate in zip(runs.values(), (1e-3, 3e-3), strict=True):
        arms = [{"name": "subnet.v2", "learning_rate": rate}, {"name": "kd", "kd": {"alpha": 1}}]
        result["recipe"] = {"pretrain": {"arms": arms[:: 1 if rate == 1e-3 else -1]}}
    assert differing_keys(runs) == {"pretrain.arms.subnet.v2.learning_rate": [1e-3, 3e-3]}


def test_a_narrow_terminal_breaks_no_number() -> None:
    console = Console(record=True, width=80)
    console.print(runs_table(two_runs()))
    text = console.export_text()
    for result in two_runs().values():
        for row in run_rows(result):
            assert all(part in text for cell in row for part in cell.split())


def test_what_may_not_be_compared_is_told() -> None:
    runs = two_runs()
    assert caution_sentences(runs) == []
    other = runs["runs/b"]
    other["recipe"]["data"] = {"source": "other"}
    (sentence,) = caution_sentences(runs)
    assert "different texts" in sentence
    other["recipe"] = runs["runs/a"]["recipe"] | {"pretrain": {"test_tokens": 5}}
    (sentence,) = caution_sentences(runs)
    assert "pretrain.test_tokens differs" in sentence
    other["recipe"]["data"] = {"source": "other"}
    other["recipe"]["pretrain"] = {}
    other["student"]["sizes"]["vocab"] = 7
    other["compared_on"] = "test"
    assert len(caution_sentences(runs)) == 3 and "bits per byte" in caution_sentences(runs)[1]


def test_the_page_is_whole_and_escapes_every_string(tmp_path: Path) -> None:
    runs = two_runs()
    runs[HOSTILE] = make_result(
        budgeted(HOSTILE, "random", [7.0, 6.0]), budgeted("b", "subnet", [6.0, 5.0], 2, 2)
    )
    runs[HOSTILE]["teacher"]["name"] = HOSTILE
    runs[HOSTILE]["recipe"] = {HOSTILE: HOSTILE}
    write_comparison(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in text and len(text) < 100_000
    page = PageReader()
    page.feed(text)
    page.close()
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    words = " ".join(page.text.split())
    assert "3 runs side by side" in words
    for row in run_rows(runs["runs/a"]):
        assert all(cell in words for cell in row)
    assert "train.learning_rate 0.001 0.003 –" in words


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, result in two_runs().items():
        folders.append(tmp_path / name)
        folders[-1].mkdir(parents=True)
        (folders[-1] / "result.json").write_text(json.dumps(result))
    out = tmp_path / "pages" / "both.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert "2 runs side by side" in out.read_text()
    assert main(["report", str(folders[0]), str(folders[0])]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["report", str(folders[0])]) == 0
    assert (folders[0] / "report.html").is_file()
