"""What the arms of a recipe would cost, from configs alone: no weights, no text."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.losses.chunked import CHUNK_BYTES
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.count import inference_flops_per_token, parameters
from headstart.model.shapes import sizes_in_layer
from headstart.system.errors import UserError
from headstart.system.formats import bytes_text
from headstart.system.settings import check_least
from headstart.training.cache import bytes_per_token
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
        if self.peak_tflops <= 0:
            raise UserError(f"--peak-tflops is {self.peak_tflops}; it must be above 0")
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
        chunk_bytes: that they take at once, as losses are computed in chunks.
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
    """Plan one arm.

    Args:
        arm: what would be trained.
        tokens: its budget.
        teacher: its architecture.
        student_sizes: axis -> size; a tuple gives a size for each layer.
        batch: of one GPU.
        hardware: all GPUs.
        runs: how many times it is trained, for its seeds and learning rates.
    """
    layouts, teacher_sizes = teacher.layouts, teacher.sizes
    student_flops, teacher_flops = (
        inference_flops_per_token(layouts, sizes, batch.block_length)
        for sizes in (student_sizes, teacher_sizes)
    )
    teacher_tokens = int(arm.kd.teacher_tokens(tokens)) if arm.kd else 0
    flops = (3 * runs * tokens * student_flops, runs * teacher_tokens * teacher_flops)
    is_cached = bool(arm.kd and arm.kd.cache)
    batch_tokens, vocab = batch.blocks * batch.block_length, student_sizes["vocab"]
    num_logits = batch_tokens * vocab * (2 if arm.kd else 1)
    state_bytes = TRAINED_BYTES_PER_PARAMETER * parameters(layouts, student_sizes)
    if arm.kd and not is_cached:
        shares = hardware.gpus if arm.kd.shard_teacher else 1
        state_bytes += TEACHER_BYTES_PER_PARAMETER * parameters(layouts, teacher_sizes) // shares
    cached_bytes = 0
    if arm.kd and is_cached:
        cached_bytes = tokens * bytes_per_token(arm.kd, vocab)
    return ArmPlan(
        arm.name if runs == 1 else f"{arm.name} ({runs} runs)",
        tokens,
        *flops,
        sum(flops) / (hardware.gpus * hardware.peak_tflops * 1e12 * hardware.mfu) / 3600,
        state_bytes,
        batch_tokens * activation_bytes_per_token(student_sizes, batch.checkpoints),
        4 * num_logits,
        min(4 * num_logits, CHUNK_BYTES * (2 if arm.kd else 1)),
        cached_bytes,
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
