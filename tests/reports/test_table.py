"""A result's words and tables."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from tests.reports.examples import (
    SCRATCH_ARM,
    Result,
    budgeted,
    make_arm,
    make_result,
    matched_before,
    never_matched,
)

from headstart.reports.table import (
    BUDGET_COLUMNS,
    COLUMNS,
    FORMAT,
    best_arm,
    budget_rows,
    factor_text,
    forecast_sentences,
    headline,
    load_result,
    result_rows,
    result_table,
    size_text,
)
from headstart.system.formats import count_text


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


def test_an_arm_that_matched_by_its_first_evaluation_gives_lower_bounds() -> None:
    arm = make_arm("subnet", tokens_to_match=1024, tokens_factor=49.0, is_bound=True)
    result = make_result(SCRATCH_ARM, arm)
    row = cells(result, "subnet")
    assert row["tokens to match"] == "within the first 1,024"
    assert row["fewer tokens"] == "≥ 49.0x"
    assert (row["FLOPs to match"], row["fewer FLOPs"]) == ("≤ 2.00e12", "≥ 2.00x")
    assert headline(result) == (
        "subnet reaches scratch's validation loss of 6.71 nats within the first 2 steps, that is "
        "1,024 of 50,176 tokens: at least 49.0x fewer. Counting the search, it needs at least "
        "2.00x fewer FLOPs."
    )


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


def test_the_terminals_table_shows_these_cells() -> None:
    arms = (SCRATCH_ARM, make_arm("a|b"), matched_before("[bold]"), never_matched("c", 0.1))
    result = make_result(*arms)
    columns = [[str(cell) for cell in column.cells] for column in result_table(result).columns]
    # The terminal's table has the parameters, the same for all arms, in its title.
    without_parameters = [(row[0], *row[2:]) for row in result_rows(result)]
    assert list(zip(*columns, strict=True)) == without_parameters
    assert count_text(result["student"]["parameters"]) in str(result_table(result).title)


def test_a_long_name_cuts_no_number_off() -> None:
    console = Console(width=80, record=True)
    result = make_result(SCRATCH_ARM, make_arm("subnet-with-a-rather-long-name-of-its-own"))
    console.print(result_table(result))
    text = console.export_text()
    assert "…" not in text and all(result_rows(result)[1][index] in text for index in (2, 5, 7, 8))


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
        "subnet+kd reaches scratch's validation loss of 6.71 nats after 4,300 of 50,176 tokens: "
        "11.7x fewer. Counting the search, it needs 2.00x fewer FLOPs."
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
            "subnet is at or below scratch's validation loss of 6.71 nats before training; "
            "at equal tokens it ends 0.81 nats lower. "
            "Counting the search, it needs 2.00x fewer FLOPs.",
        ),
        (
            make_result(SCRATCH_ARM, never_matched("subnet", 0.12)),
            "No arm reaches scratch's validation loss of 6.71 nats within 50,176 tokens; "
            "the closest, subnet, ends 0.12 nats higher.",
        ),
        (
            make_result(make_arm("subnet"), target_loss=None),
            "subnet ends at 6.00 nats after 50,176 tokens; "
            "no arm with random weights was run to compare it with.",
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


@pytest.mark.parametrize(
    ("size", "text"), [(1024, "1,024"), ([5, 5], "5"), ([4, 1024, 7], "4–1,024")]
)
def test_size_text(size: int | list[int], text: str) -> None:
    assert size_text(size) == text


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
        ('{"format": "headstart-result/1"}', "has format 'headstart-result/1'"),
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


def with_budgets() -> Result:
    scratch = budgeted("scratch", "random", [7.0, 6.0, 5.0])
    start = budgeted("start", "subnet", [5.5, 5.0, 4.5], 0, 2, 3.5)
    result = make_result(scratch, start)
    result["compared_on"] = "test"
    return result


def test_every_budget_has_its_row() -> None:
    result = with_budgets()
    rows = [dict(zip(BUDGET_COLUMNS, row, strict=True)) for row in budget_rows(result)]
    assert [row["budget"] for row in rows] == ["1,000", "2,000", "4,000"] * 2
    assert [row["loss"] for row in rows[:2]] == ["7.000 ± 0.010", "6.000 ± 0.010"]
    assert {row["fewer tokens"] for row in rows[:3]} == {"–"}  # not compared with itself
    assert [row["fewer tokens"] for row in rows[3:]] == ["before training", "≥ 2.00x", "3.50x"]
    assert [row["fewer FLOPs"] for row in rows[4:]] == ["≥ 1.00x", "1.75x"]
    assert budget_rows(make_result(SCRATCH_ARM, make_arm("subnet"))) == []


def test_what_is_forecast_is_said_and_what_is_not_trusted_too() -> None:
    result = with_budgets()
    assert forecast_sentences(result) == []
    checked = [{"tokens": 4_000, "loss": 5.0, "forecast": 5.25}]
    trusted, missed = ({"is_trusted": trust, "checked": checked} for trust in (True, False))
    scratch, start = result["arms"]
    scratch["forecast"], start["forecast"] = trusted, trusted
    start["catch_up"] = {"tokens": 2.5e6, "horizon_tokens": 4e6}
    assert forecast_sentences(result) == [
        "By forecast, scratch catches up with start at a budget of about 2.50M tokens."
    ]
    start["catch_up"]["tokens"] = None
    assert "not within 4.00M tokens" in forecast_sentences(result)[0]
    scratch["forecast"], start["catch_up"] = missed, None
    (sentence,) = forecast_sentences(result)
    assert sentence.endswith("tell the larger one: scratch is 0.25 nats off.")


def test_a_start_below_at_its_smallest_budget_gets_a_bound() -> None:
    result = with_budgets()
    result["arms"][1] |= {"is_bound": True, "tokens_to_match": 1000, "tokens_factor": 4.0}
    assert headline(result).startswith(
        "start is below scratch's test loss of 6.71 nats at its smallest budget already, 1,000 of "
        "4,000 tokens: at least 4.00x fewer."
    )
