"""A cached teacher says what the teacher says, of the right block, or nothing at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from headstart.losses.distillation import DistillationSettings, Samples, TopK
from headstart.text.blocks import BlockDataset
from headstart.training import arms, cache_writer
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.cache import (
    SILENCE_SECONDS,
    CachedBlocks,
    CacheIdentity,
    TeacherCache,
    block_hashes,
    is_being_written,
    is_whole,
    names_in,
    outputs_of_batch,
)
from headstart.training.cache_writer import write_cache
from headstart.training.order import Reads, Wanted, arm_reads, training_order
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.teacher import Teacher

VOCAB = 128
SHARD_BYTES = 9_000
TOP_K = DistillationSettings(temperature=2.0, top_k=5, cache="c", cache_dtype="float32")
SAMPLED = DistillationSettings(temperature=2.0, samples=6, cache="c", cache_dtype="float32")
each_kind = pytest.mark.parametrize(
    "kd", [TOP_K, SAMPLED, replace(SAMPLED, sampling_temperature=1.5)]
)


def identity(kd: DistillationSettings, **changes: Any) -> CacheIdentity:
    return replace(CacheIdentity.of(kd, "teacher's hash"), **changes)


@pytest.fixture(scope="session")
def teacher(teacher_folder: Path) -> Teacher:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    assert model.config.vocab_size == VOCAB
    return Teacher(model.eval().requires_grad_(False))


@pytest.fixture
def train(blocks):
    """Blocks that are all different."""
    split = blocks.split("train")
    _, first = np.unique(block_hashes(split), return_index=True)
    return np.array(split[np.sort(first)])


def write(path: Path | str, kd, teacher, train, **more: Any) -> dict[str, Any]:
    options = {"wanted": whole(train), "shard_bytes": SHARD_BYTES, **more}
    batch_size = options.pop("batch_size", 5)
    return write_cache(
        str(path), identity(kd), VOCAB, lambda: (teacher, batch_size), train, **options
    )


def whole(train: np.ndarray, num_blocks: int | None = None) -> Wanted:
    """All of a text, or the beginning of its order."""
    return Wanted("text's hash", (Reads(1, 0, num_blocks or len(train)),))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def log_probabilities(teacher: Teacher, block: np.ndarray, temperature: float) -> np.ndarray:
    """Of the whole vocabulary, in float64, from transformers' own logits."""
    ids = torch.from_numpy(block.astype(np.int64))[None]
    logits = teacher.model(ids).logits[0, :-1].double().numpy() / temperature
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_top_k_is_what_the_teacher_says_of_that_block(teacher, train, tmp_path):
    write(tmp_path / "c", TOP_K, teacher, train)
    read = TeacherCache(str(tmp_path / "c"), identity(TOP_K))
    assert len(shards_of(tmp_path / "c")) > 2
    for place in np.random.default_rng(0).permutation(len(train)):
        found = read.outputs(train[place])
        expected = log_probabilities(teacher, train[place], 2.0)
        ids = np.argsort(-expected, axis=-1)[:, :5]
        np.testing.assert_array_equal(found["ids"], ids)
        kept = np.take_along_axis(expected, ids, axis=-1)
        np.testing.assert_allclose(found["log_probabilities"], kept, atol=1e-5)
        np.testing.assert_allclose(
            found["log_tail"].exp(), 1 - np.exp(kept).sum(axis=-1), atol=1e-5
        )


@pytest.mark.parametrize("sampling_temperature", [1.0, 1.5])
def test_samples_carry_the_teachers_probabilities_and_the_weights_of_their_draw(
    teacher, train, tmp_path, sampling_temperature
):
    kd = replace(SAMPLED, sampling_temperature=sampling_temperature)
    write(tmp_path / "c", kd, teacher, train)
    read = TeacherCache(str(tmp_path / "c"), identity(kd))
    drawn = set()
    for block in train:
        found = read.outputs(block)
        expected = log_probabilities(teacher, block, 2.0)
        proposal = np.exp(expected / sampling_temperature)
        proposal /= proposal.sum(axis=-1, keepdims=True)
        kept = np.take_along_axis(expected, found["ids"].numpy(), axis=-1)
        np.testing.assert_allclose(found["log_probabilities"], kept, atol=1e-5)
        weights = np.exp(kept) / np.take_along_axis(proposal, found["ids"].numpy(), axis=-1) / 6
        np.testing.assert_allclose(found["weights"], weights, rtol=1e-4)
        drawn.add(found["ids"].numpy().tobytes())
    assert len(drawn) == len({block.tobytes() for block in train})


