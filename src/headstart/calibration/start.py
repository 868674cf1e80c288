"""How a sub-network gets its weights: sliced, refitted, or out of a rotated teacher.

What calibration makes is kept in the cache, found again by the teacher's hash and the very tokens,
so that search and extraction calibrate once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from headstart.calibration.activations import can_propagate
from headstart.calibration.costs import (
    propagation_flops,
    rotation_flops,
    slice_refit_flops,
    statistics_flops,
)
from headstart.calibration.layer_by_layer import batches_of
from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics, collect_statistics, sources_of
from headstart.calibration.propagate import refit_on_itself
from headstart.calibration.rotate import (
    check_rotates,
    principal_basis,
    read_rotated,
    rotated_architecture,
    write_rotated,
)
from headstart.calibration.share import Share
from headstart.model.architecture import Architecture
from headstart.model.axes import shape_of
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import slice_tensors
from headstart.model.spec import SubnetSpec
from headstart.system.device import default_device, has_fast_bf16, load_frozen
from headstart.system.distributed import from_main
from headstart.system.hashing import hash_tensors
from headstart.system.memo import remembered
from headstart.system.progress import progress

LEAST_TOKENS = 32_768
"""Of calibration, whatever the teacher's width."""
TOKENS_PER_INPUT = 12
"""Of calibration, for every input of the widest matrix that is re-solved. With 10.7 of the demo's
teacher a student trained to the losses that it had with 43 (docs/benchmarks/budgets.md)."""
STATISTICS_VERSION = 1
ROTATED_VERSION = 1
"""Of what the memo keeps; raise one when equal keys would give other numbers or other files."""

Init = Literal["slice", "least_squares", "rotate+least_squares"]
ROTATED: Init = "rotate+least_squares"
"""The one whose students are cut out of a teacher in another basis."""


@dataclass(frozen=True)
class Calibration:
    """What sub-networks are cut out of, and how.

    Attributes:
        teacher: the checkpoint that is cut, the rotated one if it is rotated.
        statistics: of its activations, by which what is kept is refitted; None to keep it.
        flops: what calibration cost, whether or not it was in the cache.
        blocks: tokens on which the student is then refitted layer by layer; None for plain slices.
        init: what all this makes of a student.
    """

    teacher: Checkpoint
    statistics: Statistics | None = None
    flops: int = 0
    blocks: Int[Tensor, "blocks tokens"] | None = field(default=None, compare=False)
    init: Init = "slice"


def cut_architecture(teacher: Architecture, init: Init) -> Architecture:
    """The architecture of the teacher that sub-networks are cut out of, rotated if need be.

    Raises:
        UserError: the teacher cannot be rotated.
    """
    return rotated_architecture(teacher) if init == ROTATED else teacher


def calibration_tokens(teacher: Architecture, init: Init, least: int = LEAST_TOKENS) -> int:
    """How many tokens calibration takes where nobody says it: more, the wider the teacher is.

    A matrix of n inputs is re-solved from their n x n moments, which need several times n tokens.

    >>> from transformers import GPTNeoXConfig
    >>> pythia = GPTNeoXConfig(hidden_size=4096, intermediate_size=16384, num_attention_heads=32)
    >>> calibration_tokens(Architecture.of(pythia), "least_squares")
    196608
    """
    if init == "slice":
        return least
    layouts, sizes = teacher.layouts, teacher.sizes
    inputs = (shape_of(layouts[pattern], sizes)[1] for pattern in sources_of(teacher))
    return max(least, TOKENS_PER_INPUT * max(inputs))


def calibrate(
    teacher: Checkpoint,
    init: Init,
    blocks: Int[Tensor, "blocks tokens"],
    spec: SubnetSpec | None = None,
    together: bool = False,
) -> Calibration:
    """Measure a teacher, and rotate it if asked, or find both in the cache.

    Args:
        teacher: its checkpoint.
        init: "slice" needs no calibration; "least_squares" the moments of activations;
            "rotate+least_squares" writes a rotated teacher to the cache too.
        blocks: calibration token ids.
        spec: of the only student that will be cut, if it is known. One with whole heads is refitted
            layer by layer alone, which ends in the same place, unless its family cannot be.
        together: all processes call it at once and share the measuring.

    Raises:
        UserError: there is no text, or the teacher cannot be rotated.
    """
    if init == "slice":
        return Calibration(teacher)
    if init == ROTATED:
        check_rotates(teacher.architecture)
    elif spec is not None and spec.head_dim is None and can_propagate(teacher.architecture):
        return Calibration(teacher, blocks=blocks, init=init)
    key = {
        "teacher": teacher.hash,
        "tokens": hash_tensors([("blocks", blocks)]),
        "bf16": has_fast_bf16(default_device()),
    }
    statistics = remembered(
        "statistics",
        STATISTICS_VERSION,
        key,
        make=lambda folder: _collect(teacher, blocks, folder, together),
        read=Statistics,
        together=together,
    )
    flops = calibration_flops(teacher.architecture, init, *blocks.shape)
    if init == "least_squares":
        return Calibration(teacher, statistics, flops, blocks, init)

    def rotate() -> tuple[Checkpoint, Tensor]:
        return remembered(
            "rotated",
            ROTATED_VERSION,
            [STATISTICS_VERSION, key],
            make=lambda folder: write_rotated(
                teacher, principal_basis(statistics.residual()), folder
            ),
            read=read_rotated,
        )

    rotated, basis = from_main(rotate) if together else rotate()
    return Calibration(rotated, replace(statistics, basis=basis), flops, blocks, init)


