"""What the arms of a recipe would cost, from configs alone: no weights, no text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.losses.chunked import CHUNK_BYTES
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.shapes import sizes_in_layer
from headstart.system.errors import UserError
from headstart.system.formats import bytes_text
from headstart.system.settings import check_least
from headstart.training.cache import CacheIdentity, bytes_per_token
from headstart.training.settings import Arm

TRAINED_BYTES_PER_PARAMETER = 16
"""float32 weights, gradients and both moments of AdamW, on every GPU under DDP."""
TEACHER_BYTES_PER_PARAMETER = 2


@dataclass(frozen=True)
class Hardware:
    """What would train.

    Attributes:
        gpus: all of them, each with a copy of the student, and of the teacher unless it is sharded.
        peak_tflops: of one GPU in bfloat16; 989 is an H100's data sheet without sparsity.
        mfu: share of the peak that training reaches, model FLOPs utilisation.
    """

    gpus: int = 1
    peak_tflops: float = 989.0
    mfu: float = 0.4

    def __post_init__(self) -> None:
        check_least(self, "--", gpus=1)
        if not 0 < self.peak_tflops < math.inf:
            raise UserError(f"--peak-tflops is {self.peak_tflops}; write a number above 0")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Batch:
    """What one GPU trains on at once.

    Attributes:
        blocks: in a forward pass.
        block_length: tokens in a block.
        checkpoints: whether activations inside layers are computed again instead of kept.
    """

    blocks: int
    block_length: int
    checkpoints: bool = False


@dataclass(frozen=True)
class ArmPlan:
    """What one arm would cost.

    Attributes:
        name: of the arm.
        tokens: that it trains on.
        student_flops: of training, 3 forward passes a token.
        teacher_flops: of asking the teacher.
        hours: on all GPUs together.
        state_bytes: on each GPU, of weights, gradients, optimizer and teacher.
        activation_bytes: on each GPU, an estimate.
        dense_logits_bytes: that both models' float32 logits of a batch would take.
        chunk_bytes: that a chunk of them and its gradient take at once, with all copies.
        cache_bytes: of the teacher cache on disk, for one pass over the tokens.
    """

    name: str
    tokens: int
    student_flops: int
    teacher_flops: int
    hours: float
    state_bytes: int
    activation_bytes: int
    dense_logits_bytes: int
    chunk_bytes: int
    cache_bytes: int


def plan_arm(
    arm: Arm,
    tokens: int,
    teacher: Architecture,
    student_sizes: Sizes,
    batch: Batch,
    hardware: Hardware,
    runs: int = 1,
) -> ArmPlan:
    """Plan an arm that trains on `tokens`, several times if it has `runs` of seeds and rates.

    A tuple in `student_sizes` gives a size for each layer.
    """
    student = teacher.count(batch.block_length, student_sizes)
    whole = teacher.count(batch.block_length)
    teacher_tokens = int(arm.kd.teacher_tokens(tokens)) if arm.kd else 0
    student_flops = runs * tokens * student.training_flops_per_token
    teacher_flops = runs * teacher_tokens * whole.inference_flops_per_token
    num_models, vocab = (2 if arm.kd else 1), student_sizes["vocab"]
    batch_tokens = batch.blocks * batch.block_length
    num_logits = batch_tokens * vocab
    bytes_per_batch_token = activation_bytes_per_token(student_sizes, batch.checkpoints)
    state_bytes, cache_bytes = TRAINED_BYTES_PER_PARAMETER * student.parameters, 0
    if arm.kd and arm.kd.cache:
        cache_bytes = tokens * bytes_per_token(CacheIdentity.of(arm.kd, "", ""), vocab)
    elif arm.kd:
        shares = hardware.gpus if arm.kd.shard_teacher else 1
        state_bytes += TEACHER_BYTES_PER_PARAMETER * whole.parameters // shares
    flops_per_second = hardware.gpus * hardware.peak_tflops * 1e12 * hardware.mfu
    return ArmPlan(
        name=arm.name if runs == 1 else f"{arm.name} ({runs} runs)",
        tokens=tokens,
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        hours=(student_flops + teacher_flops) / flops_per_second / 3600,
        state_bytes=state_bytes,
        activation_bytes=batch_tokens * bytes_per_batch_token,
        dense_logits_bytes=4 * num_logits * num_models,
        chunk_bytes=min(4 * num_logits, CHUNK_BYTES["cuda"]) * (5 if arm.kd else 2),
        cache_bytes=cache_bytes,
    )


def activation_bytes_per_token(sizes: Sizes, checkpoints: bool) -> int:
    """bfloat16 numbers that a token leaves for the backward pass, an estimate for gated MLPs.

    A layer keeps its two inputs with their norms, queries, keys, values and what attention makes of
    them, and four numbers for each MLP neuron. With checkpoints it keeps its input, and one layer
    at a time keeps the rest.
    """
    layers = sizes["layers"]
    of_layers = []
    for layer in range(layers):
        in_layer = sizes_in_layer(sizes, layer)
        heads = in_layer["kv_groups"] * in_layer["head_dim"]
        attention = 2 * heads * in_layer["q_per_kv"] + 2 * heads
        of_layers.append(4 * in_layer["embed"] + attention + 4 * in_layer["mlp"])
    kept = layers * sizes["embed"] + max(of_layers) if checkpoints else sum(of_layers)
    return int(2 * kept)


def arms_table(plans: list[ArmPlan], hardware: Hardware, title: str) -> Table:
    """Plans for the terminal, one column for each arm."""
    machine = f"{hardware.gpus} x {hardware.peak_tflops:g} TFLOP/s at {hardware.mfu:.0%}"
    table = Table(title=f"{title}\n{machine}", box=SIMPLE_HEAD)
    table.add_column("")
    for plan in plans:
        table.add_column(plan.name, justify="right", no_wrap=True)
    rows = {
        "tokens": [f"{plan.tokens:.3g}" for plan in plans],
        "student's FLOPs": [f"{plan.student_flops:.2e}" for plan in plans],
        "teacher's FLOPs": [f"{plan.teacher_flops:.2e}" for plan in plans],
        "hours": [f"{plan.hours:,.2f}" for plan in plans],
        "GPU hours": [f"{plan.hours * hardware.gpus:,.2f}" for plan in plans],
        "weights, optimizer, teacher a GPU": [bytes_text(plan.state_bytes) for plan in plans],
        "activations a GPU, about": [bytes_text(plan.activation_bytes) for plan in plans],
        "logits a GPU": [bytes_text(plan.chunk_bytes) for plan in plans],
        "(whole, they would take)": [bytes_text(plan.dense_logits_bytes) for plan in plans],
        "teacher cache": [bytes_text(plan.cache_bytes) for plan in plans],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table