@pytest.mark.parametrize("kd", [TOP_K, SAMPLED])
def test_half_precision_is_close(teacher, train, tmp_path, kd):
    half = replace(kd, cache_dtype="float16")
    write(tmp_path / "whole", kd, teacher, train, batch_size=16)
    write(tmp_path / "half", half, teacher, train, batch_size=16)
    whole = TeacherCache(str(tmp_path / "whole"), identity(kd)).outputs(train[3])
    found = TeacherCache(str(tmp_path / "half"), identity(half)).outputs(train[3])
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert found[name].dtype == values.dtype
        if kd.top_k or name != "ids":
            torch.testing.assert_close(found[name], values, atol=5e-3, rtol=1e-3)


@each_kind
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_per_token_are_those_on_disk(teacher, train, tmp_path, kd, dtype):
    kd = replace(kd, cache_dtype=dtype)
    manifest = write(tmp_path / "c", kd, teacher, train)
    found = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert manifest == found
    shards = [load_file(path) for path in shards_of(tmp_path / "c")]
    num_bytes = sum(v.nbytes for shard in shards for name, v in shard.items() if name != "blocks")
    assert num_bytes == manifest["bytes_per_token"] * len(train) * (train.shape[1] - 1)
    assert all(sum(v.nbytes for v in shard.values()) <= 1.3 * SHARD_BYTES for shard in shards)


class Killed(BaseException):
    pass


@each_kind
@pytest.mark.parametrize("num_blocks", [1, 13, 30, 44])
def test_a_cache_that_was_broken_off_goes_on(teacher, train, tmp_path, kd, num_blocks):
    write(tmp_path / "whole", kd, teacher, train)
    done = 0

    def kill(count: int) -> None:
        nonlocal done
        done += count
        if done >= num_blocks:
            raise Killed

    order = whole(train).order(len(train))
    with pytest.raises(Killed):
        write(tmp_path / "c", kd, teacher, train, on_blocks=kill)
    with pytest.raises(ValueError, match="nobody writes it; start the same command again"):
        TeacherCache(str(tmp_path / "c"), identity(kd)).outputs(train[order[-1]])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.safetensors")}
    counted: list[int] = []
    write(tmp_path / "c", kd, teacher, train, on_blocks=counted.append)
    assert sum(counted) == len(train)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@each_kind
def test_processes_share_the_shards(teacher, train, tmp_path, kd, monkeypatch):
    write(tmp_path / "one", kd, teacher, train)
    monkeypatch.setattr(cache_writer, "world_size", lambda: 3)
    counted: list[int] = []
    found: list[Any] = []
    for process in (1, 2, 0):
        heard = iter(found)

        def from_main(decide, heard=heard):  # all hear what the main process found at first
            said = next(heard, None)
            return found.append(decide()) or found[-1] if said is None else said

        monkeypatch.setattr(cache_writer, "from_main", from_main)
        monkeypatch.setattr(cache_writer, "rank", lambda process=process: process)
        monkeypatch.setattr(cache_writer, "is_main", lambda process=process: process == 0)
        write(tmp_path / "three", kd, teacher, train, on_blocks=counted.append)
    assert sum(counted) == len(train)
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")


