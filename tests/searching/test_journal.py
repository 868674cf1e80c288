"""The journal keeps every score, belongs to one search, and survives a kill at any byte."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from headstart.searching.candidate import Candidate
from headstart.searching.journal import Evaluated, Journal
from headstart.searching.racing import RacingSettings
from headstart.searching.settings import SearchSettings
from headstart.searching.units import Units
from headstart.system.errors import UserError

IDENTITY = {"teacher_hash": "t", "data": "d", "settings": {"seed": 1, "bins": (1, 2)}}

PLAIN = Candidate(Units(3), Units(48), 16, (Units(2),), (Units(40),))
LAYERWISE = Candidate(
    Units(2, (1,), (3,)),
    Units(40, (3, 9), (44, 45)),
    8,
    (Units(1), Units(2)),
    (Units(16, (0, 1), (20, 79)), Units(64)),
)
SCORES = [
    Evaluated(0, "sample", PLAIN, 30_001, 4.1 / 3, 64, 0.25),
    Evaluated(0, "sample", PLAIN, 30_001, 4.2 / 3, 256, 1e-9),
    Evaluated(1, "crossover", LAYERWISE, 29_999, 1e300, 64, 12.5),
    Evaluated(0, "sample", PLAIN, 30_001, 2 / 3, 256, 3.0, steps=50, started=True),
    Evaluated(0, "sample", PLAIN, 30_001, 3 / 4, 256, 3.0, started=True),
]


def filled(path: Path, scores: list[Evaluated] = SCORES) -> Journal:
    journal = Journal(path, IDENTITY)
    journal.append(scores)
    return journal


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    filled(tmp_path / "new" / "j", SCORES[:3]).append(SCORES[3:])
    journal = Journal(tmp_path / "new" / "j", IDENTITY)
    assert list(journal.scores.values()) == SCORES
    for score in SCORES:
        key = (score.candidate, score.tokens, score.steps, score.started)
        assert journal.find(*key) == score
    assert journal.find(PLAIN, 64) == SCORES[0]
    assert journal.find(PLAIN, 256) == SCORES[1]  # not the finalist of as many tokens
    assert journal.find(PLAIN, 128) is None
    assert journal.find(LAYERWISE, 64, 50) is None
    assert journal.find(PLAIN._replace(head_dim=8), 64) is None


def test_the_file_is_what_the_page_says(tmp_path: Path) -> None:
    """docs/search.md, section search.jsonl."""
    filled(tmp_path / "j")
    first, *lines = map(json.loads, (tmp_path / "j").read_text().splitlines())
    assert first == {
        "format": "headstart-search/5",
        "teacher_hash": "t",
        "data": "d",
        "settings": {"seed": 1, "bins": [1, 2]},
    }
    assert lines[2] == {
        "generation": 1,
        "origin": "crossover",
        "candidate": {
            "layers": "2 -1 +3",
            "embed": "40 -3,9 +44-45",
            "head_dim": 8,
            "kv_groups": ["1", "2"],
            "mlp": ["16 -0-1 +20,79", "64"],
        },
        "parameters": 29_999,
        "loss": 1e300,
        "tokens": 64,
        "seconds": 12.5,
        "started": False,
        "steps": 0,
    }
    assert lines[0]["candidate"]["mlp"] == ["40"]
    assert [line["steps"] for line in lines] == [0, 0, 0, 50, 0]
    assert all(line.keys() == asdict(SCORES[0]).keys() for line in lines)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_null_and_comes_back_as_nan(
    loss: float, tmp_path: Path
) -> None:
    filled(tmp_path / "j", [replace(SCORES[0], loss=loss)])
    line = (tmp_path / "j").read_text().splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    found = Journal(tmp_path / "j", IDENTITY).find(PLAIN, 64)
    assert found is not None and math.isnan(found.loss)
    assert replace(found, loss=0) == replace(SCORES[0], loss=0)


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    filled(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    ends = [place for place, byte in enumerate(data) if byte == ord("\n")]
    for length in sorted({*range(0, len(data), 7), *ends, *(end + 1 for end in ends)}):
        path.write_bytes(data[:length])
        journal = Journal(path, IDENTITY)
        num_scores = max(0, data[:length].count(b"\n") - 1)  # the first line is the identity
        assert list(journal.scores.values()) == SCORES[:num_scores]
        journal.append(SCORES[num_scores:])
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**IDENTITY, "teacher_hash": "u"}, "teacher_hash is 't' there, 'u' here"),
        ({**IDENTITY, "settings": {"seed": 2}}, r"settings\.seed is 1 there, 2 here"),
        ({**IDENTITY, "more": "m"}, "more is None there, 'm' here"),
        ({"teacher_hash": "t", "data": "d"}, "settings is .* there, None here"),
        ({**IDENTITY, "format": "headstart-search/1"}, "format is 'headstart-search/5' there"),
    ],
)
def test_the_journal_of_another_search_is_refused(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    filled(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(ValueError, match=rf"journal of another search \({message}"):
        Journal(tmp_path / "j", other)
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "changed", "values"),
    [
        ("unit_noise", {"unit_noise": 0.25}, "0.5 there, 0.25 here"),
        ("racing.keep", {"racing": RacingSettings(keep=3)}, "0 there, 3 here"),
    ],
)
def test_a_settings_key_that_a_journal_lacks_is_at_its_default(
    key: str, changed: dict[str, Any], values: str, tmp_path: Path
) -> None:
    """An earlier version wrote the journal, which is of the same search all the same."""
    identity, path = {"teacher_hash": "t", "data": "d"}, tmp_path / "j"
    Journal(path, identity, SearchSettings(tokens=100)).append(SCORES)
    first, *lines = path.read_text().splitlines(keepends=True)
    header = json.loads(first)
    part, (*parents, last) = header["settings"], key.split(".")
    for parent in parents:
        part = part[parent]
    del part[last]
    path.write_text("".join([json.dumps(header) + "\n", *lines]))
    before = path.read_bytes()
    journal = Journal(path, identity, SearchSettings(tokens=100))
    assert list(journal.scores.values()) == SCORES
    for settings, message in (
        (SearchSettings(tokens=100, **changed), f"settings.{key} is {values}"),
        (SearchSettings(tokens=101), "settings.tokens is 100 there, 101 here"),
    ):
        with pytest.raises(UserError, match=re.escape(f"journal of another search ({message})")):
            Journal(path, identity, settings)
    assert path.read_bytes() == before


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "j", SCORES[:1])
    with (tmp_path / "j").open("a") as stream:
        stream.write('{"generation": 1, "ori')
    before = (tmp_path / "j").read_bytes()
    sent_by_main = [[before.decode().splitlines()[1]], []]

    def receive(values: list[Any]) -> None:
        values[0] = sent_by_main.pop(0)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast_object_list", receive)
    journal = Journal(tmp_path / "j", IDENTITY)
    journal.append(SCORES[1:])
    assert list(journal.scores.values()) == SCORES
    assert (tmp_path / "j").read_bytes() == before
    Journal(tmp_path / "other", IDENTITY).append(SCORES)
    assert not (tmp_path / "other").exists()