def _collect(
    teacher: Checkpoint, blocks: Int[Tensor, "blocks tokens"], folder: Path, together: bool
) -> None:
    share = Share.of_this_process(len(blocks), together)
    mine = share.blocks(blocks)
    model = load_frozen(teacher.folder, default_device())
    tokens_in_layers = mine.numel() * teacher.architecture.sizes["layers"]
    with progress("calibrate", tokens_in_layers, "tokens in layers") as advance:
        collect_statistics(model, batches_of(mine), folder, advance, share)


def calibration_flops(teacher: Architecture, init: Init, num_blocks: int, block_length: int) -> int:
    """What `calibrate` costs."""
    if init == "slice":
        return 0
    rotation = rotation_flops(teacher) if init == ROTATED else 0
    return statistics_flops(teacher, num_blocks, block_length) + rotation


def start_flops(calibration: Calibration, spec: SubnetSpec) -> int:
    """What refitting a student costs, beside what measuring its teacher did."""
    if calibration.blocks is None:
        return 0
    teacher = calibration.teacher.architecture
    sizes = spec.sizes(teacher.sizes)
    flops = propagation_flops(teacher, sizes, *calibration.blocks.shape)
    if calibration.statistics is not None:
        flops += slice_refit_flops(teacher, sizes, is_rotated=calibration.init == ROTATED)
    return flops


def student_tensors(
    calibration: Calibration,
    spec: SubnetSpec,
    on_tensor: Callable[[], None] = lambda: None,
    together: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a student, by their names in files, with memory of their own.

    One teacher tensor is in memory at a time, unless the student is refitted on itself.

    Args:
        calibration: what the student is cut out of, and how it is refitted.
        spec: what it keeps.
        on_tensor: called for each of the teacher's tensors, for progress.
        together: all processes call it at once and share the refit; each returns all tensors.

    Raises:
        UserError: the teacher cannot be read, or the spec does not fit it.
    """
    teacher, statistics = calibration.teacher, calibration.statistics

    def reported(named_tensor: tuple[str, Tensor]) -> tuple[str, Tensor]:
        on_tensor()
        return named_tensor

    # A loop would hold on to its last tensor.
    tensors: Iterator[tuple[str, Tensor]] = map(reported, teacher.tensors())
    share = Share.of_this_process(0, together)
    if statistics is not None:
        tensors = refitted(tensors, teacher.architecture, spec, statistics, share=share)
    sliced = slice_tensors(tensors, teacher.architecture, spec)
    if statistics is not None and together:
        sliced = _exchanged(sliced, teacher.architecture, len(spec.layers), share)
    if calibration.blocks is not None:
        return refit_on_itself(teacher, sliced, spec, calibration.blocks, together)
    return dict(map(_owned_copy, sliced))


def _exchanged(
    sliced: Iterable[tuple[str, Tensor]], teacher: Architecture, num_layers: int, share: Share
) -> Iterator[tuple[str, Tensor]]:
    """A student's tensors, of which each process has refitted those of its layers."""
    parts = dict(map(_owned_copy, sliced))  # all of its own before it waits for others
    for name in sorted(parts):  # or processes might exchange different ones
        layer = teacher.match(name)[1]
        of_layer = num_layers if layer is None else layer
        yield name, share.of_layer(parts.pop(name), of_layer, default_device())


def _owned_copy(named_tensor: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """A tensor that is no view of a larger one, which it would keep in memory."""
    name, tensor = named_tensor
    owns_memory = tensor.untyped_storage().nbytes() == tensor.nbytes
    return name, tensor if owns_memory else tensor.clone(memory_format=torch.contiguous_format)
