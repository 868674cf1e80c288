"""The stage that cuts a student out, by the way in which its spec was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from headstart.assets import DEMO, demo_teacher, teacher_name
from headstart.progress import progress
from headstart.result import SEARCH_COSTS
from headstart.search.run import is_measured, load_spec
from headstart.subnet.calibrate import ROTATED, Calibration, Init, calibrate, cut_config
from headstart.subnet.card import licence_of
from headstart.subnet.extract import checkpoint_files, extract, hash_checkpoint, resolve_teacher
from headstart.subnet.propagate import propagation_flops
from headstart.subnet.rules import read_config, sizes_of
from headstart.subnet.spec import student_config


def model_folder(model: str | Path) -> Path:
    """The local folder of a model that a user names: a folder, a hub id or "demo".

    Raises:
        ValueError: as `resolve_teacher`.
    """
    return demo_teacher() if model == DEMO else resolve_teacher(model)


def run_extract(
    teacher: str | Path,
    spec: Path,
    out_folder: Path,
    provenance: dict[str, Any] | None = None,
    init: Init | None = None,
    calibration: Int[Tensor, "blocks tokens"] | None = None,
) -> Path:
    """Cut the sub-network that a spec file describes out of a teacher.

    What the spec file says of its search, the costs above all, goes into `subnet.json`.

    Args:
        teacher: a folder, a hub id or "demo".
        spec: file of a spec.
        out_folder: must not exist yet.
        provenance: more entries for `subnet.json`.
        init: by default that of the search which the spec is from.
        calibration: token ids, for every `init` but "slice".

    Raises:
        ValueError: the teacher or spec cannot be read, they do not fit, or there is no text to
            calibrate with.
    """
    folder = model_folder(teacher)
    kept = load_spec(spec)
    found = json.loads(spec.read_text())
    searched = found.get("init", "slice")
    init = init or searched
    if "init" in found and (init == ROTATED) != (searched == ROTATED):
        raise ValueError(
            f"{spec} counts channels of a teacher that is {'' if searched == ROTATED else 'not '}"
            f"rotated, and --init {init} is for {'' if init == ROTATED else 'un'}rotated ones; "
            f"use --init {searched}"
        )
    student_config(cut_config(read_config(folder), init), kept)  # refuses what cannot be cut
    if init != "slice" and calibration is None:
        raise ValueError(f"init {init} needs text to calibrate with; give --data, or --init slice")
    teacher_hash = hash_checkpoint(folder)
    source = Calibration(folder)
    if calibration is not None:
        source = calibrate(folder, init, calibration, teacher_hash, kept)
    origin = {
        key: found[key] for key in (*SEARCH_COSTS, "loss", "parameters", "bin") if key in found
    }
    if init != searched:  # the loss is another start's
        origin.pop("loss", None)
    flops = origin.get("calibration_flops", 0)
    if init != searched or not is_measured(init, found.get("scored_as")):
        flops += source.flops
    if source.blocks is not None:
        config = read_config(source.teacher)
        flops += propagation_flops(config, kept.sizes(sizes_of(config)), *source.blocks.shape)
    provenance = {
        "teacher_name": teacher_name(teacher),
        "teacher_licence": licence_of(folder),
        **origin,
        **(provenance or {}),
        "calibration_flops": flops,
        "teacher": str(folder),
        "teacher_hash": teacher_hash,
        "init": init,
    }
    with progress("extract", len(checkpoint_files(source.teacher)), "tensors") as advance:
        parts = (source.teacher, kept, out_folder, provenance)
        return extract(*parts, lambda name: advance(), source.statistics, source.blocks)
