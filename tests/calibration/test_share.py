"""Two processes refit one student together as one process does alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.calibration.share_worker import CASES, STUDENTS
from tests.conftest import random_teacher
from tests.system.test_distributed import TORCHRUN, run_python

from headstart.calibration.share import Share

WORKER = Path(__file__).parent / "share_worker.py"


@pytest.mark.parametrize(("num_blocks", "size"), [(7, 3), (2, 4), (8, 2)])
def test_every_block_is_counted_once_and_every_row_is_solved_once(
    num_blocks: int, size: int
) -> None:
    blocks = torch.arange(num_blocks)[:, None]
    shares = [Share(rank, size, counts=rank < num_blocks) for rank in range(size)]
    parts = [share.blocks(blocks) for share in shares]
    counted = [part for part, share in zip(parts, shares, strict=True) if share.counts]
    assert sorted(torch.cat(counted).flatten().tolist()) == list(range(num_blocks))
    assert all(len(part) for part in parts)  # a model reads something in any case
    assert torch.cat([share.rows(11) for share in shares]).tolist() == list(range(11))


def test_one_process_has_it_all() -> None:
    share, sums = Share(), torch.ones(3)
    assert share.total(sums) is sums and share.count(5, sums.device) == 5
    share.join(sums, sums.device)
    assert torch.equal(sums, torch.ones(3))
    assert share.blocks(sums).shape == (3,)


@pytest.mark.exhaustive
def test_two_processes_refit_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    for kind, *_ in STUDENTS.values():
        random_teacher(kind).save_pretrained(tmp_path / "teachers" / kind)
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / name / "cache"))
        run_python([*launcher, str(WORKER), str(tmp_path / name), str(tmp_path / "teachers")])
    for place, (_, num_blocks) in enumerate(CASES):
        alone, all_tokens = torch.load(tmp_path / "one" / f"{place}-0.pt")
        assert all_tokens == 20 * num_blocks and alone
        for rank in range(2):
            together, tokens = torch.load(tmp_path / "two" / f"{place}-{rank}.pt")
            own_blocks = len(range(rank, num_blocks, 2)) or 1
            assert tokens == 20 * own_blocks
            assert together.keys() == alone.keys()
            for weight, expected in zip(together.values(), alone.values(), strict=True):
                torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-11)
    for student in STUDENTS:
        # Eigenvectors of moments that differ by rounding differ by more.
        near = 1e-4 if student == "rotated" else 1e-5
        assert_near(*(tmp_path / name / student for name in ("one", "two")), near)
    alone, together = (
        sorted((tmp_path / name / "cache" / "statistics").iterdir()) for name in ("one", "two")
    )
    assert [folder.name for folder in alone] == [folder.name for folder in together]
    assert len(alone) == 3
    for folders in zip(alone, together, strict=True):
        assert_near(*folders, 1e-6)


def assert_near(folder: Path, other: Path, tolerance: float) -> None:
    """The tensors of two folders differ by no more than this share of their norms."""
    for file in (files := sorted(folder.glob("*.safetensors"))):
        theirs = load_file(other / file.name)
        for name, expected in load_file(file).items():
            distance = (theirs.pop(name) - expected).norm()
            assert distance <= tolerance * expected.norm(), (file, name)
        assert not theirs
    assert files
