"""What stands on the screen, with a clock that is set by hand."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from headstart.searching.candidate import Candidate
from headstart.searching.journal import Evaluated
from headstart.searching.live import SearchTable
from headstart.searching.units import Units

ESCAPE = "\x1b"
ALL_TOKENS = 2_000
"""On which every candidate is scored that stays in the race."""
LOSSES = (4.5, 6.0, 6.5, 7.0)
"""Of one generation, the best first."""


class Screen:
    """A terminal, or a file, with a clock that only the test moves."""

    def __init__(self, terminal: bool = True, height: int = 40) -> None:
        self.stream = io.StringIO()
        self.seconds = 100.0
        self.console = Console(
            file=self.stream,
            width=80,
            height=height,
            force_terminal=terminal,
            force_interactive=terminal,
            _environ={"TERM": "xterm"},
        )

    def table(self, num_generations: int, all_tokens: int = ALL_TOKENS) -> SearchTable:
        return SearchTable(num_generations, all_tokens, self.console, clock=lambda: self.seconds)

    def last_frame(self) -> list[str]:
        """The lines that stay, without control codes."""
        text = self.stream.getvalue().rpartition(f"{ESCAPE}[2K")[2]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip("\r\n").splitlines()

    def last_row(self) -> list[str]:
        return self.last_frame()[-1].split()


def score(loss: float, tokens: int = ALL_TOKENS, parameters: int = 12_345_678) -> Evaluated:
    candidate = Candidate(Units(1), Units(1), 1, (Units(1),), (Units(1),))
    return Evaluated(0, "sample", candidate, parameters, loss, tokens, seconds=0.0)


def evaluate(table: SearchTable, *losses: float, tokens: int = ALL_TOKENS) -> None:
    """Candidates are scored now, on their first tokens."""
    for loss in losses:
        table.scored(score(loss, tokens), tokens, replayed=False)


def run(
    screen: Screen,
    table: SearchTable,
    generation: int,
    seconds: float = 10.0,
    losses: Sequence[float] = LOSSES,
    parameters: int = 12_345_678,
) -> None:
    """A generation whose candidates are each evaluated now, on all tokens."""
    scores = [score(loss, parameters=parameters) for loss in losses]
    table.start(generation, len(scores))
    for evaluated in scores:
        table.scored(evaluated, ALL_TOKENS, replayed=False)
    screen.seconds += seconds
    table.finish(generation, scores)


def test_a_row_for_each_generation():
    screen = Screen()
    with screen.table(3) as table:
        run(screen, table, 0, seconds=0.5, losses=(5.0, 6.25, 6.25, 7.0), parameters=3_000)
        run(screen, table, 1, seconds=10, losses=(4.5, 7.0, math.nan, 8.0))
        run(screen, table, 2, losses=(4.75, 4.75, 4.75, 4.75), parameters=5_000)
    header, *rows = screen.last_frame()
    assert header.split() == [
        *("generation", "candidates", "best", "median", "parameters", "candidates/s", "tokens"),
        "ETA",
    ]
    assert [row.split() for row in rows] == [
        ["1/3", "4", "5.000", "6.250", "3.00k", "8.00", "8.00k"],
        ["2/3", "4", "4.500", "7.000", "12.3M", "0.40", "16.0k"],
        ["3/3", "4", "4.500", "4.750", "12.3M", "0.40", "24.0k"],
    ]


def test_without_a_finite_loss_there_is_no_best_candidate():
    screen = Screen()
    with screen.table(2) as table:
        run(screen, table, 0, losses=(math.nan, math.inf))
    assert screen.last_row()[:5] == ["1/2", "2", "inf", "nan", "0"]


def test_the_running_generation_stands_below():
    screen = Screen()
    with screen.table(3) as table:
        run(screen, table, 0)
        table.start(1, 6)
        evaluate(table, 4.5)
        evaluate(table, 4.5, 4.5, tokens=500)
        screen.seconds += 4
    # 4 of the first generation's 10 seconds have passed, and a third one follows.
    expected = ["2/3", "3/6", "4.500", "–", "12.3M", "0.75", "11.0k", "16.0s"]
    assert screen.last_row() == expected


def test_in_a_race_candidates_count_once_and_only_whole_losses_are_best():
    screen = Screen()
    with screen.table(2) as table:
        table.start(0, 3)
        evaluate(table, 5.0, 6.0, 7.0, tokens=500)
        assert table._running()[1:3] == ("3/3", "–")
        table.scored(score(5.5), tokens=1_500, replayed=False)
        assert table._running()[1:3] == ("3/3", "5.500")
        screen.seconds += 2
        table.finish(0, [score(5.5), score(6.0, tokens=500), score(7.0, tokens=500)])
    assert screen.last_row() == ["1/2", "3", "5.500", "6.000", "12.3M", "1.50", "3.00k"]


def test_the_size_of_a_new_best_candidate_is_not_known_yet():
    screen = Screen()
    with screen.table(2) as table:
        run(screen, table, 0)
        table.start(1, 4)
        evaluate(table, 4.25, 4.75)
    assert screen.last_row()[2:5] == ["4.250", "–", "–"]


def test_between_generations_no_row_is_running():
    screen = Screen()
    with screen.table(2):
        pass
    (header,) = screen.last_frame()
    assert header.startswith("generation")


def test_nothing_is_known_before_the_first_candidate():
    screen = Screen()
    with screen.table(2) as table:
        table.start(0, 4)
        screen.seconds += 5
    assert screen.last_row() == ["1/2", "0/4", "–", "–", "–", "–", "0", "–"]


def test_in_the_first_generation_the_time_left_goes_by_candidates():
    screen = Screen()
    with screen.table(3) as table:
        table.start(0, 4)
        evaluate(table, 5.0, 5.0)
        screen.seconds += 60
    assert screen.last_row()[-1] == "5m00s"  # 2 candidates here and 8 more, 30 seconds each


def test_then_it_goes_by_generations_however_many_candidates_are_left():
    screen = Screen()
    with screen.table(4) as table:
        run(screen, table, 0, seconds=30)
        run(screen, table, 1, seconds=10)
        table.start(2, 4)
        evaluate(table, *LOSSES, tokens=500)  # the rest of a race is still to come
        screen.seconds += 5
    assert screen.last_row()[-1] == "35.0s"


def test_a_generation_that_takes_longer_than_the_others_has_no_negative_time_left():
    screen = Screen()
    with screen.table(4) as table:
        run(screen, table, 0, seconds=10)
        table.start(1, 4)
        screen.seconds += 3_600
    assert screen.last_row()[-1] == "20.0s"


def test_replayed_candidates_count_for_no_rate_and_no_time_left():
    screen = Screen()
    scores = [score(loss) for loss in LOSSES]
    with screen.table(4) as table:
        table.start(0, 4)
        for replayed in scores:
            table.scored(replayed, ALL_TOKENS, replayed=True)
        screen.seconds += 0.001
        table.finish(0, scores)
        table.start(1, 4)
        table.scored(score(5.0, tokens=0), 0, replayed=True)
    assert screen.last_frame()[1].split()[-2:] == ["–", "8.00k"]
    assert screen.last_row()[-3:] == ["–", "8.00k", "–"]


def test_a_generation_replayed_in_part_is_scaled_up():
    screen = Screen()
    scores = [score(loss) for loss in LOSSES]
    with screen.table(4) as table:
        table.start(0, 4)
        for place, evaluated in enumerate(scores):
            table.scored(evaluated, ALL_TOKENS, replayed=place < 2)
        screen.seconds += 20
        table.finish(0, scores)
        table.start(1, 4)
    assert screen.last_frame()[1].split()[-2] == "0.10"
    assert screen.last_row()[-1] == "2m00s"  # three generations of 40 seconds


def test_only_the_last_generations_are_shown():
    screen = Screen()
    with screen.table(30) as table:
        for generation in range(12):
            run(screen, table, generation)
    assert "…" not in "".join(screen.last_frame())
    screen = Screen()
    with screen.table(30) as table:
        for generation in range(14):
            run(screen, table, generation)
        table.start(14, 4)
    lines = screen.last_frame()
    assert lines[1].split() == ["…"]
    assert [line.split()[0] for line in lines[2:]] == [f"{number}/30" for number in range(3, 16)]


@pytest.mark.parametrize("height", [5, 8, 12])
def test_the_table_does_not_outgrow_a_low_terminal(height: int):
    screen = Screen(height=height)
    with screen.table(30) as table:
        for generation in range(19):
            run(screen, table, generation)
        table.start(19, 4)
    lines = screen.last_frame()
    assert len(lines) == height - 1
    assert lines[-1].split()[0] == "20/30"


def test_wide_numbers_fit_80_columns():
    screen = Screen()
    losses = [10.125, *[12.125] * 999]
    with screen.table(100, all_tokens=123_456) as table:
        table.start(0, 1_000)
        scores = [score(loss, 123_456, parameters=1_234_567_890) for loss in losses]
        for evaluated in scores:
            table.scored(evaluated, 123_456, replayed=False)
        screen.seconds += 36_000
        table.finish(0, scores)
        table.start(1, 1_000)
        evaluate(table, *losses[1:], tokens=1)
    header, first, second = screen.last_frame()
    assert first.split()[:5] == ["1/100", "1,000", "10.125", "12.125", "1.23B"]
    assert second.split()[-1] == "990h00m"
    assert max(len(line.rstrip()) for line in (header, first, second)) <= 80


def test_without_a_terminal_there_is_one_plain_line_for_each_generation():
    screen = Screen(terminal=False)
    with screen.table(3) as table:
        table.start(0, 4)
        evaluate(table, *LOSSES)
        assert screen.stream.getvalue() == ""
        screen.seconds += 8
        table.finish(0, [score(loss) for loss in LOSSES])
        run(screen, table, 1, seconds=12)
        table.start(2, 4)
    first, second = screen.stream.getvalue().splitlines()
    assert first == (
        "generation 1/3: 4 candidates, best 4.500, median 6.250, 12.3M parameters, "
        "0.50 candidates/s, 8.00k tokens, ETA 16.0s"
    )
    assert second.startswith("generation 2/3: ") and second.endswith(" ETA 10.0s")
    assert ESCAPE not in screen.stream.getvalue()


def test_writes_to_standard_error_only(capfd: pytest.CaptureFixture[str]):
    with SearchTable(1, ALL_TOKENS) as table:
        table.start(0, 4)
        table.finish(0, [score(loss) for loss in LOSSES])
    out, err = capfd.readouterr()
    assert out == ""
    assert "generation" in err and "1/1" in err


def test_only_the_main_process_writes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    with SearchTable(1, ALL_TOKENS) as table:
        table.start(0, 4)
        table.finish(0, [score(loss) for loss in LOSSES])
    assert capfd.readouterr() == ("", "")


def test_an_error_passes_through_and_frees_the_terminal():
    screen = Screen()
    with pytest.raises(ZeroDivisionError), screen.table(2) as table:
        table.start(0, 4)
        _ = 1 / 0
    assert screen.stream.getvalue().rindex("\x1b[?25h") > screen.stream.getvalue().rindex("?25l")
    with screen.table(2) as table:
        table.start(0, 4)
