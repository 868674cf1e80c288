"""A teacher's outputs on disk, so that arms can distil without a teacher in memory.

A cache is a folder, here or on any filesystem that fsspec knows:

    cache.json                      what it holds, and of which teacher
    00000-HASH.safetensors          outputs of the blocks that training reads first, in its order
    00000-HASH.npy                  a hash of each of these blocks' tokens; written last
    whole-HASH.json                 what of a text is all there, and in which shards
    .unfinished-PID@HOST@writing-*  what somebody writes, and when he was last seen; then gone

Outputs are found by the hash of a block's tokens, not by its place. So any text may add to a cache,
any number of processes read it, and whoever reads gets the outputs of the very block, or an error.
A block that is not there yet is waited for as long as somebody writes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import UInt, UInt64
from safetensors import safe_open
from torch import Tensor

from headstart.losses.distillation import DistillationSettings, Samples, TopK
from headstart.system.distributed import is_main
from headstart.system.errors import UserError
from headstart.system.files import UNFINISHED, is_abandoned, scratch_prefix
from headstart.system.progress import console
from headstart.text.blocks import BlockDataset, token_dtype
from headstart.training.order import Wanted

CACHE_FORMAT = "headstart-teacher-cache/2"
MANIFEST = "cache.json"
WRITING = "writing"
WRITERS = re.compile(rf"{re.escape(UNFINISHED)}\d+@[^@]*@{WRITING}-[0-9a-f]+")
"""Names of the files that say what is being written."""
WHOLE = re.compile(r"whole-[0-9a-f]{16}\.json")
SILENCE_SECONDS = 300.0
"""After which a writer counts as dead."""
SHARD = re.compile(r"\d{5,}-[0-9a-f]{16}\.npy")
OPEN_SHARDS = 16
"""That a reader keeps at once. Training comes to one after the other."""
COLUMN = "teacher_"
"""What the names of a cached block's columns begin with in a batch."""


class CacheIncomplete(UserError):
    """A training reads a block that its cache lacks, and nobody writes the cache."""

    @staticmethod
    def at(path: str) -> CacheIncomplete:
        """One whose sentence says what to do."""
        return CacheIncomplete(
            f"kd.cache {path} does not know a block of the training text, and nobody writes it; "
            "start the same command again to add what is missing"
        )


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache holds.

    Attributes:
        teacher: hash of the teacher's checkpoint.
        separator: the token that ends a document, where none may see another document's tokens.
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
    separator: int | None
    temperature: float
    top_k: int
    samples: int
    sampling_temperature: float
    dtype: Literal["float16", "float32"]
    shared_rows: int = 0
    format: str = CACHE_FORMAT

    @staticmethod
    def of(
        settings: DistillationSettings,
        teacher: str,
        separator: int | None = None,
        shared_rows: int = 0,
    ) -> CacheIdentity:
        """What an arm with these settings needs."""
        return CacheIdentity(
            teacher=teacher,
            separator=separator,
            temperature=settings.temperature,
            top_k=settings.top_k,
            samples=settings.samples,
            sampling_temperature=settings.sampling_temperature,
            dtype=settings.cache_dtype,
            shared_rows=shared_rows,
        )