@each_kind
def test_a_larger_budget_adds_what_is_missing(teacher, train, tmp_path, kd):
    """In the order of training, with what was there as it was."""
    write(tmp_path / "c", kd, teacher, train, wanted=whole(train, len(train) // 3))
    before = files_of(tmp_path / "c")
    asked: list[int] = []
    more = Wanted("text's hash", (Reads(1, 0, len(train) + 5), Reads(2, 3, 9)))
    write(tmp_path / "c", kd, teacher, train, wanted=more, on_blocks=asked.append)
    assert asked[0] == len(train) // 3
    assert sum(asked) == len(train)
    after = files_of(tmp_path / "c")
    assert {name: after[name] for name in before} == before
    on_disk = [load_file(path)["blocks"] for path in shards_of(tmp_path / "c")]
    order = training_order(len(train), len(train), seed=1)
    np.testing.assert_array_equal(np.concatenate(on_disk), block_hashes(train[order]))
    write(tmp_path / "whole", kd, teacher, train)
    here, there = (TeacherCache(str(tmp_path / name), identity(kd)) for name in ("c", "whole"))
    for block in train:  # draws too depend on the block alone
        torch.testing.assert_close(here.outputs(block), there.outputs(block), rtol=0, atol=1e-5)


def test_what_was_found_whole_is_not_looked_through_again(teacher, train, tmp_path, monkeypatch):
    path = str(tmp_path / "c")
    write(path, TOP_K, teacher, train)
    with monkeypatch.context() as patched:
        patched.setattr(cache_writer, "block_hashes", lambda blocks: pytest.fail("hashed"))
        write(path, TOP_K, teacher, train, wanted=whole(train, 7))
        nothing = Wanted("text's hash", (Reads(1, 4, 9),))
        assert is_whole(path, nothing)
        assert not is_whole(path, Wanted("another", nothing.reads))
        assert not is_whole(path, Wanted("text's hash", (Reads(2, 0, 1),)))
    last = shards_of(tmp_path / "c")[-1]
    lost = len(load_file(last)["blocks"])
    last.unlink()
    asked: list[int] = []
    write(path, TOP_K, teacher, train, on_blocks=asked.append)
    assert asked[0] == len(train) - lost
    assert sum(asked) == len(train)


def test_a_block_is_waited_for_while_somebody_writes(teacher, train, tmp_path, capsys):
    """The reader begins on the first shard, and another thread writes the rest."""
    path = str(tmp_path / "c")
    write(path, TOP_K, teacher, train, wanted=whole(train, 8))
    read = TeacherCache(path, identity(TOP_K), poll_seconds=0.01)
    order = whole(train).order(len(train))
    read.outputs(train[order[0]])
    last = train[order[-1]]
    has_begun, may_go_on = threading.Event(), threading.Event()

    def slow(num_blocks: int) -> None:
        if num_blocks != 8:  # which were there
            has_begun.set()
            may_go_on.wait(10)

    writer = threading.Thread(
        target=write, args=(path, TOP_K, teacher, train), kwargs={"on_blocks": slow}
    )
    writer.start()
    assert has_begun.wait(10)
    threading.Timer(0.2, may_go_on.set).start()
    assert is_being_written(path, whole(train))
    assert not is_being_written(path, Wanted("text's hash", (Reads(1, 0, len(train) + 1),)))
    found = read.outputs(last)
    writer.join()
    assert "waiting for kd.cache" in capsys.readouterr().err
    expected = log_probabilities(teacher, last, 2.0)
    np.testing.assert_array_equal(found["ids"], np.argsort(-expected, axis=-1)[:, :5])
    assert not is_being_written(path)
    assert not [name for name in names_in(path) if name.startswith(".")]


def test_a_dead_writer_is_not_waited_for(teacher, train, tmp_path, monkeypatch):
    """Neither one of this machine whose process is gone, nor one of another that is silent."""
    path = str(tmp_path / "c")
    write(path, TOP_K, teacher, train, wanted=whole(train, 8))
    gone = subprocess.Popen(["true"])
    gone.wait()
    now = time.time()
    for owner, last_seen, is_alive in (
        (f"{gone.pid}@{platform.node()}", now, False),
        (f"{os.getpid()}@{platform.node()}", now, True),
        ("1@elsewhere", now - SILENCE_SECONDS / 2, True),
        ("1@elsewhere", now - SILENCE_SECONDS - 1, False),
    ):
        said = tmp_path / "c" / f".unfinished-{owner}@writing-1"
        said.write_text(json.dumps({"time": last_seen}))
        assert is_being_written(path) is is_alive
        said.unlink()


def test_a_cache_may_lie_on_any_filesystem(teacher, train, tmp_path):
    write(tmp_path / "c", TOP_K, teacher, train)
    remote = f"memory://{tmp_path.name}"
    write(remote, TOP_K, teacher, train)
    here, there = (TeacherCache(path, identity(TOP_K)) for path in (str(tmp_path / "c"), remote))
    torch.testing.assert_close(here.outputs(train[40]), there.outputs(train[40]), rtol=0, atol=0)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher", "another"),
        ("separator", 3),
        ("temperature", 1.0),
        ("top_k", 6),
        ("samples", 3),
        ("dtype", "float16"),
    ],
)
def test_another_cache_is_refused(teacher, train, tmp_path, key, value):
    write(tmp_path / "c", TOP_K, teacher, train)
    other = identity(TOP_K, **{key: value})
    with pytest.raises(ValueError, match=f"was written for another {key} .*choose another"):
        TeacherCache(str(tmp_path / "c"), other)
    kept = files_of(tmp_path / "c")
    with pytest.raises(ValueError, match=f"was written for another {key}"):
        write_cache(str(tmp_path / "c"), other, VOCAB, lambda: (teacher, 5), train, whole(train))
    assert files_of(tmp_path / "c") == kept


