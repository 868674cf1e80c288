"""The stages in order: prepare, search, extract, pretrain, report. Each goes on where it stopped.

A run folder holds:

    recipe.yaml               what the run is; another recipe is refused
    inputs.json               hashes of text and teacher, which may not change
    importance.safetensors    unit scores from the calibration pass
    search.jsonl, search.json the journal of the search, and its outcome
    student/                  the extracted sub-network
    teacher.json              the teacher's own loss
    arms/NAME/                checkpoints and TensorBoard logs; then model/ and arm.json
    result.json, report.html  the answer
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

import headstart
from headstart.assets import TEACHER, demo_corpus, demo_teacher
from headstart.data import DataSettings, TokenBlocks, check_source, prepare
from headstart.evaluate import mean_loss, tokens_to_match
from headstart.files import write_json, write_whole
from headstart.pretrain.arms import (
    ArmInputs,
    check_step,
    run_arm,
    tokens_per_step,
    training_arguments,
)
from headstart.pretrain.teacher import load_frozen
from headstart.progress import progress
from headstart.recipe import Recipe, recipe_to_dict
from headstart.report import FORMAT, SCRATCH, headline, load_result, result_table, write_html
from headstart.search.search import load_spec, search, space_of
from headstart.subnet.count import count
from headstart.subnet.extract import (
    checkpoint_files,
    extract,
    hash_checkpoint,
    resolve_teacher,
)
from headstart.subnet.rules import match_tensor, read_config, sizes_of
from headstart.subnet.spec import student_config

SEARCH_COSTS = ("calibration_flops", "search_flops", "search_tokens", "search_seconds")
DEMO = "demo"
"""As a recipe's teacher or data source: the pinned download of `headstart demo`."""


def teacher_folder(recipe: Recipe) -> Path:
    """The local folder of a recipe's teacher, downloaded if need be.

    Raises:
        ValueError: it does not exist, has no safetensors, or has a tensor that no rule knows.
    """
    folder = demo_teacher() if recipe.teacher == DEMO else resolve_teacher(recipe.teacher)
    config = read_config(folder)
    for name in checkpoint_files(folder):
        match_tensor(name, config)
    return folder


def data_settings(settings: DataSettings) -> DataSettings:
    """A recipe's data settings with the demo corpus as a file."""
    return replace(settings, source=str(demo_corpus())) if settings.source == DEMO else settings


