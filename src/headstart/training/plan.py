"""What the arms of a recipe would cost, from configs alone: no weights, no text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.model.architecture import Architecture
from headstart.system.errors import UserError
from headstart.system.formats import bytes_text
from headstart.system.settings import check_least
from headstart.training.memory import (
    Memory,
    Setup,
    Sharing,
    arm_memory,
    chosen_memory,
    with_checkpoints,
)
from headstart.training.settings import Arm

H100_BYTES = 80e9


@dataclass(frozen=True)
class Hardware:
    """What would train.

    Attributes:
        gpus: all of them, each with a copy of the student, and of the teacher unless it is sharded.
        peak_tflops: of one GPU in bfloat16; 989 is an H100's data sheet without sparsity.
        mfu: share of the peak that training reaches, model FLOPs utilisation.
        memory_bytes: of one GPU.
    """

    gpus: int = 1
    peak_tflops: float = 989.0
    mfu: float = 0.4
    memory_bytes: float = H100_BYTES

    def __post_init__(self) -> None:
        check_least(self, "--", gpus=1)
        if not 0 < self.peak_tflops < math.inf:
            raise UserError(f"--peak-tflops is {self.peak_tflops}; write a number above 0")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}; it must be above 0 and at most 1")
        if not 0 < self.memory_bytes < math.inf:
            raise UserError(f"--gpu-memory is {self.memory_bytes}; write a size such as 80GB")


@dataclass(frozen=True)
class ArmPlan:
    """What one arm would cost.

    Attributes:
        name: of the arm.
        tokens: that it trains on.
        student_flops: of training, 3 forward passes a token.
        teacher_flops: of asking the teacher, whether now or when a cache was written.
        hours: on all GPUs together, without writing a cache.
        memory: of each GPU.
        checkpoints: whether activations inside layers are computed again.
        is_chosen: whether that was chosen here, since the recipe does not say it.
        remedies: what would fit where this does not.
        least_peak: with activations computed again.
        dense_logits_bytes: that both models' float32 logits of a batch would take.
    """

    name: str
    tokens: int
    student_flops: int
    teacher_flops: int
    hours: float
    memory: Memory
    checkpoints: bool
    is_chosen: bool
    remedies: tuple[str, ...]
    least_peak: int
    dense_logits_bytes: int

    def fits(self, hardware: Hardware) -> bool:
        """Whether a GPU holds it."""
        return self.memory.peak <= hardware.memory_bytes


def plan_arm(
    arm: Arm,
    tokens: int,
    teacher: Architecture,
    student: Architecture,
    setup: Setup,
    hardware: Hardware,
    runs: int = 1,
) -> ArmPlan:
    """Plan an arm that trains on `tokens`, several times if it has `runs` of seeds and rates."""
    batch = setup.batch
    trained, whole = (model.count(batch.block_length) for model in (student, teacher))
    teacher_tokens = int(arm.kd.teacher_tokens(tokens)) if arm.kd else 0
    student_flops = runs * tokens * trained.training_flops_per_token
    teacher_flops = runs * teacher_tokens * whole.inference_flops_per_token
    num_models, vocab = (2 if arm.kd else 1), student.sizes["vocab"]
    asked_flops = 0 if arm.kd and arm.kd.cache else teacher_flops
    flops_per_second = hardware.gpus * hardware.peak_tflops * 1e12 * hardware.mfu
    checkpoints, memory = chosen_memory(
        arm.kd, teacher, student, setup, hardware.gpus, hardware.memory_bytes
    )
    remedies, least_peak = list[str](), memory.peak
    if memory.peak > hardware.memory_bytes:
        remedies = list(_remedies(arm, teacher, student, setup, hardware))
        least = arm_memory(
            arm.kd,
            teacher,
            student,
            with_checkpoints(batch),
            Sharing(hardware.gpus, setup.shards_student),
            setup.refit_bytes,
        )
        least_peak = least.peak
    return ArmPlan(
        name=arm.name if runs == 1 else f"{arm.name} ({runs} runs)",
        tokens=tokens,
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        hours=(student_flops + asked_flops) / flops_per_second / 3600,
        memory=memory,
        checkpoints=checkpoints,
        is_chosen=not setup.sets_checkpointing,
        remedies=tuple(remedies),
        least_peak=least_peak,
        dense_logits_bytes=4 * batch.blocks * batch.block_length * vocab * num_models,
    )


def _remedies(
    arm: Arm, teacher: Architecture, student: Architecture, setup: Setup, hardware: Hardware
) -> Iterator[str]:
    """Changes of the recipe, each of which alone would make an arm fit; checkpoints come along."""

    def fits(arm: Arm, setup: Setup) -> bool:
        setup = replace(setup, batch=with_checkpoints(setup.batch))
        _, memory = chosen_memory(
            arm.kd, teacher, student, setup, hardware.gpus, hardware.memory_bytes
        )
        return memory.peak <= hardware.memory_bytes

    if not setup.batch.checkpoints and fits(arm, setup):
        yield "train.activation_checkpointing: true"
    blocks = setup.batch.blocks
    while blocks > 1:
        blocks //= 2
        if setup.batch.blocks % blocks:  # another step
            continue
        if fits(arm, replace(setup, batch=replace(setup.batch, blocks=blocks, accumulates=True))):
            accumulation = setup.accumulation * setup.batch.blocks // blocks
            yield (
                f"train.per_device_train_batch_size: {blocks} with "
                f"gradient_accumulation_steps: {accumulation}"
            )
            break
    if hardware.gpus == 1:
        return
    if not setup.shards_student and fits(arm, replace(setup, shards_student=True)):
        yield "train.fsdp: true"
    if arm.kd and not arm.kd.cache and not arm.kd.shard_teacher:
        sharded = replace(arm, kd=replace(arm.kd, shard_teacher=True))
        if fits(sharded, setup):
            yield "kd.shard_teacher: true"
        elif fits(sharded, replace(setup, shards_student=True)):
            yield "train.fsdp: true with kd.shard_teacher: true"


def arms_table(
    plans: list[ArmPlan], hardware: Hardware, title: str, is_of_teacher: bool = False
) -> Table:
    """Plans for the terminal, one column for each arm; or for the training of the teacher."""
    size = _size(hardware)
    machine = f"{hardware.gpus} x {hardware.peak_tflops:g} TFLOP/s at {hardware.mfu:.0%}, {size}"
    table = Table(title=f"{title}\n{machine}", box=SIMPLE_HEAD)
    table.add_column("")
    for plan in plans:
        table.add_column(plan.name, justify="right", no_wrap=True)
    rows = {
        "tokens": [f"{plan.tokens:.3g}" for plan in plans],
        "student's FLOPs": [f"{plan.student_flops:.2e}" for plan in plans],
        "teacher's FLOPs": [f"{plan.teacher_flops:.2e}" for plan in plans],
    }
    if is_of_teacher:
        rows["teacher's FLOPs"] = rows.pop("student's FLOPs")
    rows |= {
        "hours": [f"{plan.hours:,.2f}" for plan in plans],
        "GPU hours": [f"{plan.hours * hardware.gpus:,.2f}" for plan in plans],
    }
    memories = [plan.memory for plan in plans]
    parts = {
        "weights, AdamW": [memory.state - memory.teacher for memory in memories],
        "teacher": [memory.teacher for memory in memories],
        "DDP's buckets": [memory.buckets for memory in memories],
        "gathered layers": [memory.gathered for memory in memories],
        "activations": [memory.kept for memory in memories],
        "bfloat16 weights": [memory.copies for memory in memories],
        "teacher's activations": [memory.teacher_activations for memory in memories],
        "loss, logits": [memory.loss for memory in memories],
        "backward pass": [memory.backward for memory in memories],
        "fragmentation": [memory.fragmentation for memory in memories],
        "(refit before)": [memory.refit for memory in memories],
    }
    for name, amounts in parts.items():
        if any(amounts):
            rows[f"  {name}"] = [bytes_text(amount) for amount in amounts]
    rows |= {
        "peak a GPU, about": [bytes_text(memory.peak) for memory in memories],
        "held most at": [memory.moment for memory in memories],
        f"fits {size}": ["yes" if plan.fits(hardware) else "no" for plan in plans],
        "checkpointing": [
            ("needed" if plan.is_chosen else "as set") if plan.checkpoints else "no"
            for plan in plans
        ],
        "(whole logits)": [bytes_text(plan.dense_logits_bytes) for plan in plans],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def misfits(
    plans: list[ArmPlan], hardware: Hardware, otherwise: str = "a smaller bin"
) -> list[str]:
    """A sentence for each arm that does not fit, with what would; `otherwise` if nothing does."""
    size = _size(hardware)
    sentences = []
    for plan in plans:
        if plan.fits(hardware):
            continue
        needs = bytes_text(plan.memory.peak)
        if plan.least_peak < plan.memory.peak:
            needs += f", or {bytes_text(plan.least_peak)} with activation checkpointing,"
        remedies = " or ".join(plan.remedies) or f"{otherwise}, since nothing else fits"
        sentences.append(f"arm {plan.name} needs {needs} of {size}: set {remedies}")
    return sentences


def _size(hardware: Hardware) -> str:
    return bytes_text(hardware.memory_bytes).replace(".0 ", " ")