def test_what_is_missing_or_broken_is_said(teacher, train, tmp_path):
    path = str(tmp_path / "c")
    with pytest.raises(ValueError, match="holds no teacher cache; write it with"):
        TeacherCache(path, identity(TOP_K))
    write(path, TOP_K, teacher, train)
    read = TeacherCache(path, identity(TOP_K))
    changed = train[0].copy()
    changed[-1] ^= 1
    with pytest.raises(
        ValueError, match="does not know a block of the training text, and nobody writes it"
    ):
        read.outputs(changed)
    first, second, *_ = shards_of(tmp_path / "c")
    its_block = train[whole(train).order(len(train))[0]]
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=rf"{first.name} holds other blocks"):
        TeacherCache(path, identity(TOP_K)).outputs(its_block)
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{first.name} does not read"):
        TeacherCache(path, identity(TOP_K)).outputs(its_block)
    manifest = json.loads((tmp_path / "c" / "cache.json").read_text())
    earlier = {**manifest, "format": "headstart-teacher-cache/1", "data": "text's hash"}
    (tmp_path / "c" / "cache.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="written by another version of headstart; choose another"):
        TeacherCache(path, identity(TOP_K))


def test_hashes_know_tokens_and_nothing_else():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 1 << 16, (50, 9)).astype(np.uint16)
    hashes = block_hashes(small)
    np.testing.assert_array_equal(hashes, block_hashes(small.astype(np.uint32)))
    np.testing.assert_array_equal(hashes[[7, 3]], block_hashes(small[[7, 3]]))
    assert len(set(hashes.tolist())) == 50


@pytest.mark.parametrize(("kd", "kind"), [(TOP_K, TopK), (SAMPLED, Samples)])
def test_a_batch_holds_each_blocks_outputs_in_a_row(teacher, train, tmp_path, kd, kind):
    write(tmp_path / "c", kd, teacher, train)
    read = TeacherCache(str(tmp_path / "c"), identity(kd))
    dataset = CachedBlocks(BlockDataset(train), read)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2)
    batches = list(loader)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(dataset) == len(train)
    for batch in batches:
        found = outputs_of_batch(batch)
        assert isinstance(found, kind)
        each = [read.outputs(block.numpy().astype(np.uint16)) for block in batch["input_ids"]]
        for name, values in found._asdict().items():
            expected = torch.cat([part[name] for part in each])
            torch.testing.assert_close(values, expected, rtol=0, atol=0)


@pytest.fixture
def inputs(student_checkpoint, teacher_checkpoint, blocks) -> ArmInputs:
    settings = PretrainSettings(tokens=1024, validation_tokens=80, evaluations=4)
    train = {"use_cpu": True, "per_device_train_batch_size": 4, "seed": 3}
    manifest = {**blocks.manifest, "fingerprint": "text's hash"}
    named = replace(blocks, manifest=manifest)
    return ArmInputs(student_checkpoint, teacher_checkpoint, named, settings, train)


def test_an_arm_trains_from_the_cache_as_from_the_teacher(inputs, teacher, tmp_path, monkeypatch):
    """All of the vocabulary is kept; the loader shuffles, over more than one epoch."""
    kd = DistillationSettings(alpha=0.3, beta=0.7, temperature=2.0, top_k=VOCAB)
    online = run_arm(Arm("a", kd=kd), inputs, tmp_path / "online")
    path = str(tmp_path / "cache")
    cached = replace(kd, cache=path, cache_dtype="float32")
    wanted = CacheIdentity.of(cached, inputs.teacher.hash)
    train = inputs.blocks.split("train")
    reads = arm_reads(Arm("a", kd=kd), inputs.settings, inputs.train, train.shape[1])
    of_arm = Wanted("text's hash", (reads,))
    write_cache(path, wanted, VOCAB, lambda: (teacher, 8), train, of_arm, SHARD_BYTES)
    monkeypatch.setattr(arms, "load_teacher", lambda *a: pytest.fail("the teacher was loaded"))
    offline = run_arm(Arm("a", kd=cached), inputs, tmp_path / "offline")
    losses = [[point["loss"] for point in run["curve"]] for run in (online, offline)]
    assert len(losses[0]) == 5
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_an_arm_refuses_the_cache_of_another_teacher(inputs, teacher, train, tmp_path):
    kd = replace(TOP_K, cache=str(tmp_path / "cache"))
    write(kd.cache, kd, teacher, train)
    with pytest.raises(ValueError, match="written for another teacher"):
        run_arm(Arm("a", kd=kd), inputs, tmp_path / "arm")
