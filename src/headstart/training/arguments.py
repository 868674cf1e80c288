"""What transformers' Trainer is told: the recipe's `train` block over our defaults."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headstart.system.device import default_device, has_fast_bf16
from headstart.system.distributed import world_size
from headstart.system.errors import UserError
from headstart.system.settings import check_least, settings_from_tree
from headstart.text.blocks import TokenBlocks
from headstart.training.optimizer import muon_with_adamw
from headstart.training.settings import MAX_SEED, Arm

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
    "ddp_static_graph": "losses are computed outside of the model's forward pass",
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
    "local_rank": "torchrun says it",
    "metric_for_best_model": "the best weights are those of the lowest validation loss",
    "parallelism_config": "losses need whole hidden states; use train.fsdp",
    "prediction_loss_only": "evaluations measure the loss alone",
    "remove_unused_columns": "blocks hold nothing that models do not read",
    "restore_callback_states_from_checkpoint": "headstart goes on by itself",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint",
    "save_only_model": "a killed run could not go on",
    "use_cache": "training reads every block once",
}
"""Arguments that our loss or loop would pass over, or break on, and why; their defaults pass.

All others of transformers 5.24 that are not reserved are honoured by the Trainer as they are.
"""

PASSED_OVER_VALUES = {
    ("lr_scheduler_type", "greedy"): "evaluations are not evenly spaced",
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "evaluations are not evenly spaced",
    ("save_strategy", "best"): "the best weights are kept in best-STEP beside the last ones",
    ("train_sampling_strategy", "batch_rebalance"): "all blocks are equally long",
    ("train_sampling_strategy", "group_by_length"): "all blocks are equally long",
    ("train_sampling_strategy", "sequential"): "headstart shuffles the text itself",
}
"""Of arguments that are honoured otherwise, the values that are not, and why."""

LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "ddp_timeout": 1, "logging_steps": 0, "save_steps": 0,
    "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "neftune_noise_alpha": 0,
    "dataloader_num_workers": 0, "seed": 0, "data_seed": 0,
}  # fmt: skip
"""The least value of arguments that TrainingArguments does not check itself."""

CHOICES = {"include_num_input_tokens_seen": ["all", "non_padding", "no", "True", "False"]}
"""Of arguments whose choices TrainingArguments does not tell."""

LOADER_WORKERS = 2
"""Processes that read batches for one GPU, where it has as many cores to itself. Blocks are
memory-mapped, so one keeps up with a step; the second is for a teacher cache, which is searched and
read for every block."""

SAVE_MINUTES = 15.0
"""Between checkpoints at most, by `train.save_minutes`."""


def save_minutes(train: dict[str, Any], arm: Arm) -> float:
    """Minutes between checkpoints at most: a key of `train:` that TrainingArguments does not have.

    Raises:
        UserError: it is no number above 0.
    """
    minutes = {**train, **arm.train}.get("save_minutes", SAVE_MINUTES)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not minutes > 0:
        raise UserError(f"train.save_minutes is {minutes!r}; write a number above 0")
    return float(minutes)


def training_arguments(
    train: dict[str, Any],
    arm: Arm,
    folder: Path,
    max_steps: int = 1,
    schedule: Mapping[str, Any] | None = None,
) -> Any:
    """TrainingArguments of one arm: the recipe's `train:` block and the arm's own over it,
    verbatim, over our defaults.

    Args:
        train: the recipe's block.
        arm: with more of them.
        folder: of the arm.
        max_steps: to train.
        schedule: arguments that a budget sets, over all others.

    Raises:
        UserError: a key is one that headstart sets, or TrainingArguments refuses it.
    """
    from transformers import TrainingArguments

    save_minutes(train, arm)
    train = {**train, **arm.train}
    train.pop("save_minutes", None)
    _check_keys(train)
    device = default_device()
    has_bf16 = has_fast_bf16(device)
    arguments = {
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it would ask the device at every step
        "save_strategy": "steps",
        "save_steps": 0.2,
        "save_total_limit": 1,
        "bf16": has_bf16,
        # Or the Trainer would refuse bf16 there, and let every process train alone.
        "use_cpu": device.type == "cpu" and (has_bf16 or world_size() > 1),
        "report_to": "tensorboard",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **_loading(device, train),
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "log_level": "error",
        **train,
        **(schedule or {}),
        "output_dir": str(folder),
        "learning_rate": arm.learning_rate,
        "max_steps": max_steps,
    }
    try:
        made = TrainingArguments(**arguments)
    except (
        TypeError, ValueError, AttributeError, LookupError, NotImplementedError, OSError,
        ImportError,  # of DeepSpeed, for one
    ) as error:  # fmt: skip
        raise UserError(f"train: {reason(error)}; mend it") from error
    check_least(made, "train.", **LEAST)
    if made.seed > MAX_SEED:
        raise UserError(f"train.seed is {made.seed}; use at most {MAX_SEED}")
    return made


def _loading(device: torch.device, train: Mapping[str, Any]) -> dict[str, Any]:
    """How batches are read for a GPU: ahead of it, by processes that stay between epochs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    spare = min(LOADER_WORKERS, cores // processes - 1)
    workers = train.get("dataloader_num_workers", max(0, spare))
    if device.type != "cuda" or not workers or not isinstance(workers, int):
        return {}
    # Forked, since other ways would send memory-mapped text as a copy of it.
    return {
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": True,
        "dataloader_multiprocessing_context": "fork",
    }


def _check_keys(train: dict[str, Any]) -> None:
    """Raise a UserError for the first key of `train:` that is unknown, not for users, passed over,
    or of another type than TrainingArguments says."""
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    hints = typing.get_type_hints(TrainingArguments)
    for key, value in train.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            advice = f"did you mean train.{near[0]}?" if near else "TrainingArguments has none such"
            raise UserError(f"unknown key train.{key}; {advice}")
        if key in RESERVED_ARGUMENTS:
            raise UserError(f"train.{key} is set by {RESERVED_ARGUMENTS[key]}; set that instead")
        if key in PASSED_OVER and value != getattr(TrainingArguments, key, None):
            raise UserError(f"train.{key} cannot be used: {PASSED_OVER[key]}; remove it")
        for (of_key, refused), reason in PASSED_OVER_VALUES.items():
            if (key, value) == (of_key, refused):
                raise UserError(f"train.{key} cannot be {value}: {reason}; use another")
        kinds = typing.get_args(hints[key]) or (hints[key],)
        plain = [kind for kind in kinds if kind is not type(None)]
        is_left_out = value is None and type(None) in kinds
        if len(plain) == 1 and plain[0] in (int, float, bool) and not is_left_out:
            settings_from_tree(value, plain[0], f"train.{key}")
        if type(value) in (int, float) and not {int, float, bool} & set(kinds):
            raise UserError(f"train.{key} is {value}, and takes no number; write another value")
        choices = CHOICES.get(key) or list(fields[key].metadata.get("choices", ()))
        if choices and value is not None and str(value) not in choices:
            raise UserError(f"train.{key} is {value!r}; choose one of {', '.join(choices)}")


def reason(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def optimizer_of(arm: Arm, arguments: Any) -> tuple[Any, dict[str, Any]] | None:
    """A factory of the arm's optimizer as the Trainer takes it, or None for its own."""
    if not arm.optimizer:
        return None
    if arguments.fsdp:
        raise UserError(f"arm {arm.name}: muon needs whole matrices; leave out fsdp or optimizer")
    settings = {
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "epsilon": arguments.adam_epsilon,
    }
    return lambda: muon_with_adamw, settings


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
            "lower train.per_device_train_batch_size, or train on more, for which more text is read"
        )