def block_hashes(
    blocks: UInt[np.ndarray, "blocks tokens"] | Iterable[UInt[np.ndarray, " tokens"]],
) -> UInt64[np.ndarray, " blocks"]:
    """64 bits for the tokens of each block, whatever integers they are stored as."""
    digests = (
        hashlib.blake2b(np.ascontiguousarray(block, dtype="<u4").tobytes(), digest_size=8).digest()
        for block in blocks
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")


class TeacherCache:
    """Reads a cache, also while it is written.

    Args:
        path: folder or URL; remote shards are kept in a local temporary folder.
        identity: what it must hold.
        poll_seconds: how often to look for a block that is not there yet.

    Raises:
        UserError: there is no cache, or it is one of another teacher or setting.
    """

    def __init__(self, path: str, identity: CacheIdentity, poll_seconds: float = 2.0) -> None:
        self.path, self.identity, self.poll_seconds = path, identity, poll_seconds
        self._files, self._root = fsspec.url_to_fs(path)
        if check_cache(path, identity) is None:
            raise UserError(
                f"kd.cache {path} holds no teacher cache; write it with `headstart cache-teacher`"
            )
        self._is_local = isinstance(self._files, LocalFileSystem)
        self._hashes = np.empty(0, dtype=np.uint64)
        """Of all blocks that are there, ascending; beside them the shard and the row of each."""
        self._shard_of = self._row_of = np.empty(0, dtype=np.int32)
        self._names: list[str] = []
        self._shards: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        """File and content of those that were read last."""
        self._look_again()

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to other processes.
        return {**self.__dict__, "_shards": OrderedDict()}

    def outputs(self, block: UInt[np.ndarray, " tokens"]) -> dict[str, Tensor]:
        """What the teacher said of one block: each field of `TopK` or `Samples`, by its name.

        Waits for it while somebody writes the cache.

        Raises:
            CacheIncomplete: the cache does not know the block, and nobody writes it.
            UserError: a shard has changed.
        """
        wanted = int(block_hashes(block[None])[0])
        name, row = self._place(wanted)
        shard = self._open(name)
        if int(shard.get_slice("blocks")[row : row + 1][0]) != wanted:
            raise UserError(
                f"{self.path}/{name}.safetensors holds other blocks than {name}.npy says; delete "
                "both and start the same command again"
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

    def _place(self, wanted: int) -> tuple[str, int]:
        """The shard and the row of a block, as soon as it is there."""
        has_said = False
        while (found := self._find(wanted)) is None:
            is_written = is_being_written(self.path)  # asked first, or its last shard is missed
            self._look_again()
            if (found := self._find(wanted)) is not None:
                break
            if not is_written:
                raise CacheIncomplete.at(self.path)
            if not has_said and is_main():
                console.print(f"waiting for kd.cache {self.path}, which is still written")
            has_said = True
            time.sleep(self.poll_seconds)
        return found

    def _find(self, wanted: int) -> tuple[str, int] | None:
        """The shard and the row of a block, if it is known."""
        place = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        if place == len(self._hashes) or int(self._hashes[place]) != wanted:
            return None
        return self._names[self._shard_of[place]], int(self._row_of[place])

    def _look_again(self) -> None:
        """Learn of shards that have come."""
        new = sorted(shard_names(self.path) - set(self._names))
        if not new:
            return
        of_shards = [read_hashes(self.path, name) for name in new]
        first = len(self._names)
        self._names += new
        hashes = np.concatenate([self._hashes, *of_shards])
        shards = [np.full(len(of), first + at, np.int32) for at, of in enumerate(of_shards)]
        rows = [np.arange(len(of), dtype=np.int32) for of in of_shards]
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._shard_of = np.concatenate([self._shard_of, *shards])[order]
        self._row_of = np.concatenate([self._row_of, *rows])[order]

    def _open(self, name: str) -> Any:
        if name in self._shards:
            self._shards.move_to_end(name)
            return self._shards[name][1]
        local = f"{self._root}/{name}.safetensors"
        if not self._is_local:
            local = fsspec.open_local(f"simplecache::{self._files.unstrip_protocol(local)}")
        try:
            self._shards[name] = local, safe_open(local, framework="np")
        except Exception as error:
            raise UserError(
                f"{self.path}/{name}.safetensors does not read ({error}); delete it and "
                f"{name}.npy and start the same command again"
            ) from error
        if len(self._shards) > OPEN_SHARDS:
            _, (left, _) = self._shards.popitem(last=False)
            if not self._is_local:
                Path(left).unlink(missing_ok=True)
        return self._shards[name][1]


class CachedBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training blocks, each with what the teacher said of it, in columns named after `COLUMN`.

    Args:
        asked: the items for which the teacher is asked; all when None.
    """

    def __init__(
        self, blocks: BlockDataset, cache: TeacherCache, asked: range | None = None
    ) -> None:
        self.blocks, self.cache, self.asked = blocks, cache, asked

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.asked is not None and index not in self.asked:
            return self.blocks[index]
        outputs = self.cache.outputs(self.blocks.block(index))
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


def bytes_per_token(identity: CacheIdentity, vocab_size: int) -> int:
    """What a cache takes on disk for each token."""
    kept = min(identity.top_k, vocab_size) or identity.samples
    number_bytes = np.dtype(identity.dtype).itemsize
    numbers_per_id = 2 if identity.samples and identity.sampling_temperature != 1 else 1
    tail_bytes = number_bytes if identity.top_k else 0
    return int(
        kept * (token_dtype(vocab_size).itemsize + numbers_per_id * number_bytes) + tail_bytes
    )


def check_cache(path: str, identity: CacheIdentity | None = None) -> dict[str, Any] | None:
    """The content of a cache's `cache.json`; None if nothing was begun there.

    Raises:
        UserError: it cannot be looked for, or is not the `identity` that is asked for.
    """
    try:
        files, root = fsspec.url_to_fs(path)
        with files.open(f"{root}/{MANIFEST}", "rb") as stream:
            found: dict[str, Any] = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except (ValueError, ImportError) as error:
        raise UserError(f"kd.cache {path} cannot be read ({error}); give another") from error
    if identity is not None:
        _refuse_others(path, identity, found)
    return found


def names_in(path: str) -> list[str]:
    """Of the files in a cache's folder, as they are now; none if there is no folder."""
    files, root = fsspec.url_to_fs(path)
    files.invalidate_cache()
    try:
        return [str(found).rpartition("/")[2] for found in files.ls(root, detail=False)]
    except FileNotFoundError:
        return []


def shard_names(path: str) -> set[str]:
    """Of the shards that are whole."""
    names = set(names_in(path))
    stems = (name.removesuffix(".npy") for name in names if SHARD.fullmatch(name))
    return {stem for stem in stems if f"{stem}.safetensors" in names}


def read_hashes(path: str, name: str) -> UInt64[np.ndarray, " blocks"]:
    """Of the blocks in a shard, in its order."""
    files, root = fsspec.url_to_fs(path)
    with files.open(f"{root}/{name}.npy", "rb") as stream:
        return np.asarray(np.load(io.BytesIO(stream.read()), allow_pickle=False))


def is_being_written(path: str, wanted: Wanted | None = None) -> bool:
    """Whether somebody, here or elsewhere, is adding to a cache, all that is wanted included."""
    for name in names_in(path):
        if not WRITERS.fullmatch(name) or is_abandoned(name):
            continue
        said = _read_json(path, name)
        if said is None or time.time() - said["time"] > SILENCE_SECONDS:
            continue
        if wanted is None or Wanted.from_json(said["wanted"]).covers(wanted):
            return True
    return False


def is_whole(path: str, wanted: Wanted) -> bool:
    """Whether it was found before that a cache holds all that is wanted, and it still does."""
    shards = shard_names(path)
    return any(
        Wanted.from_json(said["wanted"]).covers(wanted) and shards.issuperset(said["shards"])
        for name in names_in(path)
        if WHOLE.fullmatch(name) and (said := _read_json(path, name)) is not None
    )


def _read_json(path: str, name: str) -> dict[str, Any] | None:
    """The content of a file of a cache; None if it is gone."""
    files, root = fsspec.url_to_fs(path)
    with suppress(FileNotFoundError), files.open(f"{root}/{name}", "rb") as stream:
        found: dict[str, Any] = json.loads(stream.read())
        return found
    return None


def _refuse_others(path: str, identity: CacheIdentity, found: dict[str, Any]) -> None:
    if found.get("format") != identity.format:
        raise UserError(
            f"kd.cache {path} was written by another version of headstart; choose another "
            "kd.cache or delete it"
        )
    for key, wanted in asdict(identity).items():
        if found.get(key) != wanted:
            raise UserError(
                f"kd.cache {path} was written for another {key} ({found.get(key)!r} there, "
                f"{wanted!r} here); choose another kd.cache or delete it"
            )


def put(path: str, name: str, content: bytes) -> None:
    """Write a file of a cache, which appears whole or not at all."""
    files, root = fsspec.url_to_fs(path)
    files.makedirs(root, exist_ok=True)
    unfinished = f"{root}/{scratch_prefix(name)}{uuid.uuid4().hex}"
    files.pipe_file(unfinished, content)
    files.mv(unfinished, f"{root}/{name}")
