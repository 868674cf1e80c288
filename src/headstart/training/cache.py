"""A teacher's outputs on disk, so that arms can distil without a teacher in memory.

A cache is a folder, here or on any filesystem that fsspec knows:

    cache.json                  what it holds, and of which teacher and text
    shard-00000.safetensors     outputs of the first blocks of the training split, in its order
    blocks.npy                  a hash of each block's tokens; written last

Outputs are found by the hash of a block's tokens, not by its place, so a shuffled loader or another
number of processes gets the outputs of the very block that it reads, or an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int, UInt, UInt64
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from headstart.losses.distillation import DistillationSettings, Samples, TopK, sample, top_k
from headstart.system.distributed import barrier, from_main, is_main, rank, world_size
from headstart.system.errors import UserError
from headstart.system.files import is_abandoned, scratch_prefix
from headstart.text.blocks import BlockDataset, document_positions, token_dtype
from headstart.text.mixture import MixedBlocks
from headstart.training.teacher import Teacher

CACHE_FORMAT = "headstart-teacher-cache/1"
SHARD_BYTES = 64_000_000
COLUMN = "teacher_"
"""What the names of a cached block's columns begin with in a batch."""


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache holds.

    Attributes:
        teacher: hash of the teacher's checkpoint.
        data: fingerprint of the token blocks, which covers text, tokenizer and block length.
        temperature: by which logits were divided.
        top_k: likeliest tokens kept, or 0.
        samples: tokens drawn, or 0.
        sampling_temperature: of what they were drawn from.
        dtype: of the numbers.
        shared_rows: tokens, the first ones, that the outputs are of, as if there were no others;
            0 for all.
        format: of the files.
    """

    teacher: str
    data: str
    temperature: float
    top_k: int
    samples: int
    sampling_temperature: float
    dtype: Literal["float16", "float32"]
    shared_rows: int = 0
    format: str = CACHE_FORMAT

    @staticmethod
    def of(
        settings: DistillationSettings, teacher: str, data: str, shared_rows: int = 0
    ) -> CacheIdentity:
        """What an arm with these settings needs."""
        return CacheIdentity(
            teacher=teacher,
            data=data,
            temperature=settings.temperature,
            top_k=settings.top_k,
            samples=settings.samples,
            sampling_temperature=settings.sampling_temperature,
            dtype=settings.cache_dtype,
            shared_rows=shared_rows,
        )


def write_cache(
    path: str,
    identity: CacheIdentity,
    teacher: Teacher,
    blocks: UInt[np.ndarray, "blocks tokens"] | MixedBlocks,
    batch_size: int,
    shard_bytes: int = SHARD_BYTES,
    separator: int | None = None,
    on_blocks: Callable[[int], None] = lambda num_blocks: None,
) -> dict[str, Any]:
    """Ask a teacher about every block; a cache that was broken off goes on after its last shard.

    Processes under torchrun share the shards.

    Args:
        path: folder or URL.
        blocks: the training split.
        batch_size: blocks in a forward pass.
        shard_bytes: size of a shard; a block more, at most.
        separator: the token that ends a document, where none may see another document's tokens.
        on_blocks: called with the blocks that each batch added, those found on disk included.

    Returns:
        The content of `cache.json`.

    Raises:
        UserError: the folder holds another cache.
    """
    files, root = fsspec.url_to_fs(path)
    vocab = teacher.model.config.vocab_size
    id_dtype = token_dtype(vocab)
    num_bytes = bytes_per_token(identity, vocab)
    bytes_per_block = num_bytes * (blocks.shape[1] - 1)
    manifest = {
        **asdict(identity),
        "blocks": len(blocks),
        "block_length": blocks.shape[1],
        "blocks_per_shard": max(1, shard_bytes // bytes_per_block),
        "bytes_per_token": num_bytes,
    }

    def begun() -> dict[str, Any]:
        """The manifest of a folder that is there, and in which nothing abandoned lies."""
        found = _manifest(files, root)
        if found is None:
            files.makedirs(root, exist_ok=True)
            _put(files, f"{root}/cache.json", (json.dumps(manifest, indent=2) + "\n").encode())
        else:
            _refuse_others(path, identity, found)
        for left in files.ls(root, detail=False):
            if is_abandoned(str(left).rpartition("/")[2]):
                with suppress(FileNotFoundError):  # another run may do the same
                    files.rm(left)
        return found or manifest

    manifest = from_main(begun)
    step = manifest["blocks_per_shard"]
    for index in range(rank(), -(-len(blocks) // step), world_size()):
        shard = _shard(root, index)
        part = blocks[index * step : (index + 1) * step]
        if files.exists(shard):
            on_blocks(len(part))
            continue
        columns: dict[str, list[np.ndarray]] = {}
        with torch.random.fork_rng():  # draws depend on the shard alone
            torch.manual_seed(index)
            for start in range(0, len(part), batch_size):
                batch = part[start : start + batch_size]
                for name, values in _outputs(teacher, batch, identity, separator).items():
                    dtype = id_dtype if name == "ids" else np.dtype(identity.dtype)
                    columns.setdefault(name, []).append(values.cpu().numpy().astype(dtype))
                on_blocks(len(batch))
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        _put(files, shard, save({**arrays, "blocks": block_hashes(part)}))
    barrier()  # all shards are there
    if is_main():
        index_file = io.BytesIO()
        np.save(index_file, block_hashes(blocks))
        _put(files, f"{root}/blocks.npy", index_file.getvalue())
    return manifest


def block_hashes(
    blocks: UInt[np.ndarray, "blocks tokens"] | MixedBlocks,
) -> UInt64[np.ndarray, " blocks"]:
    """64 bits for the tokens of each block, whatever integers they are stored as."""
    digests = (
        hashlib.blake2b(np.ascontiguousarray(block, dtype="<u4").tobytes(), digest_size=8).digest()
        for block in blocks
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")


class TeacherCache:
    """Reads a cache.

    Args:
        path: folder or URL; remote shards are kept in a local temporary folder.
        identity: what it must hold.

    Raises:
        UserError: there is no finished cache, or it is one of another teacher, text or setting.
    """

    def __init__(self, path: str, identity: CacheIdentity) -> None:
        self.path, self.identity = path, identity
        files, self._root = fsspec.url_to_fs(path)
        found = check_cache(path, identity)
        if found is None:
            raise UserError(
                f"kd.cache {path} holds no teacher cache; write it with `headstart cache-teacher`"
            )
        self._blocks_per_shard = found["blocks_per_shard"]
        try:
            with files.open(f"{self._root}/blocks.npy", "rb") as stream:
                hashes = np.load(io.BytesIO(stream.read()), allow_pickle=False)
        except FileNotFoundError:
            raise UserError(
                f"kd.cache {path} is unfinished; start `headstart cache-teacher` again to go on"
            ) from None
        self._places = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._places]
        self._is_local = isinstance(files, LocalFileSystem)
        self._url = files.unstrip_protocol(self._root)
        self._shards: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # open files do not travel to other processes

    def outputs(self, block: UInt[np.ndarray, " tokens"]) -> dict[str, Tensor]:
        """What the teacher said of one block: each field of `TopK` or `Samples`, by its name.

        Raises:
            UserError: the cache does not know the block, or a shard has changed.
        """
        (wanted,) = block_hashes(block[None])
        place = int(np.searchsorted(self._hashes, wanted))
        if place == len(self._hashes) or self._hashes[place] != wanted:
            raise UserError(
                f"kd.cache {self.path} does not know a block of the training text; write the cache "
                "again for this text"
            )
        index, row = divmod(int(self._places[place]), self._blocks_per_shard)
        shard = self._open(index)
        if shard.get_slice("blocks")[row : row + 1][0] != wanted:
            raise UserError(
                f"{_shard(self.path, index)} holds other blocks than blocks.npy says; delete both "
                "and start `headstart cache-teacher` again"
            )
        columns = {
            name: shard.get_slice(name)[row : row + 1][0]
            for name in shard.keys()  # noqa: SIM118, a safetensors file is no dict
            if name != "blocks"
        }
        if self.identity.samples and "weights" not in columns:
            columns["weights"] = np.full(columns["ids"].shape, 1 / self.identity.samples)
        return {
            name: torch.from_numpy(values.astype(np.int64 if name == "ids" else np.float32))
            for name, values in columns.items()
        }

    def _open(self, index: int) -> Any:
        if index not in self._shards:
            local = _shard(self._root, index)
            if not self._is_local:
                local = fsspec.open_local(f"simplecache::{_shard(self._url, index)}")
            try:
                self._shards[index] = safe_open(local, framework="np")
            except Exception as error:
                raise UserError(
                    f"{_shard(self.path, index)} does not read ({error}); delete it and start "
                    "`headstart cache-teacher` again"
                ) from error
        return self._shards[index]


class CachedBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training blocks, each with what the teacher said of it, in columns named after `COLUMN`."""

    def __init__(self, blocks: BlockDataset, cache: TeacherCache) -> None:
        self.blocks, self.cache = blocks, cache

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        outputs = self.cache.outputs(self.blocks.blocks[index])
        columns = {f"{COLUMN}{name}": values for name, values in outputs.items()}
        return {**self.blocks[index], **columns}


