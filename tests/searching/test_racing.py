"""Who goes on in a race, told by the definition over a table of losses."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from headstart.searching.candidate import Candidate
from headstart.searching.journal import Evaluated, Journal
from headstart.searching.racing import Proposal, Race, RacingSettings, rung_blocks
from headstart.searching.units import Units

BLOCK_LENGTH = 5
RACING = RacingSettings(rungs=3)


class Table:
    """A fitness read from a table: candidate's number -> nats of each block."""

    block_length = BLOCK_LENGTH

    def __init__(self, num_candidates: int, num_blocks: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.num_blocks = num_blocks
        level = [rng.uniform(3, 9) for _ in range(num_candidates)]
        self.nats = [[rng.gauss(mean, 1) for _ in range(num_blocks)] for mean in level]
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        self.calls.append((candidate.head_dim, start, stop))
        return sum(self.nats[candidate.head_dim][start:stop])

    def mean(self, number: int, num_blocks: int) -> float:
        return sum(self.nats[number][:num_blocks]) / (num_blocks * (BLOCK_LENGTH - 1))


def proposal(number: int) -> Proposal:
    return Candidate(Units(2), Units(3), number, (Units(1),), (Units(1),)), "sample"


def race(table: Table, folder: Path, settings: RacingSettings, keep: int = 2) -> Race:
    return Race(table, lambda candidate: 7, Journal(folder / "search.jsonl", {}), settings, keep)


@pytest.mark.parametrize(("rungs", "factor", "keep"), [(3, 4, 2), (2, 2, 3), (4, 2, 1), (1, 2, 2)])
def test_a_candidate_goes_on_while_it_is_among_the_best_so_far(
    tmp_path: Path, rungs: int, factor: int, keep: int
) -> None:
    table = Table(30, 16)
    run = race(table, tmp_path, RacingSettings(rungs, factor), keep)
    blocks = rung_blocks(16, RacingSettings(rungs, factor))
    seen: list[list[float]] = [[] for _ in blocks]
    tokens = 0
    for generation in range(3):
        numbers = list(range(10 * generation, 10 * generation + 10))
        scores = run.run(generation, [proposal(number) for number in numbers])
        reached = dict.fromkeys(numbers, 0)
        alive = numbers
        for rung, num_blocks in enumerate(blocks):
            tokens += len(alive) * (num_blocks - (blocks[rung - 1] if rung else 0)) * BLOCK_LENGTH
            for number in alive:
                reached[number] = num_blocks
                seen[rung].append(table.mean(number, num_blocks))
            bar = sorted(seen[rung])[:keep][-1]
            alive = [number for number in alive if table.mean(number, num_blocks) <= bar]
        for number, score in zip(numbers, scores, strict=True):
            assert score.tokens == reached[number] * BLOCK_LENGTH
            assert score.loss == pytest.approx(table.mean(number, reached[number]), rel=1e-12)
            assert (score.generation, score.origin, score.parameters) == (generation, "sample", 7)
    assert sum((stop - start) * BLOCK_LENGTH for _, start, stop in table.calls) == tokens
    if rungs > 1:
        assert tokens < 30 * 16 * BLOCK_LENGTH / 1.5


def test_what_the_journal_knows_is_not_scored_again(tmp_path: Path) -> None:
    proposals = [proposal(number) for number in range(8)]
    first = race(Table(8, 8), tmp_path, RACING).run(0, proposals)
    table = Table(8, 8)
    again = race(table, tmp_path, RACING).run(0, proposals)
    assert again == first
    assert table.calls == []


def test_a_race_that_was_killed_reads_only_what_is_missing(tmp_path: Path) -> None:
    proposals = [proposal(number) for number in range(8)]
    whole = Table(8, 16)
    scores = race(whole, tmp_path, RACING).run(0, proposals)
    lines = (tmp_path / "search.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(whole.calls) > 8 + 2 + 1  # some went on
    for num_kept in range(len(whole.calls) + 1):
        (tmp_path / "search.jsonl").write_text("".join(lines[: 1 + num_kept]))
        table = Table(8, 16)
        told: list[bool] = []
        again = race(table, tmp_path, RACING)
        again.on_score = lambda score, tokens, replayed: told.append(replayed)  # noqa: B023
        for score, other in zip(again.run(0, proposals), scores, strict=True):
            assert (score.candidate, score.loss, score.tokens) == (
                other.candidate,
                other.loss,
                other.tokens,
            )
        assert table.calls == whole.calls[num_kept:]
        assert told == [True] * num_kept + [False] * len(table.calls)


def test_good_ones_go_on_beside_many_that_are_no_number(tmp_path: Path) -> None:
    """Also while fewer than `keep` have ever been seen; and a hopeless generation ends early."""
    table = Table(8, 16)
    for number in (0, 1, 2, 4, 5, 6, 7):
        table.nats[number] = [math.nan] * 16
    run = race(table, tmp_path, RACING, keep=4)
    scores = run.run(0, [proposal(number) for number in range(4)])
    assert [score.tokens // BLOCK_LENGTH for score in scores] == [1, 1, 1, 16]
    scores = run.run(1, [proposal(number) for number in range(4, 8)])
    assert [score.tokens // BLOCK_LENGTH for score in scores] == [1, 1, 1, 1]
    assert run.run(2, []) == []


def test_equals_go_on_together(tmp_path: Path) -> None:
    table = Table(4, 16)
    table.nats = [[2.0] * 16, [3.0] * 16, [2.0] * 16, [2.0] * 16]
    scores = race(table, tmp_path, RACING, keep=1).run(0, [proposal(i) for i in range(4)])
    assert [score.tokens // BLOCK_LENGTH for score in scores] == [16, 1, 16, 16]


def test_a_loss_that_is_no_number_never_goes_on(tmp_path: Path) -> None:
    table = Table(3, 8)
    table.nats[1] = [math.nan] * 8
    table.nats[2] = [math.inf] * 8
    scores = race(table, tmp_path, RACING, keep=3).run(0, [proposal(i) for i in range(3)])
    assert [score.tokens for score in scores] == [8 * BLOCK_LENGTH, BLOCK_LENGTH, BLOCK_LENGTH]
    kept = Journal(tmp_path / "search.jsonl", {})
    assert math.isnan(kept.find(proposal(1)[0], BLOCK_LENGTH).loss)  # type: ignore[union-attr]
    assert "NaN" not in (tmp_path / "search.jsonl").read_text()


def test_everything_is_told_with_its_own_tokens(tmp_path: Path) -> None:
    told: list[tuple[Evaluated, int, bool]] = []
    for replayed in (False, True):
        told.clear()
        run = race(Table(6, 16), tmp_path, RACING)
        run.on_score = lambda *arguments: told.append(arguments)
        scores = run.run(0, [proposal(number) for number in range(6)])
        assert sum(tokens for _, tokens, _ in told) == sum(score.tokens for score in scores)
        assert {again for _, _, again in told} == {replayed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rungs": 0}, "rungs is 0"), ({"factor": 1}, "factor is 1"), ({"keep": -1}, "keep is -1")],
)
def test_settings_errors(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"search.racing.{message}"):
        RacingSettings(**changed)


def test_few_blocks_make_few_rungs() -> None:
    assert rung_blocks(1, RACING) == [1]
    assert rung_blocks(64, RacingSettings(rungs=1)) == [64]
    assert rung_blocks(100, RacingSettings(rungs=3, factor=10)) == [1, 10, 100]
