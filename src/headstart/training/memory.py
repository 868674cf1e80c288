"""What an arm holds in the memory of one GPU, at each moment of a training step.

Computed from configs. `benchmarks/memory.py` holds it against measured peaks, on CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from headstart.losses.chunked import CHUNK_BYTES, CHUNKS_PER_PRODUCT
from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.training.activations import (
    Batch,
    chunk_bytes_per_logit,
    inference_bytes,
    training_activations,
)

FRAGMENTATION = 0.1
"""Share that is added to what a step holds on a GPU. PyTorch's allocator asks for whole blocks of
2 MB and more and cannot move what lies in them, and CUDA's context, cuBLAS' workspaces and NCCL's
buffers are not tensors. An assumption: no GPU was at hand to measure it."""
CHECKPOINTING_KEYS = ("activation_checkpointing", "gradient_checkpointing")
"""Of `train:`; the second is what transformers before 5.23 has."""
GATHERED_LAYERS = 3
"""Layers of a sharded model that are whole at once: one that computes, the next one, which is
fetched meanwhile, and the gradients of the one before."""


@dataclass(frozen=True)
class Sharing:
    """How a training is spread.

    Attributes:
        gpus: processes, each with one.
        shards_student: whether FSDP divides weights, gradients and moments among them.
        kind: of device, "cuda" or "cpu", for the size of a chunk of logits.
    """

    gpus: int = 1
    shards_student: bool = False
    kind: str = "cuda"


@dataclass(frozen=True)
class Setup:
    """How an arm is trained.

    Attributes:
        batch: of one GPU.
        accumulation: batches in an optimizer step.
        sets_checkpointing: whether the recipe says if activations are computed again; otherwise
            they are where memory needs it.
        shards_student: whether FSDP divides the student among the GPUs.
        refit_bytes: of the stage in which the student gets its first weights.
    """

    batch: Batch
    accumulation: int = 1
    sets_checkpointing: bool = True
    shards_student: bool = False
    refit_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        weights: in float32.
        gradients: in float32, from the backward pass to the optimizer's step.
        moments: both of AdamW.
        teacher: its weights.
        buckets: the second copy of the gradients, which DDP sums up over the processes.
        gathered: layers of sharded models that are whole at the moment, and the student's matrices
            outside of its layers.
        kept: activations, from the forward pass to the backward pass.
        copies: the weights in bfloat16, as long as `kept`.
        teacher_activations: activations of the teacher while it computes.
        teacher_hidden: its last hidden states, until the loss is known.
        loss: chunks of logits, with the gradients of hidden states and output matrix.
        loss_gradients: of these the two gradients, which the backward pass takes twice at first.
        backward: what the backward pass holds besides, of one layer at a time.
        head: the output matrix' gradient.
        layers: of the student.
        accumulates: whether gradients are there during the forward pass too.
        refit: of the stage before, in which the student gets its first weights.
    """

    weights: int
    gradients: int
    moments: int
    teacher: int
    buckets: int
    gathered: int
    kept: int
    copies: int
    teacher_activations: int
    teacher_hidden: int
    loss: int
    loss_gradients: int
    backward: int
    head: int
    layers: int
    accumulates: bool
    refit: int = 0

    @property
    def state(self) -> int:
        """Weights, gradients, moments and the teacher's weights."""
        return self.weights + self.gradients + self.moments + self.teacher

    @property
    def stages(self) -> dict[str, int]:
        """What is held at each moment at which it may be the most, by the moment's name.

        Activations go layer by layer as gradients come, so a backward pass holds most at one of its
        ends.
        """
        base = self.weights + self.moments + self.teacher + self.buckets + self.gathered
        before = base + self.gradients * self.accumulates
        whole = before + self.kept + self.copies
        head = 0 if self.accumulates else self.head
        last_layer = (self.kept + self.copies) // self.layers + self.backward
        return {
            "teacher": whole + self.teacher_activations,
            "loss": whole + self.teacher_hidden + self.loss,
            "backward": whole + max(2 * self.loss_gradients, head + self.backward),
            "last layer": base + self.gradients + last_layer,
            "refit": self.refit,
        }

    @property
    def moment(self) -> str:
        """The name of the moment that holds most."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def held(self) -> int:
        """The most that tensors take."""
        return max(self.stages.values())

    @property
    def peak(self) -> int:
        """`held`, with what fragmentation and the libraries take."""
        return self.held + self.fragmentation

    @property
    def fragmentation(self) -> int:
        return round(FRAGMENTATION * self.held)


def arm_memory(
    kd: DistillationSettings | None,
    teacher: Architecture,
    student: Architecture,
    batch: Batch,
    sharing: Sharing,
    refit: int = 0,
) -> Memory:
    """What an arm that trains with AdamW holds.

    Evaluations hold less, unless their batch is many times that of training.

    Args:
        kd: distillation from the teacher, or none.
        teacher: asked while training, unless `kd` reads a cache.
        student: that is trained.
        batch: of one process.
        sharing: over how many.
        refit: bytes of the stage before.
    """
    tokens, sizes = batch.blocks * batch.block_length, student.sizes
    count = student.count(batch.block_length)
    shares = sharing.gpus if sharing.shards_student else 1
    weights = 4 * count.parameters // shares
    computes_half = sharing.shards_student and batch.has_bf16
    activations = training_activations(student, batch, computes_half)
    matrix, hidden = sizes["vocab"] * sizes["embed"], tokens * sizes["embed"]
    gathered = 0
    if shares > 1:
        # The matrices outside of layers stay whole, with their gradients.
        outside = count.parameters - count.non_embedding_parameters
        of_layer = count.non_embedding_parameters // sizes["layers"]
        gathered = (2 if computes_half else 4) * (2 * outside + GATHERED_LAYERS * of_layer)
    teacher_weights = teacher_activations = teacher_hidden = 0
    if kd and not kd.cache:
        teacher_activations, teacher_hidden = inference_bytes(teacher, batch)
        of_teacher = teacher.count(batch.block_length)
        half = 2 if batch.has_bf16 else 4
        teacher_weights = half * of_teacher.parameters
        if kd.shard_teacher and sharing.gpus > 1:
            in_layers = half * of_teacher.non_embedding_parameters
            teacher_weights -= in_layers - in_layers // sharing.gpus
            gathered += 2 * in_layers // teacher.sizes["layers"]
    return Memory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        teacher=teacher_weights,
        buckets=weights if sharing.gpus > 1 and shares == 1 else 0,
        gathered=gathered,
        kept=activations.kept,
        copies=activations.copies,
        teacher_activations=teacher_activations,
        teacher_hidden=teacher_hidden,
        loss=_loss_bytes(kd, tokens, sizes, teacher.sizes["vocab"], batch.has_bf16, sharing.kind),
        loss_gradients=4 * (matrix + hidden),
        backward=activations.backward,
        head=4 * matrix,
        layers=sizes["layers"],
        accumulates=batch.accumulates,
        refit=refit,
    )


def _loss_bytes(
    kd: DistillationSettings | None,
    tokens: int,
    sizes: Mapping[str, Any],
    teacher_rows: int,
    has_bf16: bool,
    kind: str,
) -> int:
    """Of `chunked_sum`: gradients, what it copies to bfloat16, and a chunk or a product."""
    vocab, embed = sizes["vocab"], sizes["embed"]
    chunk = min(tokens, max(1, CHUNK_BYTES[kind] // (4 * vocab)))
    matrix, hidden, half = vocab * embed, tokens * embed, 2 if has_bf16 else 0
    gradients = 4 * (matrix + 2 * hidden) + half * (matrix + hidden)
    per_logit = chunk_bytes_per_logit(kd, has_bf16, is_padded=teacher_rows != vocab)
    computing = round(per_logit * chunk * vocab)
    together = 1
    if has_bf16 and kind == "cpu":
        together = min(CHUNKS_PER_PRODUCT, -(-tokens // chunk))
        computing += half * (together - 1) * chunk * vocab
    # The last chunk's logits, gradients and their joint copy, and the product as it is rounded.
    copies = 2 if together == 1 else 1 + 2 * together
    product = (half or 4) * copies * chunk * vocab + half * matrix
    return int(gradients + max(computing, product))


def chosen_memory(
    kd: DistillationSettings | None,
    teacher: Architecture,
    student: Architecture,
    setup: Setup,
    gpus: int,
    memory_bytes: float,
) -> tuple[bool, Memory]:
    """Whether an arm's activations are computed again, and what it then holds.

    Where the recipe does not say, they are if that alone makes it fit in `memory_bytes` a GPU.
    """

    def held(batch: Batch) -> Memory:
        sharing = Sharing(gpus, setup.shards_student)
        refit = setup.refit_bytes
        return arm_memory(kd, teacher, student, batch, sharing, refit)

    plain = held(setup.batch)
    if setup.sets_checkpointing or plain.peak <= memory_bytes:
        return setup.batch.checkpoints, plain
    again = held(with_checkpoints(setup.batch))
    return (True, again) if again.peak <= memory_bytes else (False, plain)


def with_checkpoints(batch: Batch) -> Batch:
    """The same batch with activations computed again."""
    return replace(batch, checkpoints=True)


def setup_of(
    arguments: Any, train: Mapping[str, Any], block_length: int, separates: bool, refit: int = 0
) -> Setup:
    """How an arm is trained, from its TrainingArguments and what the recipe says itself.

    Args:
        arguments: TrainingArguments.
        train: the recipe's `train:` block, with the arm's own over it.
        block_length: tokens in a block.
        separates: whether tokens attend to their own document only.
        refit: bytes of the stage before.
    """
    of_fsdp = arguments.fsdp_config if isinstance(arguments.fsdp_config, dict) else {}
    # Older versions of transformers have the other name alone.
    checkpoints = bool(arguments.gradient_checkpointing)
    sets_key = any(train.get(key) is not None for key in CHECKPOINTING_KEYS)
    in_fsdp = of_fsdp.get("activation_checkpointing")
    accumulation = arguments.gradient_accumulation_steps
    batch = Batch(
        arguments.train_batch_size,
        block_length,
        checkpoints or bool(in_fsdp),
        has_bf16=arguments.bf16 or arguments.fp16,
        accumulates=accumulation > 1,
        separates=separates,
    )
    sets_checkpointing = sets_key or in_fsdp is not None
    return Setup(batch, accumulation, sets_checkpointing, bool(arguments.fsdp), refit)