def outputs_of_batch(inputs: dict[str, Tensor]) -> TopK | Samples:
    """A batch's cached outputs, all blocks' tokens in one dimension."""
    columns = {
        name.removeprefix(COLUMN): values.flatten(0, 1)
        for name, values in inputs.items()
        if name.startswith(COLUMN)
    }
    return Samples(**columns) if "weights" in columns else TopK(**columns)


def _outputs(
    teacher: Teacher,
    blocks: UInt[np.ndarray, "batch tokens"],
    identity: CacheIdentity,
    separator: int | None,
) -> dict[str, Tensor]:
    """What is kept of a batch, one row for each block and all of its tokens but the last."""
    tokens: Int[Tensor, "batch tokens"] = torch.from_numpy(blocks.astype(np.int64))
    rows: list[dict[str, Tensor]] = []
    positions = None
    if separator is not None:
        positions = document_positions(tokens, separator).to(teacher.model.device)
    for hidden in teacher.hidden(tokens.to(teacher.model.device), positions)[:, :-1]:
        logits = teacher.logits(hidden)[:, : identity.shared_rows or None]
        if identity.top_k:
            rows.append(top_k(logits, identity.top_k, identity.temperature)._asdict())
            continue
        drawn = sample(
            logits, identity.samples, identity.temperature, identity.sampling_temperature
        )._asdict()
        if identity.sampling_temperature == 1:
            del drawn["weights"]  # all alike
        rows.append(drawn)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def bytes_per_token(identity: CacheIdentity, vocab_size: int) -> int:
    """What a cache takes on disk for each token."""
    kept = min(identity.top_k, vocab_size) or identity.samples
    number_bytes = np.dtype(identity.dtype).itemsize
    numbers_per_id = 2 if identity.samples and identity.sampling_temperature != 1 else 1
    tail_bytes = number_bytes if identity.top_k else 0
    return int(
        kept * (token_dtype(vocab_size).itemsize + numbers_per_id * number_bytes) + tail_bytes
    )


