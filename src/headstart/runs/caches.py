"""Teacher caches of a run: checked before it begins, and written before the first arm needs them.

`headstart cache-teacher` writes them ahead, maybe elsewhere; a run then finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Int64

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
from headstart.training.cache import CacheIdentity, check_cache, is_being_written
from headstart.training.cache_writer import write_cache
from headstart.training.order import arm_order, first_reads
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.teacher import DistillationTeacher, Teacher
from headstart.training.variants import variants_of

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
                "or other teachers; give one of them a cache of its own"
            )
        check_cache(kd.cache, identity)


def write_caches(
    teachers: Teachers,
    text: TokenBlocks,
    pretrain: PretrainSettings,
    train: dict[str, Any],
    arms: Sequence[Arm],
    reads_along: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write what is missing of the arms' caches; every process must call it, and they share it.

    Args:
        pretrain: with the budgets and seeds, which say what training reads, in which order.
        train: the recipe's `train:` block.
        arms: of which caches are written.
        reads_along: leave a cache to whoever is writing it; training then waits for each block.

    Returns:
        The manifest of each cache that was not left, by its path.

    Raises:
        UserError: as `check_caches`.
    """
    wanted: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.kd and arm.kd.cache:
            wanted.setdefault(arm.kd.cache, []).append(arm)
    manifests = {}
    for path, sharing in wanted.items():
        if reads_along and from_main(lambda path=path: is_being_written(path)):  # type: ignore[misc]
            console.print(f"kd.cache {path} is being written; training begins on what is there")
            continue
        kd, split = sharing[0].kd, text.split("train")
        assert kd is not None
        variants = (
            variant for arm in sharing for variant in variants_of(arm, pretrain.seeds).values()
        )
        order = first_reads([arm_order(each, pretrain, train, *split.shape) for each in variants])
        manifests[path] = _written(teachers[kd.teacher], text, kd, order)
    return manifests


def _identity(
    kd: DistillationSettings, teacher: DistillationTeacher, text: TokenBlocks
) -> CacheIdentity:
    return CacheIdentity.of(kd, teacher.checkpoint.hash, text.separator, teacher.shared_rows)


def _written(
    teacher: DistillationTeacher,
    text: TokenBlocks,
    kd: DistillationSettings,
    order: Int64[np.ndarray, " wanted"],
) -> dict[str, Any]:
    split, device = text.split("train"), default_device()
    block_length, architecture = split.shape[1], teacher.checkpoint.architecture

    def load() -> tuple[Teacher, int]:
        model = load_frozen(teacher.checkpoint.folder, device)
        itemsize = model.dtype.itemsize
        return Teacher(model), fitting_batch_size(
            architecture.sizes, block_length, device, itemsize
        )

    num_tokens = len(order) * block_length // world_size()
    with (
        _one_run_at_a_time(kd.cache),
        progress(f"cache {kd.cache}", num_tokens, "tokens") as advance,
    ):
        manifest = write_cache(
            kd.cache,
            _identity(kd, teacher, text),
            architecture.config.vocab_size,
            load,
            split,
            order,
            on_blocks=lambda count: advance(count * block_length),
        )
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
