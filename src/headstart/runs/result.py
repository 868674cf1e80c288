"""The content of `result.json`: what the arms of a run have shown."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headstart
from headstart.demo import DEMO, TEACHER, teacher_name
from headstart.evaluation.scores import bits_per_byte
from headstart.model.spec import SEARCH_COSTS, load_spec
from headstart.recipe import Recipe, recipe_to_dict
from headstart.reports.table import FORMAT, SCRATCH
from headstart.system.files import read_json
from headstart.training.arms import ArmInputs
from headstart.training.settings import Arm

VARIANT_KEYS = (
    "learning_rate", "folder", "sweep", "seeds", "loss_spread", "best", "tokens_per_step",
)  # fmt: skip
"""What an arm's entry takes over from its training."""
COSTS_UPFRONT = ("calibration_flops", "search_flops")
Curve = Sequence[Mapping[str, float]]
"""Evaluations by ascending tokens; each with "tokens", "flops" and "loss"."""
SEARCH_KEYS = (
    "init", "space", "order", "layer_order", "fitness", "measure", "bin", "spec", "candidates",
    "winner", "front",
)  # fmt: skip
"""What `result.json` takes over from `search.json`."""


def result_of(
    recipe: Recipe,
    folder: Path,
    inputs: ArmInputs,
    teacher_loss: float,
    baselines: list[dict[str, Any]],
    trained: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of `result.json`; docs/result.md documents it.

    Args:
        recipe: what was asked.
        folder: the run folder, with `search.json` if there was a search.
        inputs: student, teacher and text of the arms.
        teacher_loss: on the validation split, in nats per token.
        baselines: name, parameters, bits per byte and loss of each, in nats per teacher's token.
        trained: what `run_variants` returned for each arm.
    """
    teacher, student = inputs.teacher.architecture, inputs.student.architecture
    bytes_per_token = inputs.blocks.bytes_per_token("validation")
    block_length = recipe.data.block_length
    teacher_count, student_count = teacher.count(block_length), student.count(block_length)
    subnet_file = inputs.student.folder / "subnet.json"
    origin = json.loads(subnet_file.read_text())
    outcome = read_json(folder / "search.json")
    costs = {key: origin.get(key, 0) for key in SEARCH_COSTS}
    arms = []
    for arm, run_result in zip(recipe.pretrain.arms, trained, strict=True):
        curve, ledger = charged(arm, run_result, inputs, costs)
        for point in curve:
            point["bits_per_byte"] = bits_per_byte(point["loss"], bytes_per_token)
        arms.append(
            {
                **asdict(arm),
                **{key: run_result[key] for key in VARIANT_KEYS},
                "flops": ledger,
                "parameters": student_count.parameters,
                "tokens": run_result["tokens"],
                "seconds": run_result["seconds"],
                "loss_before": curve[0]["loss"],
                "loss_final": curve[-1]["loss"],
                "bits_per_byte_final": curve[-1]["bits_per_byte"],
                "curve": curve,
            }
        )
    scratch = next((entry for entry in arms if entry["name"] == SCRATCH), None)
    target = scratch and scratch["loss_final"]
    for entry in arms:
        entry |= match_of(entry["curve"], scratch["curve"] if scratch else None)
        for seed in entry["seeds"]:
            points = seed.pop("curve")
            seed["loss_final"] = points[-1]["loss"]
            seed["tokens_to_match"] = target and matched_tokens(points, target)
        entry["baseline_tokens"] = [
            matched_tokens(entry["curve"], baseline["loss"]) for baseline in baselines
        ]
    return {
        "format": FORMAT,
        "name": folder.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["headstart", *sys.argv[1:]]),
        "teacher": {
            "name": teacher_name(recipe.teacher),
            "note": TEACHER.source if recipe.teacher == DEMO else "",
            "parameters": teacher_count.parameters,
            "non_embedding_parameters": teacher_count.non_embedding_parameters,
            "loss": teacher_loss,
            "bits_per_byte": bits_per_byte(teacher_loss, bytes_per_token),
            "sizes": teacher.sizes,
        },
        "student": {
            "parameters": student_count.parameters,
            "non_embedding_parameters": student_count.non_embedding_parameters,
            "training_flops_per_token": student_count.training_flops_per_token,
            "sizes": student.sizes,
            "kept_layers": list(load_spec(subnet_file).layers),
            "bin": origin.get("bin", [student_count.parameters] * 2),
        },
        "budget": {
            "tokens": trained[0]["tokens"],
            "tokens_per_step": trained[0]["tokens_per_step"],
            "block_length": block_length,
            "validation_tokens": trained[0]["validation_tokens"],
            "bytes_per_token": bytes_per_token,
        },
        "costs": {
            **costs,
            "teacher_flops_per_token": teacher_count.inference_flops_per_token,
        },
        "baselines": baselines,
        "target_loss": target,
        "target_bits_per_byte": scratch and scratch["bits_per_byte_final"],
        "arms": arms,
        "search": outcome and {key: outcome[key] for key in SEARCH_KEYS},
        "recipe": recipe_to_dict(recipe),
        "environment": _environment(),
    }


def charged(
    arm: Arm, trained: Mapping[str, Any], inputs: ArmInputs, costs: Mapping[str, float]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What an arm paid, in FLOPs.

    Args:
        arm: its settings.
        trained: what `run_variants` returned.
        inputs: student, teacher and text.
        costs: "calibration_flops" and "search_flops", which every start but a random one pays.

    Returns:
        The curve, each point with all FLOPs until then, evaluations left out; and the ledger of the
        whole arm, evaluations included.
    """
    block_length = inputs.blocks.split("train").shape[1]
    student = inputs.student.architecture.count(block_length)
    teacher = inputs.teacher.architecture.count(block_length)
    is_cut = arm.init == "subnet"
    calibration, search = (costs[key] if is_cut else 0 for key in COSTS_UPFRONT)
    curve, teacher_tokens = [], 0
    for point in trained["curve"]:
        training = point["tokens"] * student.training_flops_per_token
        if arm.kd:
            teacher_tokens = int(arm.kd.teacher_tokens(point["tokens"]))
            if arm.kd.cache:  # which is asked once for each token, however often it is read
                teacher_tokens = min(teacher_tokens, inputs.blocks.split("train").size)
        asking = teacher_tokens * teacher.inference_flops_per_token
        curve.append({**point, "flops": calibration + search + training + asking})
    evaluated_tokens = len(curve) * trained["validation_tokens"]
    ledger = {
        "calibration": calibration,
        "search": search,
        "training": trained["tokens"] * student.training_flops_per_token,
        "teacher": teacher_tokens * teacher.inference_flops_per_token,
        "evaluation": evaluated_tokens * student.inference_flops_per_token,
    }
    return curve, ledger


def match_of(curve: Curve, scratch: Curve | None) -> dict[str, float | None]:
    """When an arm's curve reaches the scratch arm's final loss, in tokens and in FLOPs.

    Args:
        curve: the arm's evaluations: tokens, FLOPs and loss, from before training on.
        scratch: the same of the scratch arm, or None without one.

    Returns:
        tokens_to_match, tokens_factor, flops_to_match, flops_factor (None where never, or where a
        factor would divide by zero), loss_difference at equal tokens, and tokens_to_match as
        interpolated between any two evaluations, the one before training included.
    """
    names = (
        "tokens_to_match", "tokens_to_match_interpolated", "tokens_factor", "flops_to_match",
        "flops_factor", "loss_difference",
    )  # fmt: skip
    match: dict[str, float | None] = dict.fromkeys(names)
    if scratch is None:
        return match
    target = scratch[-1]["loss"]
    match["loss_difference"] = curve[-1]["loss"] - target
    tokens = matched_tokens(curve, target)
    if tokens is None:
        return match
    all_tokens, all_flops, losses = (
        [point[key] for point in curve] for key in ("tokens", "flops", "loss")
    )
    match["tokens_to_match_interpolated"] = tokens_to_match(all_tokens, losses, target)
    flops = float(np.interp(tokens, all_tokens, all_flops))
    for unit, spent in (("tokens", tokens), ("flops", flops)):
        match[f"{unit}_to_match"] = spent
        match[f"{unit}_factor"] = scratch[-1][unit] / spent if spent else None
    return match


def matched_tokens(curve: Curve, target: float) -> float | None:
    """When a curve reaches a loss: 0 if before training, and None if never.

    Until the first evaluation, which is after a step at least, nothing is known: all tokens until
    then are counted, so that no start is said to be worth more than was seen.
    """
    tokens, losses = ([point[key] for point in curve] for key in ("tokens", "loss"))
    found = tokens_to_match(tokens, losses, target)
    return max(found, tokens[1]) if found else found


def _environment() -> dict[str, str]:
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "headstart": headstart.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": f"{device} ({torch.get_num_threads()} threads)",
    }


def tokens_to_match(
    tokens: Sequence[float], losses: Sequence[float], target: float
) -> float | None:
    """The first token count at which a loss curve is at or below a target, or None.

    `losses` are those of evaluations at ascending counts of `tokens`; between them the curve is a
    straight line.

    >>> tokens_to_match([0, 100, 200], [9.0, 7.0, 5.0], 6.0)
    150.0
    >>> tokens_to_match([0, 100], [9.0, 7.0], 6.0) is None
    True
    """
    if losses[0] <= target:
        return float(tokens[0])
    points = zip(tokens, losses, strict=True)
    for (start, before), (end, after) in pairwise(points):
        if after <= target:
            return start + (end - start) * (before - target) / (before - after)
    return None
