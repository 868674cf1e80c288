"""What stands on the screen, with a clock that is set by hand."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from headstart.searching.live import GenerationRow, SearchTable

ESCAPE = "\x1b"


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

    def table(self, num_generations: int) -> SearchTable:
        return SearchTable(num_generations, self.console, clock=lambda: self.seconds)

    def last_frame(self) -> list[str]:
        """The lines that stay, without control codes."""
        text = self.stream.getvalue().rpartition(f"{ESCAPE}[2K")[2]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip("\r\n").splitlines()

    def last_row(self) -> list[str]:
        return self.last_frame()[-1].split()


def row(generation: int, seconds: float = 10.0, **changes: float) -> GenerationRow:
    values = {"candidates": 4, "best": 4.5, "median": 6.25, "parameters": 12_345_678}
    values |= {"tokens": 8_000 * generation, **changes}
    return GenerationRow(generation=generation, seconds=seconds, **values)  # type: ignore[arg-type]


def run(screen: Screen, table: SearchTable, generation: int, **changes: float) -> None:
    """A generation whose candidates are each evaluated now."""
    finished = row(generation, **changes)
    table.start(generation, finished.candidates)
    table.advance(finished.candidates, tokens=8_000)
    screen.seconds += finished.seconds
    table.finish(finished)


def test_a_row_for_each_generation():
    screen = Screen()
    with screen.table(3) as table:
        run(screen, table, 1, seconds=0.5, best=5.0)
        run(screen, table, 2, seconds=10, median=7.0)
    header, first, second = screen.last_frame()
    assert header.split() == [
        *("generation", "candidates", "best", "median", "parameters", "candidates/s", "tokens"),
        "ETA",
    ]
    assert first.split() == ["1/3", "4", "5.000", "6.250", "12.3M", "8.00", "8.00k"]
    assert second.split() == ["2/3", "4", "4.500", "7.000", "12.3M", "0.40", "16.0k"]


def test_the_running_generation_stands_below():
    screen = Screen()
    with screen.table(3) as table:
        run(screen, table, 1)
        table.start(2, 6)
        table.advance(1, tokens=2_000, best=4.5)
        table.advance(2, tokens=1_000)
        screen.seconds += 4
    # 4 of the first generation's 10 seconds have passed, and a third one follows.
    expected = ["2/3", "3/6", "4.500", "–", "12.3M", "0.75", "11.0k", "16.0s"]
    assert screen.last_row() == expected


def test_the_size_of_a_new_best_candidate_is_not_known_yet():
    screen = Screen()
    with screen.table(2) as table:
        run(screen, table, 1)
        table.start(2, 4)
        table.advance(1, best=4.25)
        table.advance(1, best=4.75)
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
        table.start(1, 4)
        screen.seconds += 5
    assert screen.last_row() == ["1/2", "0/4", "–", "–", "–", "–", "0", "–"]


def test_in_the_first_generation_the_time_left_goes_by_candidates():
    screen = Screen()
    with screen.table(3) as table:
        table.start(1, 4)
        table.advance()
        table.advance()
        screen.seconds += 60
    assert screen.last_row()[-1] == "5m00s"  # 2 candidates here and 8 more, 30 seconds each


def test_then_it_goes_by_generations_however_many_candidates_are_left():
    screen = Screen()
    with screen.table(4) as table:
        run(screen, table, 1, seconds=30)
        run(screen, table, 2, seconds=10)
        table.start(3, 4)
        table.advance(4)  # the rest of a race is still to come
        screen.seconds += 5
    assert screen.last_row()[-1] == "35.0s"


def test_a_generation_that_takes_longer_than_the_others_has_no_negative_time_left():
    screen = Screen()
    with screen.table(4) as table:
        run(screen, table, 1, seconds=10)
        table.start(2, 4)
        screen.seconds += 3_600
    assert screen.last_row()[-1] == "20.0s"


def test_replayed_candidates_count_for_no_rate_and_no_time_left():
    screen = Screen()
    with screen.table(4) as table:
        table.start(1, 4)
        for _ in range(4):
            table.advance(0, tokens=2_000, best=5.0)
        table.finish(row(1, seconds=0.001))
        table.start(2, 4)
        table.advance(0)
    assert screen.last_frame()[1].split()[-2:] == ["–", "8.00k"]
    assert screen.last_row()[-3:] == ["–", "8.00k", "–"]


def test_a_generation_replayed_in_part_is_scaled_up():
    screen = Screen()
    with screen.table(4) as table:
        table.start(1, 4)
        table.advance(0)
        table.advance(0)
        table.advance(2)
        table.finish(row(1, seconds=20))
        table.start(2, 4)
    assert screen.last_frame()[1].split()[-2] == "0.10"
    assert screen.last_row()[-1] == "2m00s"  # three generations of 40 seconds


def test_only_the_last_generations_are_shown():
    screen = Screen()
    with screen.table(30) as table:
        for generation in range(1, 13):
            run(screen, table, generation)
    assert "…" not in "".join(screen.last_frame())
    screen = Screen()
    with screen.table(30) as table:
        for generation in range(1, 15):
            run(screen, table, generation)
        table.start(15, 4)
    lines = screen.last_frame()
    assert lines[1].split() == ["…"]
    assert [line.split()[0] for line in lines[2:]] == [f"{number}/30" for number in range(3, 16)]


@pytest.mark.parametrize("height", [5, 8, 12])
def test_the_table_does_not_outgrow_a_low_terminal(height: int):
    screen = Screen(height=height)
    with screen.table(30) as table:
        for generation in range(1, 20):
            run(screen, table, generation)
        table.start(20, 4)
    lines = screen.last_frame()
    assert len(lines) == height - 1
    assert lines[-1].split()[0] == "20/30"


def test_wide_numbers_fit_80_columns():
    screen = Screen()
    wide = {"candidates": 1_000, "best": 10.125, "median": 12.125, "parameters": 1_234_567_890}
    with screen.table(100) as table:
        run(screen, table, 1, seconds=36_000, tokens=123_456_789, **wide)
        table.start(2, 1_000)
        table.advance(999, tokens=1)
    header, first, second = screen.last_frame()
    assert first.split()[:5] == ["1/100", "1,000", "10.125", "12.125", "1.23B"]
    assert second.split()[-1] == "990h00m"
    assert max(len(line.rstrip()) for line in (header, first, second)) <= 80


def test_without_a_terminal_there_is_one_plain_line_for_each_generation():
    screen = Screen(terminal=False)
    with screen.table(3) as table:
        table.start(1, 4)
        table.advance(2)
        assert screen.stream.getvalue() == ""
        table.advance(2)
        table.finish(row(1, seconds=8))
        run(screen, table, 2, seconds=12)
        table.start(3, 4)
    first, second = screen.stream.getvalue().splitlines()
    assert first == (
        "generation 1/3: 4 candidates, best 4.500, median 6.250, 12.3M parameters, "
        "0.50 candidates/s, 8.00k tokens, ETA 16.0s"
    )
    assert second.startswith("generation 2/3: ") and second.endswith(" ETA 10.0s")
    assert ESCAPE not in screen.stream.getvalue()


def test_writes_to_standard_error_only(capfd: pytest.CaptureFixture[str]):
    with SearchTable(1) as table:
        table.start(1, 4)
        table.finish(row(1))
    out, err = capfd.readouterr()
    assert out == ""
    assert "generation" in err and "1/1" in err


def test_an_error_passes_through_and_frees_the_terminal():
    screen = Screen()
    with pytest.raises(ZeroDivisionError), screen.table(2) as table:
        table.start(1, 4)
        _ = 1 / 0
    assert screen.stream.getvalue().rindex("\x1b[?25h") > screen.stream.getvalue().rindex("?25l")
    with screen.table(2) as table:
        table.start(1, 4)
