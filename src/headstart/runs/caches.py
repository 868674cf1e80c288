"""Teacher caches of a run: checked before it begins, and written before the first arm needs them.

`headstart cache-teacher` writes them ahead, maybe elsewhere; a run then finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from headstart.losses.distillation import DistillationSettings
from headstart.searching.fitness import fitting_batch_size
from headstart.system.device import default_device, load_frozen, release_memory
from headstart.system.distributed import entered_by_main, from_main, is_main, world_size
from headstart.system.errors import UserError
from headstart.system.files import cache_root
from headstart.system.hashing import hash_bytes
from headstart.system.locks import locked
from headstart.system.memo import LOCKS
from headstart.system.progress import console, progress
from headstart.text.blocks import TokenBlocks
from headstart.training.cache import CacheIdentity, check_cache, is_being_written, is_whole
from headstart.training.cache_writer import write_cache
from headstart.training.order import Wanted, arm_reads
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
        UserError: one is of another teacher or setting, or two arms want one cache to be
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
        arms: of which caches are written, those that train first first.
        reads_along: leave a cache to whoever is writing all that is wanted of it; training then
            waits for each block.

    Returns:
        The manifest of each cache that was not left, by its path.

    Raises:
        UserError: as `check_caches`.
    """
    sharing: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.kd and arm.kd.cache:
            sharing.setdefault(arm.kd.cache, []).append(arm)
    manifests = {}
    for path, of_cache in sharing.items():
        wanted = _wanted(of_cache, text, pretrain, train)
        if reads_along and from_main(partial(is_being_written, path, wanted)):
            if is_main():
                console.print(f"kd.cache {path} is being written; training begins on what is there")
            continue
        kd = of_cache[0].kd
        assert kd is not None
        manifests[path] = _written(teachers[kd.teacher], text, kd, wanted)
    return manifests


def _wanted(
    arms: Sequence[Arm], text: TokenBlocks, pretrain: PretrainSettings, train: dict[str, Any]
) -> Wanted:
    """What arms with one cache read of the training split."""
    block_length = text.split("train").shape[1]
    variants = [variant for arm in arms for variant in variants_of(arm, pretrain.seeds).values()]
    reads = [arm_reads(variant, pretrain, train, block_length) for variant in variants]
    return Wanted(text.fingerprint, tuple(dict.fromkeys(reads)))


def _identity(
    kd: DistillationSettings, teacher: DistillationTeacher, text: TokenBlocks
) -> CacheIdentity:
    return CacheIdentity.of(kd, teacher.checkpoint.hash, text.separator, teacher.shared_rows)


def _written(
    teacher: DistillationTeacher,
    text: TokenBlocks,
    kd: DistillationSettings,
    wanted: Wanted,
) -> dict[str, Any]:
    split, device = text.split("train"), default_device()
    block_length, architecture = split.shape[1], teacher.checkpoint.architecture

    def load() -> tuple[Teacher, int]:
        model = load_frozen(teacher.checkpoint.folder, device)
        itemsize = model.dtype.itemsize
        return Teacher(model), fitting_batch_size(
            architecture.sizes, block_length, device, itemsize
        )

    identity = _identity(kd, teacher, text)

    def found() -> dict[str, Any] | None:
        return check_cache(kd.cache, identity) if is_whole(kd.cache, wanted) else None

    if (manifest := from_main(found)) is not None:
        return manifest
    wanted = wanted.widened()
    num_blocks = min(len(split), sum(reads.stop - reads.start for reads in wanted.reads))
    num_tokens = num_blocks * block_length // world_size()
    with (
        _one_run_at_a_time(kd.cache),
        progress(f"cache {kd.cache}", num_tokens, "tokens") as advance,
    ):
        manifest = write_cache(
            kd.cache,
            identity,
            architecture.config.vocab_size,
            load,
            split,
            wanted,
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
