"""Ranks and collectives: alone, and as two processes under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headstart.device import default_device
from headstart.distributed import gather, is_main, main_first, process_group, rank, world_size

WORKER = Path(__file__).parent / "search" / "ranks_worker.py"


def test_alone_nothing_is_joined_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), rank(), is_main()) == (1, 0, True)
    done = []
    with process_group(), main_first():
        assert not torch.distributed.is_initialized()
        done.append(gather("alone"))
    assert done == [["alone"]]


def test_torchrun_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (world_size(), rank(), is_main()) == (4, 3, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_two_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(log)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    both = [{"rank": 0, "of": 2, "main": True}, {"rank": 1, "of": 2, "main": False}]
    assert [line for line in lines if "gathered" in line] == [{"gathered": both}] * 2
    assert [line for line in lines if "enters" in line or "leaves" in line] == [
        {"enters": 0},
        {"leaves": 0},
        {"enters": 1},
        {"leaves": 1},
    ]
    failures = [["the main process fails"], []]
    assert [line for line in lines if "failures" in line] == [{"failures": failures}] * 2
    assert [line for line in lines if "joined" in line] == [{"joined": False}] * 2
