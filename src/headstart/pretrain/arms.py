"""The arms of a comparison: one training run each, alike in all but what the arm names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from headstart.data import BlockDataset, TokenBlocks
from headstart.device import default_device, has_fast_bf16, load_frozen
from headstart.files import write_json
from headstart.pretrain.cache import CachedBlocks, CacheIdentity, TeacherCache
from headstart.pretrain.losses import DistillationSettings
from headstart.pretrain.teacher import Teacher
from headstart.progress import progress


@dataclass(frozen=True)
class Arm:
    """One training run.

    Attributes:
        name: in the report, and of its folder; "scratch" is what the others are compared with.
        init: "random" weights, or those of the extracted "subnet".
        learning_rate: the peak of the schedule.
        kd: distillation from the teacher, or none.
    """

    name: str
    init: Literal["random", "subnet"] = "subnet"
    learning_rate: float = 1e-3
    kd: DistillationSettings | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"arm name {self.name!r} cannot be a folder's name; choose another")
        if self.learning_rate <= 0:
            raise ValueError(
                f"arm {self.name} has learning_rate {self.learning_rate}; it must be above 0"
            )


@dataclass(frozen=True)
class PretrainSettings:
    """What all arms share.

    Attributes:
        tokens: budget of every arm, rounded up to whole steps.
        validation_tokens: of the validation split, used by every evaluation; all that it holds if
            that is less.
        evaluations: how many, denser at the start, besides the one before training.
        arms: in the order in which they run.
    """

    tokens: int = 10_000_000
    validation_tokens: int = 65_536
    evaluations: int = 20
    arms: tuple[Arm, ...] = (
        Arm("scratch", init="random"),
        Arm("subnet"),
        Arm("subnet+kd", kd=DistillationSettings()),
    )

    def __post_init__(self) -> None:
        for name in ("tokens", "validation_tokens", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"pretrain.{name} is {getattr(self, name)}; use at least 1")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"pretrain.arms are named {', '.join(names) or 'nothing'}; give at least one arm, "
                "each with a name of its own"
            )


RESERVED_ARGUMENTS = {
    "output_dir": "output",
    "learning_rate": "each arm's learning_rate",
    "max_steps": "pretrain.tokens",
    "num_train_epochs": "pretrain.tokens",
    "eval_strategy": "pretrain.evaluations",
    "eval_steps": "pretrain.evaluations",
}
"""Keys of `train:` that headstart sets itself, and the recipe key that stands for each."""


def training_arguments(train: dict[str, Any], arm: Arm, folder: Path, max_steps: int = 1) -> Any:
    """TrainingArguments of one arm: the recipe's `train:` block, verbatim, over our defaults.

    Raises:
        ValueError: a key is one that headstart sets, or TrainingArguments refuses it.
    """
    from transformers import TrainingArguments

    for key in train:
        if key in RESERVED_ARGUMENTS:
            raise ValueError(f"train.{key} is set by {RESERVED_ARGUMENTS[key]}; set that instead")
        default = getattr(TrainingArguments, key, None)
        if type(default) in (int, float) and isinstance(train[key], str):
            raise ValueError(f"train.{key} is {train[key]!r}; write a number")
    arguments = {
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 0.2,
        "save_total_limit": 1,
        "bf16": has_fast_bf16(default_device()),
        "report_to": "tensorboard",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "log_level": "error",
        **train,
        "output_dir": str(folder),
        "learning_rate": arm.learning_rate,
        "max_steps": max_steps,
    }
    try:
        return TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {str(error).splitlines()[0]}") from error


def tokens_per_step(arguments: Any, block_length: int) -> int:
    """Tokens that one optimizer step sees, over all processes."""
    return int(
        arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * block_length
    )


def check_step(step_tokens: int, blocks: TokenBlocks) -> None:
    """Raise a ValueError if the training split holds less text than one step takes."""
    num_tokens = blocks.split("train").size
    if step_tokens > num_tokens:
        raise ValueError(
            f"a step takes {step_tokens:,} tokens but the training split has {num_tokens:,}; "
            "lower train.per_device_train_batch_size or give more text"
        )


@dataclass(frozen=True)
class ArmInputs:
    """What an arm needs besides its own settings.

    Attributes:
        student: folder of the extracted sub-network; its config serves random arms too.
        teacher: folder of the teacher, for arms that distil.
        blocks: training and validation tokens.
        settings: shared by all arms.
        train: the recipe's `train:` block.
        teacher_hash: of the teacher's checkpoint, for arms that distil from a cache.
    """

    student: Path
    teacher: Path
    blocks: TokenBlocks
    settings: PretrainSettings
    train: dict[str, Any] = field(default_factory=dict)
    teacher_hash: str = ""


def run_arm(arm: Arm, inputs: ArmInputs, folder: Path) -> dict[str, Any]:
    """Train one arm, or go on from its last checkpoint, or read its result if it is done.

    Args:
        arm: what to train.
        inputs: what all arms share.
        folder: of this arm; holds checkpoints, TensorBoard logs, then `model/` and `arm.json`.

    Returns:
        The content of `arm.json`: tokens, tokens_per_step, validation_tokens (those used),
        seconds and the curve, a list of {"tokens", "loss"}, from before training to the end.

    Raises:
        ValueError: the arm distils from a teacher of another vocabulary or from a cache of another
            teacher or text, or there is less text than one step takes.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        TrainerState,
        default_data_collator,
    )

    from headstart.pretrain.trainer import (
        DistillationTrainer,
        evaluation_steps,
        last_whole_checkpoint,
        seconds_until,
    )

    finished = folder / "arm.json"
    if finished.is_file():
        result: dict[str, Any] = json.loads(finished.read_text())
        return result
    settings = inputs.settings
    train_split, validation_split = (inputs.blocks.split(n) for n in ("train", "validation"))
    block_length = train_split.shape[1]
    step_tokens = tokens_per_step(training_arguments(inputs.train, arm, folder), block_length)
    check_step(step_tokens, inputs.blocks)
    num_steps = math.ceil(settings.tokens / step_tokens)
    # Whole steps only: at an epoch's end the Trainer would take a shorter one.
    num_train_blocks = train_split.size // step_tokens * (step_tokens // block_length)
    arguments = training_arguments(inputs.train, arm, folder, num_steps)
    checkpoint = last_whole_checkpoint(folder)
    done = int(checkpoint.name[11:]) if checkpoint else 0
    arguments.eval_on_start = checkpoint is None

    if done < num_steps:
        model = _initial_model(arm, inputs.student, arguments.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    train_dataset: Any = BlockDataset(train_split, num_train_blocks, inputs.blocks.separator)
    teacher = None
    if arm.kd and arm.kd.cache:
        identity = cache_identity(arm.kd, inputs)
        train_dataset = CachedBlocks(train_dataset, TeacherCache(arm.kd.cache, identity))
        arguments.remove_unused_columns = False
    elif arm.kd:
        teacher = Teacher(load_frozen(inputs.teacher, arguments.device))
    if teacher and teacher.model.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"arm {arm.name} cannot distil: the teacher has {teacher.model.config.vocab_size} "
            f"vocabulary rows and the student {model.config.vocab_size}; use the teacher that the "
            "student was cut from"
        )
    num_validation_blocks = min(
        math.ceil(settings.validation_tokens / block_length), len(validation_split)
    )
    with progress(f"pretrain {arm.name}", num_steps * step_tokens, "tokens") as advance:
        reported = 0

        def on_step(step: int, note: str) -> None:
            nonlocal reported
            advance((step - reported) * step_tokens, note)
            reported = step

        on_step(done, "resumed" if done else "evaluating before training")
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            processing_class=AutoTokenizer.from_pretrained(inputs.teacher),
            data_collator=default_data_collator,
            train_dataset=train_dataset,
            eval_dataset=BlockDataset(
                validation_split, num_validation_blocks, inputs.blocks.separator
            ),
            teacher=teacher,
            distillation=arm.kd,
            tokens_per_step=step_tokens,
            evaluation_steps=set(evaluation_steps(num_steps, settings.evaluations)),
            earlier_seconds=seconds_until(checkpoint),
            on_step=on_step,
        )
        if checkpoint is None or done < num_steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        else:  # killed after its last step; the Trainer would take one more
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    curve = {
        entry["step"]: entry["eval_loss"]
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    }
    trainer.save_model(str(folder / "model"))
    result = {
        "tokens": num_steps * step_tokens,
        "tokens_per_step": step_tokens,
        "validation_tokens": num_validation_blocks * block_length,
        "seconds": trainer.seconds,
        "curve": [
            {"tokens": step * step_tokens, "loss": loss} for step, loss in sorted(curve.items())
        ],
    }
    if trainer.is_world_process_zero():
        write_json(finished, result)
    return result


def cache_identity(kd: DistillationSettings, inputs: ArmInputs) -> CacheIdentity:
    """What an arm's teacher cache holds."""
    return CacheIdentity.of(kd, inputs.teacher_hash, inputs.blocks.fingerprint)


def _initial_model(arm: Arm, student: Path, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    if arm.init == "subnet":
        return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    set_seed(seed)
    config = AutoConfig.from_pretrained(student)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