def check(recipe: Recipe, student: str = "") -> None:
    """Find a user's mistakes before any weights are loaded.

    Args:
        recipe: what is asked.
        student: folder of an extracted student, or empty where a search will find one.

    Raises:
        ValueError: the first mistake found, with its mend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this version runs as one process; start headstart without torchrun")
    for arm in recipe.pretrain.arms:
        training_arguments(recipe.train, arm, Path(recipe.output))
    if recipe.data.source != DEMO:
        check_source(recipe.data)
    config = read_config(teacher_folder(recipe))
    if not student:
        space_of(config, recipe.search)
        return
    if not (Path(student) / "subnet.json").is_file():
        raise ValueError(
            f"{student} holds no extracted student; give --student a folder that has one"
        )
    student_rows, teacher_rows = read_config(Path(student)).vocab_size, config.vocab_size
    if student_rows != teacher_rows and any(arm.kd for arm in recipe.pretrain.arms):
        raise ValueError(
            f"the teacher has {teacher_rows} vocabulary rows and the student {student_rows}; use "
            "the teacher that the student was cut from, or arms without kd"
        )


def open_run(recipe: Recipe) -> Path:
    """Create the run folder, or find that it holds this very run.

    Raises:
        ValueError: the folder holds another run, or something that is no run.
    """
    folder = Path(recipe.output)
    ours = recipe_to_dict(recipe)
    kept = folder / "recipe.yaml"
    if kept.is_file():
        theirs = yaml.safe_load(kept.read_text())
        for key, (here, there) in _differences(ours, theirs).items():
            raise ValueError(
                f"{folder} holds a run of another recipe ({key} is {there!r} there and {here!r} "
                "here); choose another --output or delete the folder"
            )
    elif folder.exists() and {path.name for path in folder.iterdir()} - {"recipe.yaml.unfinished"}:
        raise ValueError(
            f"{folder} is not empty and holds no headstart run; choose another --output"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, yaml.safe_dump(ours, sort_keys=False))
    return folder


def _differences(ours: Any, theirs: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**ours, **theirs}:
            inner = f"{key}.{name}" if key else name
            found |= _differences(ours.get(name), theirs.get(name), inner)
        return found
    return {} if ours == theirs else {key: (ours, theirs)}


def run_search(recipe: Recipe) -> dict[str, Any]:
    """Prepare the text and search; the outcome is in `search.json`."""
    folder, teacher, blocks = _prepared(recipe, recipe.student)
    return search(teacher, blocks, recipe.search, folder)


def run_pretrain(recipe: Recipe) -> dict[str, Any]:
    """Train every arm and write `result.json` and `report.html`.

    The student is the recipe's own folder, or the one that a search in this run folder found.
    """
    student = Path(recipe.student or Path(recipe.output) / "student")
    folder, teacher, blocks = _prepared(recipe, str(student))
    inputs = ArmInputs(student, teacher, blocks, recipe.pretrain, recipe.train)
    trained = [run_arm(arm, inputs, folder / "arms" / arm.name) for arm in recipe.pretrain.arms]
    result = _result(recipe, folder, inputs, trained)
    write_json(folder / "result.json", result)
    return run_report(folder)


def run(recipe: Recipe) -> dict[str, Any]:
    """All stages: search, extract, pretrain, report."""
    if not recipe.student:
        run_search(recipe)
        folder = Path(recipe.output)
        if not (folder / "student").exists():
            provenance = {"teacher_name": recipe.teacher, "recipe": recipe_to_dict(recipe)}
            run_extract(recipe.teacher, folder / "search.json", folder / "student", provenance)
    return run_pretrain(recipe)


def run_extract(
    teacher: str | Path, spec: Path, out_folder: Path, provenance: dict[str, Any] | None = None
) -> Path:
    """Cut the sub-network that a spec file describes out of a teacher.

    What the spec file says of its search, the costs above all, goes into `subnet.json`.
    """
    folder = demo_teacher() if teacher == DEMO else resolve_teacher(teacher)
    kept = load_spec(spec)
    student_config(read_config(folder), kept)  # refuses what cannot be cut
    found = json.loads(spec.read_text())
    origin = {
        key: found[key] for key in (*SEARCH_COSTS, "loss", "parameters", "bin") if key in found
    }
    provenance = {**origin, **(provenance or {})}
    with progress("extract", len(checkpoint_files(folder)), "tensors") as advance:
        return extract(folder, kept, out_folder, provenance, lambda name: advance())


def run_evaluate(model: str, settings: DataSettings, num_tokens: int) -> dict[str, Any]:
    """Loss of a model on the validation split of a corpus, tokenised with its own tokenizer.

    Returns:
        "loss" in nats per token, "perplexity", "bits_per_byte" and "tokens".
    """
    from headstart.evaluate import bits_per_byte

    if settings.source != DEMO:
        check_source(settings)
    folder = demo_teacher() if model == DEMO else resolve_teacher(model)
    read_config(folder)  # refuses a family whose logits might be more than a product
    blocks = prepare(data_settings(settings), folder)
    loss, tokens = _validation_loss(folder, blocks, num_tokens)
    split = blocks.manifest["splits"]["validation"]
    return {
        "loss": loss,
        "perplexity": float(torch.tensor(loss).exp()),
        "bits_per_byte": bits_per_byte(loss, split["tokens"], split["text_bytes"]),
        "tokens": tokens,
    }


def run_report(folder: Path) -> dict[str, Any]:
    """Print the result table of a run folder and write its `report.html`."""
    result = load_result(folder)
    write_html(result, folder / "report.html")
    output = Console()
    output.print(result_table(result))
    output.print(headline(result))
    output.print(f"report: {folder / 'report.html'}")
    return result


def _prepared(recipe: Recipe, student: str) -> tuple[Path, Path, TokenBlocks]:
    """The run folder, the teacher's folder and the tokens, all checked and the same as before.

    Raises:
        ValueError: a mistake in the recipe, or text or teacher have changed since the run began.
    """
    check(recipe, student)
    folder, teacher = open_run(recipe), teacher_folder(recipe)
    blocks = prepare(data_settings(recipe.data), teacher)
    arguments = training_arguments(recipe.train, recipe.pretrain.arms[0], folder)
    check_step(tokens_per_step(arguments, recipe.data.block_length), blocks)
    inputs = {"data": blocks.manifest["fingerprint"], "teacher": hash_checkpoint(teacher)}
    if recipe.student:
        inputs["student"] = hash_checkpoint(Path(recipe.student))
    kept = folder / "inputs.json"
    if kept.is_file():
        for name, before in json.loads(kept.read_text()).items():
            if inputs[name] != before:
                raise ValueError(
                    f"the {name} has changed since {folder} was begun; restore it or choose "
                    "another --output"
                )
    write_json(kept, inputs)
    return folder, teacher, blocks


def _validation_loss(model: Path, blocks: TokenBlocks, num_tokens: int) -> tuple[float, int]:
    array = blocks.split("validation")
    tokens = torch.from_numpy(array[: -(-num_tokens // array.shape[1])].astype("int64"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress("evaluate", tokens.numel(), "tokens") as advance:
        return mean_loss(load_frozen(model, device), tokens, 8, advance), tokens.numel()


def _result(
    recipe: Recipe, folder: Path, inputs: ArmInputs, trained: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `result.json`; docs/result.md documents it."""
    configs = read_config(inputs.teacher), read_config(inputs.student)
    block_length = recipe.data.block_length
    teacher_count, student_count = (count(config, block_length) for config in configs)
    teacher_sizes, student_sizes = (sizes_of(config) for config in configs)
    origin = json.loads((inputs.student / "subnet.json").read_text())
    kept = folder / "teacher.json"
    if not kept.is_file():
        loss, _ = _validation_loss(inputs.teacher, inputs.blocks, recipe.pretrain.validation_tokens)
        write_json(kept, {"loss": loss})
    found = folder / "search.json"
    outcome = json.loads(found.read_text()) if found.is_file() else None
    costs = {key: origin.get(key, 0) for key in SEARCH_COSTS}
    upfront_flops = costs["calibration_flops"] + costs["search_flops"]
    arms = []
    for arm, run_result in zip(recipe.pretrain.arms, trained, strict=True):
        flops_per_token = student_count.training_flops_per_token
        if arm.kd:
            flops_per_token += teacher_count.inference_flops_per_token
        start = upfront_flops if arm.init == "subnet" else 0
        curve = [
            {**point, "flops": start + point["tokens"] * flops_per_token}
            for point in run_result["curve"]
        ]
        arms.append(
            {
                **asdict(arm),
                "parameters": student_count.parameters,
                "tokens": run_result["tokens"],
                "seconds": run_result["seconds"],
                "loss_before": curve[0]["loss"],
                "loss_final": curve[-1]["loss"],
                "curve": curve,
            }
        )
    scratch = next((entry for entry in arms if entry["name"] == SCRATCH), None)
    for entry in arms:
        entry |= match_of(entry["curve"], scratch["curve"] if scratch else None)
    return {
        "format": FORMAT,
        "name": folder.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["headstart", *sys.argv[1:]]),
        "teacher": {
            "name": TEACHER.name if recipe.teacher == DEMO else recipe.teacher,
            "note": TEACHER.source if recipe.teacher == DEMO else "",
            "parameters": teacher_count.parameters,
            "non_embedding_parameters": teacher_count.non_embedding_parameters,
            "loss": json.loads(kept.read_text())["loss"],
            "sizes": teacher_sizes,
        },
        "student": {
            "parameters": student_count.parameters,
            "non_embedding_parameters": student_count.non_embedding_parameters,
            "training_flops_per_token": student_count.training_flops_per_token,
            "sizes": student_sizes,
            "kept_layers": list(load_spec(inputs.student / "subnet.json").layers),
            "bin": origin.get("bin", [student_count.parameters] * 2),
        },
        "budget": {
            "tokens": trained[0]["tokens"],
            "tokens_per_step": trained[0]["tokens_per_step"],
            "block_length": block_length,
            "validation_tokens": trained[0]["validation_tokens"],
        },
        "costs": {
            **costs,
            "teacher_flops_per_token": teacher_count.inference_flops_per_token,
        },
        "target_loss": scratch["loss_final"] if scratch else None,
        "arms": arms,
        "search": outcome
        and {key: outcome[key] for key in ("space", "order", "candidates", "winner")},
        "recipe": recipe_to_dict(recipe),
        "environment": _environment(),
    }


def match_of(
    curve: list[dict[str, float]], scratch: list[dict[str, float]] | None
) -> dict[str, float | None]:
    """When an arm's curve reaches the scratch arm's final loss, in tokens and in FLOPs.

    Args:
        curve: the arm's evaluations: tokens, FLOPs and loss, from before training on.
        scratch: the same of the scratch arm, or None without one.

    Returns:
        tokens_to_match, tokens_factor, flops_to_match, flops_factor (None where never, or where a
        factor would divide by zero) and loss_difference at equal tokens.
    """
    names = ("tokens_to_match", "tokens_factor", "flops_to_match", "flops_factor")
    match: dict[str, float | None] = dict.fromkeys((*names, "loss_difference"))
    if scratch is None:
        return match
    target = scratch[-1]["loss"]
    match["loss_difference"] = curve[-1]["loss"] - target
    losses = [point["loss"] for point in curve]
    for unit in ("tokens", "flops"):
        spent = tokens_to_match([point[unit] for point in curve], losses, target)
        match[f"{unit}_to_match"] = spent
        match[f"{unit}_factor"] = scratch[-1][unit] / spent if spent else None
    return match


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
