"""Writes a teacher's outputs to disk: what a training reads, in its order."""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import fsspec
import numpy as np
import torch
from jaxtyping import Int, Int64, UInt, UInt64
from safetensors.numpy import save
from torch import Tensor

from headstart.losses.distillation import sample, top_k
from headstart.system.distributed import barrier, from_main, is_main, rank, world_size
from headstart.system.files import is_abandoned, scratch_prefix
from headstart.system.hashing import hash_bytes, hash_json
from headstart.text.blocks import document_positions, token_dtype
from headstart.text.mixture import MixedBlocks
from headstart.training.cache import (
    MANIFEST,
    SILENCE_SECONDS,
    WRITING,
    CacheIdentity,
    block_hashes,
    bytes_per_token,
    check_cache,
    is_being_written,
    is_whole,
    names_in,
    put,
    read_hashes,
    shard_names,
)
from headstart.training.order import Wanted
from headstart.training.teacher import Teacher

SHARD_BYTES = 64_000_000
SEEN_SECONDS = SILENCE_SECONDS / 15
"""How often a writer says that it lives."""

Blocks = UInt[np.ndarray, "blocks tokens"] | MixedBlocks


def write_cache(
    path: str,
    identity: CacheIdentity,
    vocab_size: int,
    load: Callable[[], tuple[Teacher, int]],
    blocks: Blocks,
    wanted: Wanted,
    shard_bytes: int = SHARD_BYTES,
    on_blocks: Callable[[int], None] = lambda num_blocks: None,
) -> dict[str, Any]:
    """Ask a teacher about every block that is wanted and not there yet, in the order of training.

    Processes under torchrun share the shards.

    Args:
        path: folder or URL.
        vocab_size: the teacher's.
        load: gives the teacher, and the blocks in a forward pass; called if anything is missing.
        blocks: the training split.
        wanted: which of them.
        shard_bytes: size of a shard; a block more, at most.
        on_blocks: called with the blocks that each batch added, and at first with this process'
            share of those found on disk.

    Returns:
        The content of `cache.json`.

    Raises:
        UserError: the folder holds another cache.
    """
    num_bytes = bytes_per_token(identity, vocab_size)
    manifest = {**asdict(identity), "bytes_per_token": num_bytes}

    def begun() -> bool:
        """Make the folder known as this cache; whether all is there."""
        if check_cache(path, identity) is None:
            put(path, MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        if is_whole(path, wanted):
            return True
        _clear(path)
        return False

    if from_main(begun):
        return manifest
    with _seen(path, wanted):
        missing, num_found, first = from_main(lambda: _missing(path, blocks, wanted))
        on_blocks(num_found // world_size())
        if len(missing):
            step = max(1, shard_bytes // (num_bytes * (blocks.shape[1] - 1)))
            teacher, batch_size = load()
            for number in range(rank(), -(-len(missing) // step), world_size()):
                part = missing[number * step : (number + 1) * step]
                rows = np.stack([blocks[int(place)] for place in part])
                _write_shard(path, first + number, rows, identity, teacher, batch_size, on_blocks)
        barrier()  # all shards are there
        if is_main():
            said = {"wanted": wanted.to_json(), "shards": sorted(shard_names(path))}
            name = f"whole-{hash_json(said['wanted'])[:16]}.json"
            put(path, name, json.dumps(said).encode())
    return manifest


def _missing(
    path: str, blocks: Blocks, wanted: Wanted
) -> tuple[Int64[np.ndarray, " missing"], int, int]:
    """Places of wanted blocks that a cache does not hold, how many it holds, and the number of
    the first new shard."""
    names = sorted(shard_names(path))
    order = wanted.order(len(blocks))
    known = np.concatenate([np.empty(0, np.uint64), *(read_hashes(path, name) for name in names)])
    is_known = np.zeros(len(order), dtype=bool)
    if len(known):
        is_known = np.isin(block_hashes(blocks[int(place)] for place in order), known)
    first = 1 + max((int(name.partition("-")[0]) for name in names), default=-1)
    return order[~is_known], int(is_known.sum()), first


def _write_shard(
    path: str,
    number: int,
    blocks: UInt[np.ndarray, "blocks tokens"],
    identity: CacheIdentity,
    teacher: Teacher,
    batch_size: int,
    on_blocks: Callable[[int], None],
) -> None:
    """Write one shard, and then its hashes, with which it is there."""
    hashes = block_hashes(blocks)
    id_dtype = token_dtype(teacher.model.config.vocab_size)
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(blocks), batch_size):
        batch = slice(start, start + batch_size)
        for name, values in _outputs(teacher, blocks[batch], hashes[batch], identity).items():
            dtype = id_dtype if name == "ids" else np.dtype(identity.dtype)
            columns.setdefault(name, []).append(values.cpu().numpy().astype(dtype))
        on_blocks(len(blocks[batch]))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    # Two writers may be at one number, with other blocks.
    name = f"{number:05}-{hash_bytes(hashes.tobytes())[:16]}"
    put(path, f"{name}.safetensors", save({**arrays, "blocks": hashes}))
    index_file = io.BytesIO()
    np.save(index_file, hashes)
    put(path, f"{name}.npy", index_file.getvalue())


def _outputs(
    teacher: Teacher,
    blocks: UInt[np.ndarray, "batch tokens"],
    hashes: UInt64[np.ndarray, " batch"],
    identity: CacheIdentity,
) -> dict[str, Tensor]:
    """What is kept of a batch, one row for each block and all of its tokens but the last."""
    tokens: Int[Tensor, "batch tokens"] = torch.from_numpy(blocks.astype(np.int64))
    rows: list[dict[str, Tensor]] = []
    positions = None
    if identity.separator is not None:
        positions = document_positions(tokens, identity.separator).to(teacher.model.device)
    hidden = teacher.hidden(tokens.to(teacher.model.device), positions)[:, :-1]
    for of_block, block_hash in zip(hidden, hashes, strict=True):
        logits = teacher.logits(of_block)[:, : identity.shared_rows or None]
        if identity.top_k:
            rows.append(top_k(logits, identity.top_k, identity.temperature)._asdict())
            continue
        with torch.random.fork_rng():  # draws depend on the block alone
            torch.manual_seed(int(block_hash) >> 1)
            drawn = sample(
                logits, identity.samples, identity.temperature, identity.sampling_temperature
            )._asdict()
        if identity.sampling_temperature == 1:
            del drawn["weights"]  # all alike
        rows.append(drawn)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _clear(path: str) -> None:
    """Remove what killed writers have left: unfinished files, and shards without hashes."""
    files, root = fsspec.url_to_fs(path)
    # Whoever writes is asked first, or his last shard might be taken for left over.
    is_written, names, whole = is_being_written(path), names_in(path), shard_names(path)
    for name in names:
        stem, dot, ending = name.rpartition(".")
        is_orphan = ending == "safetensors" and stem not in whole and not is_written
        if is_abandoned(name) or (dot and is_orphan):
            with suppress(FileNotFoundError):  # another run may do the same
                files.rm(f"{root}/{name}")


@contextmanager
def _seen(path: str, wanted: Wanted) -> Iterator[None]:
    """Say what is being written to a cache, as long as the body runs; the main process does."""
    if not is_main():
        yield
        return
    files, root = fsspec.url_to_fs(path)
    name, is_done = f"{scratch_prefix(WRITING)}{uuid.uuid4().hex}", threading.Event()

    def say() -> None:
        said = {"time": time.time(), "wanted": wanted.to_json()}
        put(path, name, json.dumps(said).encode())

    def go_on_saying() -> None:
        while not is_done.wait(SEEN_SECONDS):
            with suppress(OSError):  # the next one may get through
                say()

    say()
    speaker = threading.Thread(target=go_on_saying, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        is_done.set()
        speaker.join()
        with suppress(FileNotFoundError):
            files.rm(f"{root}/{name}")
