"""How a sub-network gets its weights: sliced, refitted, or out of a rotated teacher.

What calibration makes is kept in the cache, found again by the teacher's hash and the very tokens,
so that search and extraction calibrate once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.assets import cache_root, finished_folder
from headstart.device import default_device, has_fast_bf16, load_frozen
from headstart.progress import progress
from headstart.subnet.count import layers_flops_per_token
from headstart.subnet.extract import hash_checkpoint
from headstart.subnet.forward import batches_of
from headstart.subnet.propagate import can_propagate
from headstart.subnet.rotate import check_rotates, principal_basis, rotated_config, write_rotated
from headstart.subnet.rules import layouts_of, read_config, sizes_of
from headstart.subnet.spec import SubnetSpec
from headstart.subnet.statistics import (
    Statistics,
    cached_statistics,
    collect_statistics,
    statistics_flops,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Init = Literal["slice", "least_squares", "rotate+least_squares"]
ROTATED: Init = "rotate+least_squares"
"""The one whose students are cut out of a teacher in another basis."""


@dataclass(frozen=True)
class Calibration:
    """What sub-networks are cut out of, and how.

    Attributes:
        teacher: folder of the checkpoint that is cut, the rotated one if it is rotated.
        statistics: of its activations, by which what is kept is refitted; None to keep it.
        flops: what calibration cost, whether or not it was in the cache.
        blocks: tokens on which the student is then refitted layer by layer; None for plain slices.
    """

    teacher: Path
    statistics: Statistics | None = None
    flops: int = 0
    blocks: Int[Tensor, "blocks tokens"] | None = field(default=None, compare=False)


def cut_config(config: PreTrainedConfig, init: Init) -> PreTrainedConfig:
    """The config of the teacher that sub-networks are cut out of.

    Args:
        config: of the teacher as it is.
        init: a rotated teacher's embeddings are not tied.

    Raises:
        ValueError: the teacher cannot be rotated.
    """
    return rotated_config(config) if init == ROTATED else config


def calibrate(
    teacher: Path,
    init: Init,
    blocks: Int[Tensor, "blocks tokens"],
    teacher_hash: str = "",
    spec: SubnetSpec | None = None,
) -> Calibration:
    """Measure a teacher, and rotate it if asked, or find both in the cache.

    Args:
        teacher: folder of its checkpoint.
        init: "slice" needs no calibration; "least_squares" the moments of activations;
            "rotate+least_squares" writes a rotated teacher to the cache too.
        blocks: calibration token ids.
        teacher_hash: of the teacher's files, where it is known already.
        spec: of the only student that will be cut, if it is known. One with whole heads is refitted
            layer by layer alone, which ends in the same place, unless its family cannot be.

    Raises:
        ValueError: there is no text, or the teacher cannot be rotated.
    """
    if init == "slice":
        return Calibration(teacher)
    config = read_config(teacher)
    if init == ROTATED:
        check_rotates(config)
    elif spec is not None and spec.head_dim is None and can_propagate(config):
        return Calibration(teacher, blocks=blocks)
    key = {
        "teacher": teacher_hash or hash_checkpoint(teacher),
        "tokens": _hash(blocks),
        "bf16": has_fast_bf16(default_device()),
    }
    statistics = cached_statistics(
        cache_root() / "statistics", key, lambda folder: _collect(teacher, blocks, folder)
    )
    flops = calibration_flops(config, init, *blocks.shape)
    if init == "least_squares":
        return Calibration(teacher, statistics, flops, blocks)
    kept = cache_root() / "rotated" / statistics.folder.name
    if not kept.is_dir():
        with finished_folder(kept) as folder:
            basis = principal_basis(statistics.residual())
            save_file({"basis": basis.contiguous()}, folder / "basis.safetensors")
            (folder / "teacher").mkdir()
            write_rotated(teacher, basis, folder / "teacher")
    basis = load_file(kept / "basis.safetensors")["basis"]
    return Calibration(kept / "teacher", replace(statistics, basis=basis), flops, blocks)


def _collect(teacher: Path, blocks: Int[Tensor, "blocks tokens"], folder: Path) -> None:
    model = load_frozen(teacher, default_device())
    tokens_in_layers = blocks.numel() * sizes_of(model.config)["layers"]
    with progress("calibrate", tokens_in_layers, "tokens in layers") as advance:
        collect_statistics(model, batches_of(blocks), folder, advance)


def calibration_flops(
    config: PreTrainedConfig, init: Init, num_blocks: int, block_length: int
) -> int:
    """What calibration costs: all tokens' way through the layers, and products of activations."""
    if init == "slice":
        return 0
    num_tokens = num_blocks * block_length
    forward: int = layers_flops_per_token(layouts_of(config), sizes_of(config), block_length)
    return forward * num_tokens + statistics_flops(config, num_tokens)


def _hash(blocks: Int[Tensor, "blocks tokens"]) -> str:
    digest = hashlib.blake2b(str(tuple(blocks.shape)).encode(), digest_size=16)
    digest.update(blocks.cpu().numpy().tobytes())
    return digest.hexdigest()
