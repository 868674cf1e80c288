"""The arms of a comparison: one training run each, alike in all but what the arm names."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

from headstart.data import BlockDataset, TokenBlocks
from headstart.device import default_device, has_fast_bf16, peak_flops
from headstart.files import write_json
from headstart.pretrain.cache import CachedBlocks, CacheIdentity, TeacherCache
from headstart.pretrain.losses import DistillationSettings
from headstart.pretrain.optimizer import muon_with_adamw
from headstart.pretrain.teacher import load_teacher
from headstart.progress import progress
from headstart.subnet.count import count
from headstart.subnet.rules import read_config


@dataclass(frozen=True)
class Arm:
    """One training run.

    Attributes:
        name: in the report, and of its folder; "scratch" is what the others are compared with.
        init: "random" weights, or those of the extracted "subnet".
        learning_rate: the peak of the schedule.
        learning_rates: several to train with, each in a run of its own; the one that ends lowest
            is compared with the other arms.
        optimizer: "muon" for hidden matrices, with AdamW for the rest; empty for `train.optim`.
        train: passed to TrainingArguments for this arm, over the recipe's `train`.
        kd: distillation from the teacher, or none.
    """

    name: str
    init: Literal["random", "subnet"] = "subnet"
    learning_rate: float = 1e-3
    learning_rates: tuple[float, ...] = ()
    optimizer: Literal["", "muon"] = ""
    train: dict[str, Any] = field(default_factory=dict)
    kd: DistillationSettings | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"arm name {self.name!r} cannot be a folder's name; choose another")
        for rate in (self.learning_rate, *self.learning_rates):
            if rate <= 0:
                raise ValueError(f"arm {self.name} has learning_rate {rate}; it must be above 0")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"arm {self.name} has one of its learning_rates twice; remove it")


@dataclass(frozen=True)
class PretrainSettings:
    """What all arms share.

    Attributes:
        tokens: budget of every arm, rounded up to whole steps.
        validation_tokens: of the validation split, used by every evaluation; all that it holds if
            that is less.
        evaluations: how many, denser at the start, besides the one before training.
        seeds: of weights and of the order of the text; with several, each arm is trained with each
            and their mean is reported. `train.seed` alone when empty.
        baselines: models, as folders or hub ids, with the teacher's tokenizer, whose loss on the
            validation split the arms are measured against.
        peak_tflops: of one device in the precision of training, for the share that is reached; 0
            for what its maker says, where known.
        arms: in the order in which they run.
    """

    tokens: int = 10_000_000
    validation_tokens: int = 65_536
    evaluations: int = 20
    seeds: tuple[int, ...] = ()
    baselines: tuple[str, ...] = ()
    peak_tflops: float = 0.0
    arms: tuple[Arm, ...] = (
        Arm("scratch", init="random"),
        Arm("subnet"),
        Arm("subnet+kd", kd=DistillationSettings()),
    )

    def __post_init__(self) -> None:
        for name in ("tokens", "validation_tokens", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"pretrain.{name} is {getattr(self, name)}; use at least 1")
        if self.peak_tflops < 0:
            raise ValueError(f"pretrain.peak_tflops is {self.peak_tflops}; it may not be negative")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"pretrain.seeds {list(self.seeds)} has one twice; remove it")
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
    """TrainingArguments of one arm: the recipe's `train:` block and the arm's own over it,
    verbatim, over our defaults.

    Raises:
        ValueError: a key is one that headstart sets, or TrainingArguments refuses it.
    """
    from transformers import TrainingArguments

    train = {**train, **arm.train}
    for key in train:
        if key in RESERVED_ARGUMENTS:
            raise ValueError(f"train.{key} is set by {RESERVED_ARGUMENTS[key]}; set that instead")
        default = getattr(TrainingArguments, key, None)
        if type(default) in (int, float) and isinstance(train[key], str):
            raise ValueError(f"train.{key} is {train[key]!r}; write a number")
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
        "use_cpu": has_bf16 and device.type == "cpu",  # or the Trainer would refuse bf16 there
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


def check_sharding(arguments: Any) -> None:
    """Raise a ValueError if FSDP is asked for where accelerate would silently do without, or
    DeepSpeed in a way that leaves no process with the output matrix, which losses need."""
    kind = arguments.distributed_state.distributed_type
    if arguments.fsdp and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            "train.fsdp needs several GPUs: accelerate passes over it on CPUs and in a single "
            "process, which would hold the whole model; remove it or start with torchrun"
        )
    if arguments.deepspeed and arguments.hf_deepspeed_config.is_zero3():
        raise ValueError(
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
        seconds, the curve, a list of {"tokens", "loss"}, from before training to the end, and its
        best point, whose weights are in `best-STEP/` unless it is the last.

    Raises:
        ValueError: the run was begun with another number of processes; the arm distils from a
            teacher of another vocabulary or from a cache of another teacher or text; or there is
            less text than one step takes.
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
    if checkpoint:
        before = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
        if before != num_steps:
            raise ValueError(
                f"{folder} was begun with {before} steps and would go on with {num_steps}: start "
                "as many processes as before, or choose another --output"
            )

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
        teacher = load_teacher(inputs.teacher, arguments.device, arm.kd.shard_teacher)
        if arguments.torch_compile:
            teacher.compile(
                arguments.torch_compile_backend or "inductor", arguments.torch_compile_mode
            )
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
            flops_per_token=_flops_per_token(arm, inputs),
            peak_flops=1e12 * settings.peak_tflops or peak_flops(arguments.device),
            optimizer_cls_and_kwargs=_optimizer(arm, arguments),
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
    best_step = min(curve, key=lambda step: (math.isnan(curve[step]), curve[step]))
    if trainer.is_world_process_zero():
        for best in folder.glob("*best-*"):
            if best.name != f"best-{best_step}" or best_step == num_steps:
                shutil.rmtree(best)  # `model/` is as good
    result = {
        "tokens": num_steps * step_tokens,
        "tokens_per_step": step_tokens,
        "validation_tokens": num_validation_blocks * block_length,
        "seconds": trainer.seconds,
        "best": {"tokens": best_step * step_tokens, "loss": curve[best_step]},
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


def _optimizer(arm: Arm, arguments: Any) -> tuple[Any, dict[str, Any]] | None:
    """A factory of the arm's optimizer as the Trainer takes it, or None for its own."""
    if not arm.optimizer:
        return None
    if arguments.fsdp:
        raise ValueError(f"arm {arm.name}: muon needs whole matrices; leave out fsdp or optimizer")
    settings = {
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "epsilon": arguments.adam_epsilon,
    }
    return lambda: muon_with_adamw, settings


def _flops_per_token(arm: Arm, inputs: ArmInputs) -> float:
    """Of a training step: the student's, and the teacher's if it is asked."""
    block_length = inputs.blocks.split("train").shape[1]
    flops = count(read_config(inputs.student), block_length).training_flops_per_token
    if arm.kd and not arm.kd.cache:
        teacher = count(read_config(inputs.teacher), block_length)
        flops += teacher.inference_flops_per_token
    return flops


def _initial_model(arm: Arm, student: Path, seed: int) -> Any:
    """The model that an arm begins with.

    Blocks have no padding, but the padding token is often the one that ends documents, whose
    embedding torch would keep at zero: a block that begins with it then stays at zero through all
    layers, and every norm multiplies its gradient by up to the root of 1 / epsilon.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = AutoConfig.from_pretrained(student)
    padding, config.pad_token_id = config.pad_token_id, None
    if arm.init == "subnet":
        model = AutoModelForCausalLM.from_pretrained(student, config=config, dtype=torch.float32)
    else:
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.pad_token_id = padding
    return model