def _manifest(files: Any, root: str) -> dict[str, Any] | None:
    try:
        with files.open(f"{root}/cache.json", "rb") as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
            return manifest
    except FileNotFoundError:
        return None


def check_cache(path: str, identity: CacheIdentity | None = None) -> dict[str, Any] | None:
    """The content of a cache's `cache.json`; None if nothing was begun there.

    Raises:
        UserError: it cannot be looked for, or is not the `identity` that is asked for.
    """
    try:
        found = _manifest(*fsspec.url_to_fs(path))
    except (ValueError, ImportError) as error:
        raise UserError(f"kd.cache {path} cannot be read ({error}); give another") from error
    if found is not None and identity is not None:
        _refuse_others(path, identity, found)
    return found


def finished_cache(path: str, identity: CacheIdentity) -> dict[str, Any] | None:
    """The content of a cache's `cache.json` if all of it is there, or None; errors as
    `check_cache`."""
    found = check_cache(path, identity)
    files, root = fsspec.url_to_fs(path)
    return found if found is not None and files.exists(f"{root}/blocks.npy") else None


def _refuse_others(path: str, identity: CacheIdentity, found: dict[str, Any]) -> None:
    found = {"shared_rows": 0, **found}  # which earlier versions do not write
    for key, wanted in asdict(identity).items():
        if found.get(key) != wanted:
            raise UserError(
                f"kd.cache {path} was written for another {key} ({found.get(key)!r} there, "
                f"{wanted!r} here); choose another kd.cache or delete it"
            )


def _shard(root: str, index: int) -> str:
    return f"{root}/shard-{index:05}.safetensors"


def _put(files: Any, path: str, content: bytes) -> None:
    """Write a file that appears whole or not at all, under a name of this writer's until then."""
    root, _, name = path.rpartition("/")
    unfinished = f"{root}/{scratch_prefix(name)}{uuid.uuid4().hex}"
    files.pipe_file(unfinished, content)
    files.mv(unfinished, path)
