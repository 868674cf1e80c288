"""Cuts a student out of its teacher and writes it as a folder that says where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import headstart
from headstart.calibration.start import (
    ROTATED,
    Calibration,
    Init,
    calibrate,
    cut_architecture,
    start_flops,
    student_tensors,
)
from headstart.model.card import licence_of, write_card
from headstart.model.checkpoint import Checkpoint, copy_files, write_checkpoint
from headstart.model.spec import SubnetSpec, load_spec
from headstart.model.weights import precisions
from headstart.system.distributed import from_main
from headstart.system.errors import UserError
from headstart.system.files import finished_folder, refuse_taken, write_json
from headstart.system.progress import progress


def extract_found(
    teacher: Checkpoint,
    spec_file: Path,
    out_folder: Path,
    *,
    init: Init | None = None,
    calibration_blocks: Int[Tensor, "blocks tokens"] | None = None,
    provenance: Mapping[str, Any] | None = None,
    together: bool = False,
) -> Path:
    """Cut the sub-network that a spec file describes out of a teacher.

    What the spec file says of its search, the costs above all, goes into `subnet.json`.

    Args:
        spec_file: such as `search.json`.
        out_folder: must not exist yet.
        init: by default that of the search which the spec is from.
        calibration_blocks: token ids, for every `init` but "slice".
        provenance: more entries for `subnet.json`.
        together: all processes call it at once and share a refit; the main one writes.

    Raises:
        UserError: the spec cannot be read, teacher and spec do not fit, or there is no text to
            calibrate with.
    """
    spec = load_spec(spec_file)
    searched: Init = spec.origin.get("init", "slice")
    init = init or searched
    if "init" in spec.origin and (init == ROTATED) != (searched == ROTATED):
        raise UserError(
            f"{spec_file} counts channels of a teacher that is "
            f"{'' if searched == ROTATED else 'not '}rotated, and --init {init} is for "
            f"{'' if init == ROTATED else 'un'}rotated ones; use --init {searched}"
        )
    refuse_another_teacher(spec, teacher, str(spec_file))
    cut_architecture(teacher.architecture, init).student(spec)  # refuses what cannot be cut
    if init != "slice" and calibration_blocks is None:
        raise UserError(f"init {init} needs text to calibrate with; give --data, or --init slice")
    source = Calibration(teacher)
    if calibration_blocks is not None:
        source = calibrate(teacher, init, calibration_blocks, spec, together)
    with progress("extract", len(source.teacher.files), "tensors") as advance:
        return extract_student(
            source,
            spec,
            out_folder,
            provenance={
                "teacher_name": str(teacher.folder),
                **(provenance or {}),
                **origin_of(spec, source),
                "teacher": str(teacher.folder),
                "teacher_hash": teacher.hash,
                "correction_flops": teacher.correction_flops,
                "teacher_licence": licence_of(teacher.folder),
            },
            on_tensor=advance,
            together=together,
        )


def refuse_another_teacher(spec: SubnetSpec, teacher: Checkpoint, source: str) -> None:
    """Raise a UserError if a spec was found in another teacher, as far as it knows that.

    Its indices would name other units. A spec that was written by hand knows no teacher.
    """
    found_in = spec.origin.get("teacher_hash", teacher.hash)
    if found_in != teacher.hash:
        raise UserError(
            f"{source} was found in another teacher (hash {found_in}) than {teacher.folder} (hash "
            f"{teacher.hash}); give that teacher, or a file that holds nothing but a spec"
        )


def origin_of(spec: SubnetSpec, source: Calibration | None) -> dict[str, Any]:
    """What `subnet.json` says of a student's search, and of what it cost to find and calibrate it.

    Args:
        spec: with the origin that its search gave it, if there was one.
        source: what the student is cut out of; None for a plain slice of a model in memory.
    """
    init: Init = "slice" if source is None else source.init
    origin = {key: value for key, value in spec.origin.items() if key != "scored_as"}
    searched = spec.origin.get("init", "slice")
    if init != searched:  # the loss is another start's
        origin.pop("loss", None)
    flops = origin.get("calibration_flops", 0)
    if source and not init == searched == ROTATED:  # which the search has paid for
        flops += source.flops
    flops += start_flops(source, spec) if source else 0
    return {**origin, "calibration_flops": flops, "init": init}


def extract_student(
    source: Calibration,
    spec: SubnetSpec,
    out_folder: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    on_tensor: Callable[[], None] = lambda: None,
    together: bool = False,
) -> Path:
    """Cut a sub-network out of a checkpoint and write it as an ordinary Hugging Face folder.

    Where the family's stock code cannot express the shape, the folder carries `modeling.py`. One
    teacher tensor is in memory at a time; the folder appears whole or not at all.

    Args:
        source: what it is cut out of, and how it is refitted.
        spec: what to keep.
        out_folder: where the student goes; must not exist yet.
        provenance: more entries for `subnet.json`, such as the bin and the score.
        on_tensor: called for each teacher tensor, for progress.
        together: all processes call it at once and share a refit; the main one writes.

    Raises:
        UserError: the teacher cannot be read, the spec does not fit it, or the folder exists.
    """
    # With others, only the main process looks at the disk; all end with what it raises.
    decide: Callable[[Callable[[], None]], None] = from_main if together else _here
    decide(lambda: refuse_taken(out_folder))
    teacher = source.teacher
    student = teacher.architecture.student(spec)
    tensors = student_tensors(source, spec, on_tensor, together)
    if not student.is_layerwise:
        student.config.architectures = teacher.architecture.config.architectures
    (student.config.dtype, _), *others = precisions(tensors.values()).items()
    origin = {
        "teacher": str(teacher.folder),
        "teacher_licence": licence_of(teacher.folder),
        **(provenance or {}),
    }
    if others:
        origin["other_precisions"] = {str(dtype)[6:]: count for dtype, count in others}
    if "teacher_hash" not in origin:
        origin["teacher_hash"] = teacher.hash
    description = {
        "headstart": headstart.__version__,
        "torch": str(torch.__version__),
        **origin,
        "spec": spec.to_json(),
    }

    def write() -> None:
        with finished_folder(out_folder) as folder:
            write_checkpoint(folder, tensors, student.config)
            copy_files(teacher.folder, folder)
            write_json(folder / "subnet.json", description)
            write_card(folder)

    decide(write)
    return out_folder


def _here(act: Callable[[], None]) -> None:
    act()
