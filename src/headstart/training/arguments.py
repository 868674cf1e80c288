"""What transformers' Trainer is told: the recipe's `train` block over our defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

from headstart.system.device import default_device, has_fast_bf16
from headstart.system.distributed import world_size
from headstart.system.errors import UserError
from headstart.text.blocks import TokenBlocks
from headstart.training.settings import Arm

RESERVED_ARGUMENTS = {
    "output_dir": "output",
    "learning_rate": "each arm's learning_rate",
    "max_steps": "pretrain.tokens",
    "num_train_epochs": "pretrain.tokens",
    "eval_strategy": "pretrain.evaluations",
    "eval_steps": "pretrain.evaluations",
}
"""Keys of `train:` that headstart sets itself, and the recipe key that stands for each."""

PASSED_OVER = {
    "accelerator_config": "tokens are counted with one whole batch for each process",
    "auto_find_batch_size": "another batch would give the arms other steps and schedules",
    "batch_eval_metrics": "evaluations measure the loss alone",
    "bf16_full_eval": "evaluations have the precision of the weights",
    "dataloader_drop_last": "evaluations count every block, and training takes whole steps",
    "disable_tqdm": "headstart shows a bar of its own",
    "do_eval": "it is for training scripts",
    "do_predict": "it is for training scripts",
    "do_train": "it is for training scripts",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint already",
    "eval_accumulation_steps": "evaluations measure the loss alone",
    "eval_delay": "pretrain.evaluations says when to evaluate",
    "eval_do_concat_batches": "evaluations measure the loss alone",
    "eval_on_start": "there is always an evaluation before training",
    "eval_use_gather_object": "evaluations measure the loss alone",
    "fp16_full_eval": "evaluations have the precision of the weights",
    "greater_is_better": "the best weights are those of the lowest validation loss",
    "include_for_metrics": "evaluations measure the loss alone",
    "label_names": "labels are the tokens themselves",
    "label_smoothing_factor": "the loss is plain cross-entropy, next to kd",
    "length_column_name": "all blocks are equally long",
    "load_best_model_at_end": "the best weights are kept in best-STEP beside the last ones",
    "metric_for_best_model": "the best weights are those of the lowest validation loss",
    "parallelism_config": "losses need whole hidden states; use train.fsdp",
    "prediction_loss_only": "evaluations measure the loss alone",
    "restore_callback_states_from_checkpoint": "headstart goes on by itself",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint",
    "save_only_model": "a killed run could not go on",
    "use_cache": "training reads every block once",
}
"""Arguments that our loss or loop would pass over, or break on, and why; their defaults pass."""

SAVE_MINUTES = 15.0
"""Between checkpoints at most, by `train.save_minutes`."""

COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
"""Keys of `train:` that a step cannot do without one of."""


def save_minutes(train: dict[str, Any], arm: Arm) -> float:
    """Minutes between checkpoints at most: a key of `train:` that TrainingArguments does not have.

    Raises:
        UserError: it is no number above 0.
    """
    minutes = {**train, **arm.train}.get("save_minutes", SAVE_MINUTES)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not minutes > 0:
        raise UserError(f"train.save_minutes is {minutes!r}; write a number above 0")
    return float(minutes)


def training_arguments(train: dict[str, Any], arm: Arm, folder: Path, max_steps: int = 1) -> Any:
    """TrainingArguments of one arm: the recipe's `train:` block and the arm's own over it,
    verbatim, over our defaults.

    Raises:
        UserError: a key is one that headstart sets, or TrainingArguments refuses it.
    """
    from transformers import TrainingArguments

    save_minutes(train, arm)
    train = {**train, **arm.train}
    train.pop("save_minutes", None)
    for key in train:
        if key in RESERVED_ARGUMENTS:
            raise UserError(f"train.{key} is set by {RESERVED_ARGUMENTS[key]}; set that instead")
        default = getattr(TrainingArguments, key, None)
        if key in PASSED_OVER and train[key] != default:
            raise UserError(f"train.{key} has no effect here: {PASSED_OVER[key]}; remove it")
        if type(default) in (int, float) and isinstance(train[key], str):
            raise UserError(f"train.{key} is {train[key]!r}; write a number")
        if key in COUNTS and train[key] < 1:
            raise UserError(f"train.{key} is {train[key]}; use at least 1")
    device = default_device()
    has_bf16 = has_fast_bf16(device)
    arguments = {
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 0.2,
        "save_total_limit": 1,
        "bf16": has_bf16,
        # Or the Trainer would refuse bf16 there, and let every process train alone.
        "use_cpu": device.type == "cpu" and (has_bf16 or world_size() > 1),
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
        raise UserError(f"train: {str(error).splitlines()[0]}") from error


def check_sharding(arguments: Any) -> None:
    """Raise a UserError if one process sees several GPUs; if FSDP is asked for where accelerate
    would silently do without; or DeepSpeed in a way that leaves no process with the output matrix,
    which losses need."""
    kind = arguments.distributed_state.distributed_type
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible to one process, which would share its batches by "
            f"DataParallel; start `torchrun --nproc-per-node {arguments.n_gpu} -m headstart.cli "
            "...`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if arguments.fsdp and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise UserError(
            "train.fsdp needs several GPUs: accelerate passes over it on CPUs and in a single "
            "process, which would hold the whole model; remove it or start with torchrun"
        )
    if arguments.deepspeed and arguments.hf_deepspeed_config.is_zero3():
        raise UserError(
            "train.deepspeed has ZeRO stage 3, which splits the output matrix that losses are "
            "computed with; use stage 1 or 2, or train.fsdp"
        )


def tokens_per_step(arguments: Any, block_length: int) -> int:
    """Tokens that one optimizer step sees, over all processes."""
    return int(
        arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * block_length
    )


def check_step(step_tokens: int, blocks: TokenBlocks) -> None:
    """Raise a UserError if the training split holds less text than one step takes."""
    num_tokens = blocks.split("train").size
    if step_tokens > num_tokens:
        raise UserError(
            f"a step takes {step_tokens:,} tokens but the training split has {num_tokens:,}; "
            "lower train.per_device_train_batch_size or give more text"
        )
