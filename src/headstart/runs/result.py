"""The content of `result.json`: what the arms of a run have shown."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

import headstart
from headstart.demo import DEMO, TEACHER, teacher_name
from headstart.evaluation.scores import bits_per_byte
from headstart.model.spec import SEARCH_COSTS, load_spec
from headstart.recipe import Recipe, recipe_to_dict
from headstart.reports.table import FORMAT
from headstart.runs.comparison import compare, matched_tokens, points_of
from headstart.runs.forecast import look_ahead
from headstart.system.files import read_json
from headstart.text.settings import SplitName
from headstart.training.arms import ArmInputs
from headstart.training.settings import Arm

VARIANT_KEYS = (
    "learning_rate", "folder", "sweep", "seeds", "loss_spread", "best", "tokens_per_step", "tokens",
    "seconds", "budgets",
)  # fmt: skip
"""What an arm's entry takes over from its training."""
COSTS_UPFRONT = ("calibration_flops", "search_flops")
SEARCH_KEYS = (
    "init", "space", "order", "layer_order", "fitness", "measure", "bin", "spec", "candidates",
    "winner", "front",
)  # fmt: skip
"""What `result.json` takes over from `search.json`."""


class Compared(NamedTuple):
    """What the arms are compared with, each as {"name", "parameters", "tokens", "bits_per_byte",
    "loss", "losses"}, in nats per token of the teacher.

    Attributes:
        teacher: that was cut.
        baselines: other models.
        others: teachers that arms name themselves.
    """

    teacher: dict[str, Any]
    baselines: list[dict[str, Any]]
    others: list[dict[str, Any]]


