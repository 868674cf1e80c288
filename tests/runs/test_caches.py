"""Arms train on a teacher cache that another process is writing, and take over where it dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tests.runs.conftest import BLOCK_LENGTH
from tests.runs.slow_cache_worker import SHARD_BYTES

from headstart.recipe import recipe_from_dict
from headstart.runs import caches
from headstart.runs.stages import run_pretrain, run_recipe
from headstart.training.cache import (
    CachedBlocks,
    TeacherCache,
    block_hashes,
    is_being_written,
    shard_names,
)
from headstart.training.cache_writer import write_cache
from headstart.training.teacher import Teacher
from headstart.training.trainer import ReportStep

CLI = str(Path(__file__).parents[1] / "float32_cli.py")
WORKER = str(Path(__file__).with_name("slow_cache_worker.py"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "write_cache", partial(write_cache, shard_bytes=SHARD_BYTES))
    monkeypatch.setattr(caches, "fitting_batch_size", lambda *_: 5)
    monkeypatch.setattr(TeacherCache.__init__, "__defaults__", (0.01,))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks of every forward pass that a teacher is asked for."""
    counts: list[int] = []
    hidden = Teacher.hidden

    def counted(self: Teacher, blocks: Any, *more: Any) -> Any:
        counts.append(len(blocks))
        return hidden(self, blocks, *more)

    monkeypatch.setattr(Teacher, "hidden", counted)
    return counts


def cached(recipe: dict[str, Any], tmp_path: Path, name: str) -> dict[str, Any]:
    """The recipe with one arm and a cache, in folders of this name."""
    kd = {"top_k": 8, "cache": str(tmp_path / name / "cache")}
    pretrain = {**recipe["pretrain"], "arms": [{"name": "cached", "learning_rate": 3e-3, "kd": kd}]}
    return {**recipe, "pretrain": pretrain, "output": str(tmp_path / name / "run")}


def cache_of(recipe: dict[str, Any]) -> str:
    return str(recipe["pretrain"]["arms"][0]["kd"]["cache"])


def weights(recipe: dict[str, Any]) -> bytes:
    file = Path(recipe["output"], "arms", "cached", "model", "model.safetensors")
    return file.read_bytes()


