"""One arm: a training run that goes on where it stopped, alike others in all but what it names."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.system.device import peak_flops
from headstart.system.distributed import from_main, is_main
from headstart.system.errors import UserError
from headstart.system.files import UNFINISHED, read_json, write_json
from headstart.system.progress import progress
from headstart.text.blocks import BlockDataset, TokenBlocks
from headstart.training.arguments import (
    check_step,
    optimizer_of,
    save_minutes,
    tokens_per_step,
    training_arguments,
)
from headstart.training.budgets import Budget, KeepBranches, begin_branch
from headstart.training.cache import CachedBlocks, CacheIdentity, TeacherCache
from headstart.training.checkpointing import choose_checkpointing
from headstart.training.order import arm_budgets, asked_reads, order_seed, training_order
from headstart.training.settings import STUDENT, Arm, PretrainSettings
from headstart.training.teacher import DistillationTeacher, Teacher, load_teacher

if TYPE_CHECKING:
    from headstart.training.trainer import DistillationTrainer


@dataclass(frozen=True)
class ArmInputs:
    """What an arm needs besides its own settings.

    Attributes:
        student: the extracted sub-network.
        teacher: that was cut, and that arms distil from which name no other.
        blocks: training, validation and test tokens.
        settings: shared by all arms.
        train: the recipe's `train:` block.
        shapes: architectures of arms with a shape of their own, by its name.
        teachers: others to distil from, by their names in `kd.teacher`.
    """

    student: Checkpoint
    teacher: Checkpoint
    blocks: TokenBlocks
    settings: PretrainSettings
    train: dict[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Architecture] = field(default_factory=dict)
    teachers: Mapping[str, DistillationTeacher] = field(default_factory=dict)

    def teacher_of(self, arm: Arm) -> DistillationTeacher:
        """The one that an arm distils from, if it does."""
        if arm.kd is None or not arm.kd.teacher:
            return DistillationTeacher(self.teacher)
        return self.teachers[arm.kd.teacher]

    def architecture(self, arm: Arm) -> Architecture:
        """Of the model that an arm trains."""
        return self.student.architecture if arm.shape == STUDENT else self.shapes[arm.shape]


@dataclass(frozen=True)
class Schedule:
    """How long a training goes on, and from where.

    An optimizer step sees `step_tokens` over all processes, and `steps_done` are those until the
    newest whole checkpoint, if there is one. `branches` are the shorter budgets that go on from
    this one, each with its folder.
    """

    arguments: Any
    step_tokens: int
    num_steps: int
    checkpoint: Path | None
    steps_done: int
    branches: Mapping[Path, Budget]


def run_arm(arm: Arm, inputs: ArmInputs, folder: Path) -> dict[str, Any]:
    """Train one arm, or go on from its last checkpoint, or read its result if it is done.

    With several budgets, the largest is trained first, and the others branch off it.

    Under torchrun it works inside `headstart.system.distributed.process_group`.

    Args:
        folder: of this arm; holds checkpoints, TensorBoard logs, then `model/` and `arm.json`;
            smaller budgets have a folder `budget-TOKENS` in it.

    Returns:
        The content of `arm.json`: tokens, tokens_per_step, validation_tokens, test_tokens (those
        used), seconds, the curve on the validation split, a list of {"tokens", "loss"}, from before
        training to the end, and its best point, whose weights are in `best-STEP/` unless it is the
        last; `before`, the loss on the test split before training; and `budgets`, ascending, the
        tokens and both losses at the end of each.

    Raises:
        UserError: the run was begun with another number of processes; the arm distils from a
            teacher of another vocabulary or from a cache of another teacher; there is
            less text than one step takes; or the budgets do not fit, see `budgets_of`.
    """
    file = folder / "arm.json"
    split = inputs.blocks.split("train")
    budgets = arm_budgets(arm, inputs.settings, inputs.train, split.shape[1])
    folders = [folder / f"budget-{tokens}" for tokens in inputs.settings.budget_tokens[:-1]]
    branches = dict(zip(folders, budgets[:-1], strict=True))
    result: dict[str, Any] | None = from_main(lambda: read_json(file))
    # The largest comes first, and the others after it, so that a count says which are done.
    for number, (place, budget) in enumerate(reversed([*branches.items(), (folder, budgets[-1])])):
        if result is not None and number < len(result["budgets"]):
            continue
        found, reached = _run_budget(arm, inputs, place, budget, {} if result else branches)
        result = result or {**found, "budgets": []}
        result["budgets"].insert(0, reached)
        if is_main():
            write_json(file, result)
            for checkpoint in place.glob("checkpoint-*") if number else ():
                shutil.rmtree(checkpoint)
    assert result is not None
    return result


def _run_budget(
    arm: Arm, inputs: ArmInputs, folder: Path, budget: Budget, branches: Mapping[Path, Budget]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train to one budget; what `run_arm` returns but `budgets`, and this one's entry there."""
    blocks, settings = inputs.blocks, inputs.settings
    schedule = _schedule(arm, inputs, folder, budget, branches)
    trainer = _trained(arm, inputs, schedule)
    trainer.save_model(str(folder / "model"))
    history = trainer.state.log_history
    tested = {entry["step"]: entry for entry in history if "test_loss" in entry}
    before, after = (
        {"loss": tested[step]["test_loss"], "standard_error": tested[step]["test_standard_error"]}
        for step in (0, budget.num_steps)
    )
    curve = _curve(history, schedule.step_tokens)
    if is_main():
        _keep_best(folder, curve["best"]["tokens"] // schedule.step_tokens, budget.num_steps)
    result = {
        "tokens": budget.num_steps * schedule.step_tokens,
        "tokens_per_step": schedule.step_tokens,
        "validation_tokens": blocks.spread("validation", settings.validation_tokens).size,
        "test_tokens": blocks.spread("test", settings.test_tokens).size,
        "seconds": trainer.seconds,
        **curve,
        "before": before,
    }
    reached = {key: result[key] for key in ("tokens", "seconds")}
    return result, {**reached, "validation_loss": curve["curve"][-1]["loss"], **after}


def _schedule(
    arm: Arm, inputs: ArmInputs, folder: Path, budget: Budget, branches: Mapping[Path, Budget]
) -> Schedule:
    """Plan a training's steps, and find the checkpoint that it goes on from."""
    from headstart.training.trainer import (
        evaluation_steps,
        is_evaluated,
        last_whole_checkpoint,
    )

    num_steps = budget.num_steps
    arguments = training_arguments(inputs.train, arm, folder, num_steps, budget.schedule())
    step_tokens = tokens_per_step(arguments, inputs.blocks.split("train").shape[1])
    check_step(step_tokens, inputs.blocks)
    choose_checkpointing(
        arm,
        arguments,
        {**inputs.train, **arm.train},
        inputs.teacher_of(arm).checkpoint.architecture,
        inputs.architecture(arm),
        inputs.blocks.split("train").shape[1],
        inputs.blocks.separate_documents,
    )

    def newest() -> Path | None:
        checkpoint = last_whole_checkpoint(folder)
        if checkpoint is not None:
            before = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
            if before != num_steps:
                raise UserError(
                    f"{folder} was begun with {before} steps and would go on with {num_steps}: "
                    "start as many processes as before, or choose another --output"
                )
            for branch, of_branch in branches.items():  # one whose copy was cut short
                if checkpoint.name == f"checkpoint-{of_branch.branch_step}":
                    begin_branch(checkpoint, branch, of_branch)
        return checkpoint

    checkpoint = from_main(newest)
    steps_done = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    due = [0, *evaluation_steps(num_steps, inputs.settings.evaluations)]
    arguments.eval_on_start = steps_done in due and not from_main(
        lambda: is_evaluated(checkpoint, steps_done)
    )
    return Schedule(arguments, step_tokens, num_steps, checkpoint, steps_done, branches)


def _trained(arm: Arm, inputs: ArmInputs, schedule: Schedule) -> DistillationTrainer:
    """The trainer of an arm after its last step."""
    from transformers import AutoModelForCausalLM, TrainerState
    from transformers.data import default_data_collator

    from headstart.training.interruption import SaveAndStop
    from headstart.training.trainer import DistillationTrainer, evaluation_steps, seconds_until

    settings, arguments = inputs.settings, schedule.arguments
    if schedule.steps_done < schedule.num_steps:  # the Trainer loads a checkpoint into it
        model = _initial_model(arm, inputs, arguments.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(schedule.checkpoint, dtype=torch.float32)
    train_dataset = _train_dataset(arm, inputs, schedule)
    teacher = _teacher(arm, inputs, model, arguments)
    blocks, separator = inputs.blocks, inputs.blocks.separator
    validation_blocks = blocks.spread("validation", settings.validation_tokens)
    test_blocks = blocks.spread("test", settings.test_tokens)
    num_tokens = schedule.num_steps * schedule.step_tokens
    with progress(f"pretrain {arm.name}", num_tokens, "tokens") as advance:
        on_step = _step_reporter(advance, schedule.step_tokens)
        done = schedule.steps_done
        on_step(done, "resumed" if done else "evaluating before training")
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            data_collator=default_data_collator,
            train_dataset=train_dataset,
            eval_dataset=BlockDataset(validation_blocks, separator=separator),
            test_dataset=BlockDataset(test_blocks, separator=separator),
            teacher=teacher,
            distillation=arm.kd,
            shared_rows=inputs.teacher_of(arm).shared_rows,
            tokens_per_step=schedule.step_tokens,
            evaluation_steps=set(evaluation_steps(schedule.num_steps, settings.evaluations)),
            tokenizer_folder=inputs.teacher.folder,
            earlier_seconds=seconds_until(schedule.checkpoint),
            flops_per_token=_flops_per_token(arm, inputs),
            peak_flops=1e12 * settings.peak_tflops or peak_flops(arguments.device),
            optimizer_cls_and_kwargs=optimizer_of(arm, arguments),
            on_step=on_step,
        )
        checkpoint = schedule.checkpoint
        if checkpoint is not None and done == schedule.num_steps:
            # Killed after its last step; the Trainer would take one more.
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            stopper = SaveAndStop(save_minutes(inputs.train, arm))
            trainer.add_callback(stopper)
            trainer.add_callback(KeepBranches(schedule.branches))
            with stopper.watching():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def _step_reporter(advance: Callable[..., None], step_tokens: int) -> Callable[[int, str], None]:
    """A function of (steps done, note) that advances a progress bar of tokens."""
    reported = 0

    def on_step(step: int, note: str) -> None:
        nonlocal reported
        advance((step - reported) * step_tokens, note)
        reported = step

    return on_step


def _train_dataset(arm: Arm, inputs: ArmInputs, schedule: Schedule) -> Any:
    """The training blocks, with the teacher's outputs if the arm has a cache of them."""
    split = inputs.blocks.split("train")
    num_reads = schedule.num_steps * schedule.step_tokens // split.shape[1]
    order = training_order(len(split), num_reads, order_seed(schedule.arguments))
    dataset = BlockDataset(split, order, inputs.blocks.separator)
    if not (arm.kd and arm.kd.cache):
        return dataset
    schedule.arguments.remove_unused_columns = False
    teacher = inputs.teacher_of(arm)
    identity = CacheIdentity.of(
        arm.kd, teacher.checkpoint.hash, inputs.blocks.separator, teacher.shared_rows
    )
    asked = asked_reads(arm.kd, schedule.num_steps, schedule.step_tokens, split.shape[1])
    return CachedBlocks(dataset, TeacherCache(arm.kd.cache, identity), asked)


def _teacher(arm: Arm, inputs: ArmInputs, model: Any, arguments: Any) -> Teacher | None:
    """The teacher that an arm asks while it trains, if it does."""
    if arm.kd is None or arm.kd.cache:
        return None
    source = inputs.teacher_of(arm)
    teacher_rows = source.checkpoint.architecture.config.vocab_size
    if teacher_rows != model.config.vocab_size and not source.shared_rows:
        raise UserError(
            f"arm {arm.name} cannot distil: the teacher has {teacher_rows} vocabulary rows and the "
            f"student {model.config.vocab_size}; use the teacher that the student was cut from"
        )
    teacher = load_teacher(source.checkpoint.folder, arguments.device, arm.kd.shard_teacher)
    if arguments.torch_compile:
        teacher.compile(arguments.torch_compile_backend or "inductor", arguments.torch_compile_mode)
    return teacher


def _curve(history: list[dict[str, Any]], step_tokens: int) -> dict[str, Any]:
    """The best evaluation and all of them, in tokens."""
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    points = [{"tokens": step * step_tokens, "loss": losses[step]} for step in sorted(losses)]
    best = min(points, key=lambda point: (math.isnan(point["loss"]), point["loss"]))
    return {"best": best, "curve": points}


def _keep_best(folder: Path, best_step: int, num_steps: int) -> None:
    """Remove what was kept of evaluations that were not the best; `model/` is the last one's."""
    for best in (*folder.glob("best-*"), *folder.glob(f"{UNFINISHED}best-*")):
        if best.name != f"best-{best_step}" or best_step == num_steps:
            shutil.rmtree(best)


def _flops_per_token(arm: Arm, inputs: ArmInputs) -> float:
    """Of a training step: the student's, and the teacher's if it is asked."""
    block_length = inputs.blocks.split("train").shape[1]
    flops = inputs.architecture(arm).count(block_length).training_flops_per_token
    if arm.kd and not arm.kd.cache:
        teacher = inputs.teacher_of(arm).checkpoint.architecture
        flops += teacher.count(block_length).inference_flops_per_token
    return flops


def _initial_model(arm: Arm, inputs: ArmInputs, seed: int) -> Any:
    """The model that an arm begins with.

    Blocks have no padding, but the padding token is often the one that ends documents, whose
    embedding torch would keep at zero: a block that begins with it then stays at zero through all
    layers, and every norm multiplies its gradient by up to the root of 1 / epsilon.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    architecture, folder = inputs.architecture(arm), inputs.student.folder
    # Reading the student's makes layer-wise classes known to this process.
    is_like_student = arm.shape == STUDENT
    config = AutoConfig.from_pretrained(folder) if is_like_student else architecture.config
    config = copy.deepcopy(config)
    padding, config.pad_token_id = config.pad_token_id, None
    if arm.init == "subnet":
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    else:
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _scale_residual_projections(model, architecture)
    model.config.pad_token_id = padding
    return model


@torch.no_grad()
def _scale_residual_projections(model: Any, architecture: Architecture) -> None:
    """Make what writes into the residual stream smaller the more of it there are.

    Source: GPT-2 (Radford et al., 2019), which divides by the root of the number of such matrices.
    """
    num_layers = architecture.sizes["layers"]
    for pattern, layout in architecture.layouts.items():
        if "{i}" in pattern and layout.startswith("embed "):
            for layer in range(num_layers):
                model.get_parameter(pattern.format(i=layer)).div_(math.sqrt(2 * num_layers))
