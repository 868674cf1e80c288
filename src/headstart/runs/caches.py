"""Teacher caches of a run: checked before it begins, and written before the first arm needs them.

`headstart cache-teacher` writes them ahead, maybe elsewhere; a run then finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from headstart.losses.distillation import DistillationSettings
from headstart.searching.fitness import fitting_batch_size
from headstart.system.device import default_device, load_frozen, release_memory
from headstart.system.distributed import entered_by_main, from_main, world_size
from headstart.system.errors import UserError
from headstart.system.files import cache_root
from headstart.system.hashing import hash_bytes
from headstart.system.locks import locked
from headstart.system.memo import LOCKS
from headstart.system.progress import console, progress
from headstart.text.blocks import TokenBlocks
from headstart.training.cache import CacheIdentity, check_cache, finished_cache, write_cache
from headstart.training.settings import Arm
from headstart.training.teacher import DistillationTeacher, Teacher

Teachers = Mapping[str, DistillationTeacher]
"""By their names in `kd.teacher`; the model that is cut has the empty one."""


def cached_distillation(arms: Sequence[Arm]) -> list[DistillationSettings]:
    """What the arms with a cache ask of it."""
    return [arm.kd for arm in arms if arm.kd and arm.kd.cache]


def check_caches(teachers: Teachers, text: TokenBlocks, arms: Sequence[Arm]) -> None:
    """Find out, before anything costly, whether caches that were begun are those of this run.

    Raises:
        UserError: one is of another teacher, text or setting, or two arms want one cache to be
            different.
    """
    identities = dict[str, CacheIdentity]()
    for kd in cached_distillation(arms):
        identity = _identity(kd, teachers[kd.teacher], text)
        if identities.setdefault(kd.cache, identity) != identity:
            raise UserError(
                f"two arms have the same kd.cache {kd.cache} and other settings of what it holds, "
                "or other teachers; "
                "give one of them a cache of its own"
            )
        check_cache(kd.cache, identity)


def write_caches(
    teachers: Teachers, text: TokenBlocks, arms: Sequence[Arm]
) -> dict[str, dict[str, Any]]:
    """Write what is missing of the arms' caches; every process must call it, and they share it.

    Returns:
        The manifest of each cache, by its path.

    Raises:
        UserError: as `check_caches`.
    """
    return {kd.cache: _written(teachers[kd.teacher], text, kd) for kd in cached_distillation(arms)}


def _identity(
    kd: DistillationSettings, teacher: DistillationTeacher, text: TokenBlocks
) -> CacheIdentity:
    return CacheIdentity.of(kd, teacher.checkpoint.hash, text.fingerprint, teacher.shared_rows)


def _written(
    teacher: DistillationTeacher, text: TokenBlocks, kd: DistillationSettings
) -> dict[str, Any]:
    identity = _identity(kd, teacher, text)
    with _one_run_at_a_time(kd.cache):
        if (manifest := from_main(lambda: finished_cache(kd.cache, identity))) is not None:
            return manifest
        split, device = text.split("train"), default_device()
        model = load_frozen(teacher.checkpoint.folder, device)
        sizes, block_length = teacher.checkpoint.architecture.sizes, split.shape[1]
        batch_size = fitting_batch_size(sizes, block_length, device, model.dtype.itemsize)
        num_tokens = split.size // world_size()
        with progress(f"cache {kd.cache}", num_tokens, "tokens") as advance:
            manifest = write_cache(
                kd.cache,
                identity,
                Teacher(model),
                split,
                batch_size,
                separator=text.separator,
                on_blocks=lambda count: advance(count * block_length),
            )
    del model
    release_memory()
    return manifest


@contextmanager
def _one_run_at_a_time(path: str) -> Iterator[None]:
    """Keep other runs of this machine from writing the same; others' shards would be the same."""

    def wait(owner: str) -> None:
        console.print(f"{owner} writes kd.cache {path}; waiting for it")

    file = cache_root() / LOCKS / f"teacher-cache-{hash_bytes(path.encode())}"
    with entered_by_main(lambda: locked(file, on_busy=wait)):
        yield
