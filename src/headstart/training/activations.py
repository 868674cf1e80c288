"""What a training step holds in memory besides weights, from a config alone.

The model's own code runs on tensors that have shapes and no numbers (PyTorch's FakeTensorMode), and
every tensor that lives is counted. So a plan knows what a family's norms, fused projections and
casts keep, and no formula for each family can go stale. It runs as on a CPU with autocast, whose
lists differ from a GPU's in nothing that these models call.
"""

from __future__ import annotations

import copy
import json
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headstart.losses.distillation import (
    DistillationSettings,
    Samples,
    TopK,
    summed_distillation_loss,
)
from headstart.losses.next_token import next_token_loss
from headstart.model.architecture import Architecture

WITHOUT_MASK = "headstart_without_mask"
"""SDPA as blocks without padding call it. Where tensors have no numbers, transformers makes a mask
that it leaves out otherwise."""


@dataclass(frozen=True)
class Batch:
    """What one GPU trains on at once.

    Attributes:
        blocks: in a forward pass.
        block_length: tokens in a block.
        checkpoints: whether activations inside layers are computed again instead of kept.
        has_bf16: whether products are taken in bfloat16, by autocast.
        accumulates: whether a step adds up the gradients of several batches.
        separates: whether tokens attend to their own document only, which takes a mask.
    """

    blocks: int
    block_length: int
    checkpoints: bool = False
    has_bf16: bool = True
    accumulates: bool = False
    separates: bool = False


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass through a model's trunk, besides its weights.

    Attributes:
        kept: activations, from the forward pass to the backward pass.
        copies: the weights in bfloat16, which autocast makes and the backward pass reads.
        backward: what the backward pass holds on top of both at once, without the weights'
            gradients: a layer's gradients, and with checkpoints its activations and copies.
    """

    kept: int
    copies: int
    backward: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations have made and that still live.

    Attributes:
        now: bytes that live.
        peak: the most that did.
        copies: storages of weights in another precision, with their bytes.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [*model.parameters(), *model.buffers()] if model else []
        self._known: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}
        self._weights = set(self._known)
        self._model = model  # whose storages would else be freed and their addresses used again
        self.now = self.peak = 0
        self.copies: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        is_cast = function is torch.ops.aten._to_copy.default
        casts_weight = is_cast and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, casts_weight)
        return result

    def _count(self, tensor: Tensor, is_copy: bool) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = num_bytes
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        if is_copy:
            self.copies[key] = num_bytes
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)
        self.copies.pop(key, None)


def training_activations(model: Architecture, batch: Batch, is_bf16: bool = False) -> Activations:
    """What a student's training step holds besides weights, their gradients and the loss.

    Args:
        model: the student.
        batch: of one process.
        is_bf16: whether the weights themselves are bfloat16 while they compute, as FSDP has them.
    """
    return _of_layers(model, lambda config: _training(_entries(config), batch, is_bf16))


def inference_bytes(model: Architecture, batch: Batch) -> tuple[int, int]:
    """What a teacher holds besides its weights: at most, and in the end, its hidden states."""
    config = model.config if model.is_layerwise else _with_layers(model.config, 2)
    return _inference(_entries(config), batch)


def chunk_bytes_per_logit(
    kd: DistillationSettings | None, has_bf16: bool, is_padded: bool = False
) -> float:
    """Bytes that the loss of a chunk holds at once for each of the student's logits.

    `is_padded` says whether the teacher has other rows, and both are compared on those they share.
    """
    if kd is not None:
        kd = replace(kd, shard_teacher=False, teacher="")  # which change nothing
    return _of_chunk(kd, has_bf16, is_padded)


def _of_layers(model: Architecture, measure: Any) -> Activations:
    """A measure of all layers, from one and two of them where they are alike."""
    layers = model.sizes["layers"]
    if model.is_layerwise or layers < 2:
        return cast(Activations, measure(model.config))
    one, two = (measure(_with_layers(model.config, count)) for count in (1, 2))

    def grown(first: int, second: int) -> int:
        return int(first + (layers - 1) * (second - first))

    kept, copies = grown(one.kept, two.kept), grown(one.copies, two.copies)
    return Activations(kept, copies, two.backward)


def _with_layers(config: Any, count: int) -> Any:
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = count
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = shorter.layer_types[:count]
    return shorter


def _entries(config: Any) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def _built(entries: str, batch: Batch, dtype: torch.dtype) -> Any:
    """A model without numbers, inside FakeTensorMode."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
    values = json.loads(entries)
    config = AutoConfig.for_model(**values)
    window = getattr(config, "sliding_window", None) or batch.block_length
    needs_mask = batch.separates or window < batch.block_length
    kind = "sdpa" if needs_mask else WITHOUT_MASK
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)


def _autocast(batch: Batch) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if batch.has_bf16 else nullcontext()


@lru_cache(256)
def _training(entries: str, batch: Batch, is_bf16: bool) -> Activations:
    with FakeTensorMode():
        model = _built(entries, batch, torch.bfloat16 if is_bf16 else torch.float32).train()
        if batch.checkpoints:
            # Older versions of transformers have the other name alone.
            new_name = getattr(model, "activation_checkpointing_enable", None)
            (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        blocks = torch.zeros(batch.blocks, batch.block_length, dtype=torch.int64)
        with LiveBytes(model) as live:
            with _autocast(batch):
                hidden = model.base_model(blocks, use_cache=False).last_hidden_state
            after, copies = live.now, sum(live.copies.values())
            gradient = torch.zeros_like(hidden)
            live.peak = live.now
            torch.autograd.backward(hidden, gradient)
            return Activations(after - copies, copies, live.peak - after)


@lru_cache(256)
def _inference(entries: str, batch: Batch) -> tuple[int, int]:
    dtype = torch.bfloat16 if batch.has_bf16 else torch.float32
    with FakeTensorMode(), torch.no_grad():
        model = _built(entries, batch, dtype).eval()
        blocks = torch.zeros(batch.blocks, batch.block_length, dtype=torch.int64)
        with LiveBytes(model) as live:
            hidden = model.base_model(blocks, use_cache=False).last_hidden_state
            return live.peak, hidden.untyped_storage().nbytes()


@lru_cache(256)
def _of_chunk(kd: DistillationSettings | None, has_bf16: bool, is_padded: bool) -> float:
    """Of one chunk, small in tokens and channels, so that the logits outweigh all else."""
    tokens, vocab, dtype = 64, 1000, torch.bfloat16 if has_bf16 else torch.float32
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=has_bf16):
        hidden = torch.zeros(1, tokens + 1, 1, requires_grad=True)
        matrix = torch.zeros(vocab, 1, requires_grad=True)
        blocks = torch.zeros(1, tokens + 1, dtype=torch.int64)
        with LiveBytes() as live:
            if kd is None:
                next_token_loss(hidden, matrix, blocks)
            else:
                summed_distillation_loss(
                    hidden[0, 1:],
                    matrix,
                    blocks[0, 1:],
                    lambda chunk: _teacher_outputs(kd, tokens, vocab, dtype),
                    kd,
                    shared_rows=vocab - 1 if is_padded else None,
                )
        return float(live.peak) / (tokens * vocab)


def _teacher_outputs(
    kd: DistillationSettings, tokens: int, vocab: int, dtype: torch.dtype
) -> Tensor | TopK | Samples:
    if not kd.cache:
        return torch.zeros(tokens, vocab, dtype=dtype)
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    numbers = torch.zeros(tokens, 1)
    return TopK(ids, numbers, numbers[:, 0]) if kd.top_k else Samples(ids, numbers, numbers)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
