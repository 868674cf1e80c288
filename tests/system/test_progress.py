"""The bar names the stage and unit, counts what it is told, and lets errors through."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from headstart.system import progress as module
from headstart.system.progress import progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=stream, width=160))
    return stream


def last_line(screen: io.StringIO) -> str:
    return screen.getvalue().rstrip().splitlines()[-1]


def test_counts_with_rate_and_the_latest_note(screen):
    with progress("score", 6, "candidates") as advance:
        advance()
        advance(2, "first")
        advance(3)
        advance(0, "best 4.2")
    line = last_line(screen)
    assert "score" in line and "6/6" in line and "candidates/s" in line
    assert "best 4.2" in line and "first" not in line


def test_what_a_user_named_is_no_markup(screen):
    name = "arm [bold]x[/] :smile: [/nothing]"
    with progress(f"pretrain {name}", 2, "tokens") as advance:
        advance(1, f"note {name}")
    line = last_line(screen)
    assert line.count(name) == 2
    with module.output.capture() as captured:
        module.output.print(f"{name} in /a/[b]/c")
    assert captured.get().strip() == f"{name} in /a/[b]/c"


def test_a_note_stays_until_the_next(screen):
    with progress("score", 2, "candidates") as advance:
        advance(1, "kept")
        advance(1)
    assert "kept" in last_line(screen)


def test_before_the_first_advance_there_is_no_rate(screen):
    with progress("read", 5, "files"):
        pass
    line = last_line(screen)
    assert "0/5" in line and "– files/s" in line


def test_an_error_passes_through(screen):
    with pytest.raises(ZeroDivisionError), progress("read", 1, "files"):
        _ = 1 / 0


def test_writes_to_standard_error_only(capfd: pytest.CaptureFixture[str]):
    with progress("extract", 1, "tensors") as advance:
        advance()
    assert capfd.readouterr().out == ""