def result_of(
    recipe: Recipe,
    folder: Path,
    inputs: ArmInputs,
    compared: Compared,
    trained: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The content of `result.json`; docs/result.md documents it.

    Args:
        recipe: what was asked.
        folder: the run folder, with `search.json` if there was a search.
        inputs: student, teacher and text of the arms.
        compared: losses of teachers and baselines.
        trained: what `run_variants` returned, by the name of each arm that is trained.
    """
    teacher, student = inputs.teacher.architecture, inputs.student.architecture
    teacher_loss, baselines = compared.teacher["loss"], compared.baselines
    block_length = recipe.data.block_length
    teacher_count, student_count = teacher.count(block_length), student.count(block_length)
    subnet_file = inputs.student.folder / "subnet.json"
    origin = json.loads(subnet_file.read_text())
    outcome = read_json(folder / "search.json")
    costs = {key: origin.get(key, 0) for key in SEARCH_COSTS}
    arms = [
        _arm_entry(arm, trained[arm.name], inputs, costs)
        for arm in recipe.pretrain.arms
        if arm.name in trained
    ]
    first = next(iter(trained.values()))
    compare(arms, recipe.pretrain.target)
    split: SplitName = "test" if len(recipe.pretrain.budget_tokens) > 1 else "validation"
    look_ahead(arms)
    target = arms[0]["matches"][-1]["target_loss"]
    for entry in arms:
        entry["baseline_tokens"] = [
            matched_tokens(points_of(entry), baseline["losses"][split]) for baseline in baselines
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
            "bits_per_byte": bits_per_byte(teacher_loss, inputs.blocks.bytes_per_token("test")),
            "sizes": teacher.sizes,
            "correction": inputs.teacher.correction,
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
            "tokens": first["tokens"],
            "tokens_per_step": first["tokens_per_step"],
            "block_length": block_length,
            "validation_tokens": first["validation_tokens"],
            "test_tokens": first["test_tokens"],
            "bytes_per_token": inputs.blocks.bytes_per_token("test"),
        },
        "costs": {
            **costs,
            "correction_flops": inputs.teacher.correction_flops,
            "teacher_flops_per_token": teacher_count.inference_flops_per_token,
        },
        "baselines": baselines,
        "other_teachers": [_other_teacher(other, inputs) for other in compared.others],
        "compared_on": split,
        "reference": arms[0]["reference"],
        "target_loss": target,
        "target_bits_per_byte": target
        and bits_per_byte(target, inputs.blocks.bytes_per_token(split)),
        "arms": arms,
        "search": outcome and {key: outcome[key] for key in SEARCH_KEYS},
        "recipe": recipe_to_dict(recipe),
        "environment": _environment(),
    }


def _other_teacher(losses: Mapping[str, Any], inputs: ArmInputs) -> dict[str, Any]:
    """What `result.json` says of a teacher that arms name themselves."""
    teacher = inputs.teachers[losses["name"]]
    count = teacher.checkpoint.architecture.count(inputs.blocks.split("train").shape[1])
    return {
        **{key: losses[key] for key in ("name", "parameters", "loss", "bits_per_byte")},
        "hash": teacher.checkpoint.hash,
        "flops_per_token": count.inference_flops_per_token,
        "shared_rows": teacher.shared_rows,
    }


def _arm_entry(
    arm: Arm, trained: Mapping[str, Any], inputs: ArmInputs, costs: Mapping[str, float]
) -> dict[str, Any]:
    """What `result.json` says of one arm by itself."""
    curve, budgets, ledger = charged(arm, trained, inputs, costs)
    of_splits: dict[SplitName, Any] = {"validation": curve, "test": budgets}
    for split, points in of_splits.items():
        bytes_per_token = inputs.blocks.bytes_per_token(split)
        for point in points:
            point["bits_per_byte"] = bits_per_byte(point["loss"], bytes_per_token)
    block_length = inputs.blocks.split("train").shape[1]
    architecture = inputs.architecture(arm)
    return {
        **asdict(arm),
        **{key: trained[key] for key in VARIANT_KEYS},
        "flops": ledger,
        "parameters": architecture.count(block_length).parameters,
        "sizes": architecture.sizes,
        "loss_before": trained["before"]["loss"],
        "loss_final": budgets[-1]["loss"],
        "standard_error": budgets[-1]["standard_error"],
        "bits_per_byte_final": budgets[-1]["bits_per_byte"],
        "curve": curve,
        "budgets": budgets,
    }


def correction_flops(arm: Arm, inputs: ArmInputs) -> int:
    """Of tuning the models that an arm's weights were cut out of and that it learns from, each
    once."""
    paid = dict[str, int]()
    if arm.init == "subnet":
        origin = read_json(inputs.student.folder / "subnet.json") or {}
        paid[origin.get("teacher_hash", "")] = origin.get("correction_flops", 0)
    if arm.kd:
        teacher = inputs.teacher_of(arm).checkpoint
        paid[teacher.hash] = teacher.correction_flops
    return sum(paid.values())


def charged(
    arm: Arm, trained: Mapping[str, Any], inputs: ArmInputs, costs: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """What an arm paid, in FLOPs.

    Args:
        arm: its settings.
        trained: what `run_variants` returned.
        inputs: student, teacher and text.
        costs: "calibration_flops" and "search_flops", which every start but a random one pays.

    Returns:
        The curve and the budgets, each point with all FLOPs until then, evaluations left out, as a
        run of that budget alone would pay them; and the ledger of the largest budget, evaluations
        included.
    """
    block_length = inputs.blocks.split("train").shape[1]
    model = inputs.architecture(arm).count(block_length)
    teacher = inputs.teacher_of(arm).checkpoint.architecture.count(block_length)
    is_cut = arm.init == "subnet"
    calibration, search = (costs[key] if is_cut else 0 for key in COSTS_UPFRONT)
    correction = correction_flops(arm, inputs)
    upfront = correction + calibration + search

    def asking(tokens: int) -> float:
        if not arm.kd:
            return 0
        asked = int(arm.kd.teacher_tokens(tokens))
        if arm.kd.cache:  # which is asked once for each token, however often it is read
            asked = min(asked, inputs.blocks.split("train").size)
        return asked * teacher.inference_flops_per_token

    def spent(point: Mapping[str, Any]) -> dict[str, Any]:
        training = point["tokens"] * model.training_flops_per_token
        return {**point, "flops": upfront + training + asking(point["tokens"])}

    curve, budgets = ([*map(spent, trained[key])] for key in ("curve", "budgets"))
    evaluated = len(curve) * trained["validation_tokens"] + 2 * trained["test_tokens"]
    ledger = {
        "correction": correction,
        "calibration": calibration,
        "search": search,
        "training": trained["tokens"] * model.training_flops_per_token,
        "teacher": asking(trained["tokens"]),
        "evaluation": evaluated * model.inference_flops_per_token,
    }
    return curve, budgets, ledger


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