@contextmanager
def writing(recipe: dict[str, Any], seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes the cache, so many seconds after each batch; its first shard is there
    when the body begins."""
    path = Path(recipe["output"]).with_suffix(".yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, WORKER, str(seconds), "cache-teacher", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not shard_names(cache_of(recipe)):
                assert process.poll() is None
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def shard_bytes(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).glob("0*")}


def hashes_on_disk(path: str) -> np.ndarray:
    shards = (load_file(file) for file in sorted(Path(path).glob("*.safetensors")))
    return np.concatenate([shard["blocks"] for shard in shards])


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_killed", [False, True])
def test_an_arm_trains_while_another_process_writes(
    recipe: dict[str, Any],
    tmp_path: Path,
    asked: list[int],
    is_killed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It ends with the weights of one that had all of the cache; of a writer that is killed while
    it waits, it writes the rest, and no block twice."""
    whole, part = (cached(recipe, tmp_path, name) for name in ("whole", "part"))
    run_recipe(recipe_from_dict(whole))
    wanted, student = hashes_on_disk(cache_of(whole)), str(tmp_path / "whole" / "run" / "student")
    part["student"] = student
    asked.clear()
    there: list[int] = []
    on_step_end = ReportStep.on_step_end
    with writing(part, 0.5 if is_killed else 0.1) as process:
        assert is_being_written(cache_of(part))
        assert len(hashes_on_disk(cache_of(part))) < len(wanted) / 5

        def step(*arguments: Any, **options: Any) -> Any:
            there.append(len(shard_names(cache_of(part))))
            if is_killed and len(there) == 3:
                process.send_signal(signal.SIGKILL)
                process.wait()
            return on_step_end(*arguments, **options)

        monkeypatch.setattr(ReportStep, "on_step_end", step)
        run_pretrain(recipe_from_dict(part))
    told = " ".join(capfd.readouterr().err.split())
    assert "is being written; training begins on what is there" in told
    assert there[0] < len(shard_names(cache_of(whole)))
    assert weights(part) == weights(whole)
    np.testing.assert_array_equal(np.sort(hashes_on_disk(cache_of(part))), np.sort(wanted))
    assert ("any more; adding the rest" in told) is is_killed
    assert 0 < sum(asked) < len(wanted) if is_killed else not asked


@pytest.mark.exhaustive
def test_processes_wait_for_what_is_still_written(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two of them end where they would with all of the cache, and end, all of them, with a
    sentence where the writer dies; the same command goes on."""
    recipe["pretrain"]["tokens"] = 64 * BLOCK_LENGTH  # as many whole steps of one process
    whole, part, dead = (cached(recipe, tmp_path, name) for name in ("whole", "part", "dead"))

    def train(of: dict[str, Any]) -> subprocess.Popen[str]:
        path = Path(of["output"]).with_suffix(".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(of))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.Popen(
            [sys.executable, *launcher, CLI, "run", str(path)], stderr=subprocess.PIPE, text=True
        )

    def told(process: subprocess.Popen[str]) -> str:
        return " ".join(process.communicate(timeout=300)[1].split())

    with train(whole) as process:
        told(process)
        assert process.returncode == 0
    for of, signal_to_writer in ((part, signal.SIGCONT), (dead, signal.SIGKILL)):
        with writing(of, 0.3) as writer:
            writer.send_signal(signal.SIGSTOP)
            with train(of) as process:
                assert process.stderr is not None
                assert any("waiting for kd.cache" in line for line in process.stderr)
                writer.send_signal(signal_to_writer)
                if signal_to_writer == signal.SIGKILL:
                    writer.wait()
                    assert "and nobody writes it; start the same command again" in told(process)
                    assert process.returncode
                else:
                    rest = told(process)
                    assert process.returncode == 0, rest
    assert weights(part) == weights(whole)
    with train(dead) as process:
        told(process)
        assert process.returncode == 0
    assert weights(dead) == weights(whole)


@pytest.mark.exhaustive
def test_the_order_on_disk_is_that_of_reading(
    recipe: dict[str, Any], tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two seeds after one another, each with a trunk and a branch; larger budgets add to it."""
    recipe = cached(recipe, tmp_path, "a")
    del recipe["pretrain"]["tokens"]
    recipe["pretrain"] |= {"seeds": [3, 4], "budgets": [640, 1280], "evaluations": 1}
    read: dict[int, int] = {}
    get = CachedBlocks.__getitem__

    def recorded(self: CachedBlocks, index: int) -> Any:
        assert self.blocks.order is not None
        (found,) = block_hashes(self.blocks.block(index)[None]).tolist()
        read.setdefault(int(self.blocks.order[index]), found)
        return get(self, index)

    monkeypatch.setattr(CachedBlocks, "__getitem__", recorded)
    run_recipe(recipe_from_dict(recipe))
    before = shard_bytes(cache_of(recipe))
    first_read = list(read.values())
    assert hashes_on_disk(cache_of(recipe)).tolist() == first_read
    assert sum(asked) == len(first_read)
    larger = {**recipe, "output": str(tmp_path / "larger")}
    larger["pretrain"] = {**recipe["pretrain"], "seeds": [3], "budgets": [640, 1920]}
    asked.clear()
    read.clear()
    run_recipe(recipe_from_dict(larger))
    new = [found for found in read.values() if found not in first_read]
    assert new
    assert sum(asked) == len(new)
    assert hashes_on_disk(cache_of(recipe)).tolist() == first_read + new
    after = shard_bytes(cache_of(recipe))
    assert {name: after[name] for name in before} == before
