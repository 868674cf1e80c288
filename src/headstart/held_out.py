"""Held-out loss of a model, and when one run's loss curve reaches another's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headstart.data import document_positions
from headstart.pretrain.chunked import chunked_sum
from headstart.pretrain.losses import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def next_token_loss(
    hidden: Float[Tensor, "batch tokens embed"],
    output_matrix: Float[Tensor, "vocab embed"],
    blocks: Int[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Summed cross-entropy of every token but each block's first, in nats."""
    targets = blocks[:, 1:].flatten()
    return chunked_sum(
        hidden[:, :-1].flatten(0, 1),
        output_matrix,
        lambda logits, chunk: cross_entropy(logits, targets[chunk]),
    )


@torch.no_grad()
def summed_loss(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
    separator: int | None = None,
) -> float:
    """Summed next-token cross-entropy in nats, without the full logits tensor.

    Args:
        model: a causal language model in eval mode.
        blocks: token ids; the first of each block is context only.
        batch_size: blocks per forward pass.
        on_batch: called with the tokens of each batch done, for progress.
        separator: the token that ends a document, where none may see another document's tokens.
    """
    matrix = model.get_output_embeddings().weight
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    batch: Tensor
    for batch in blocks.to(matrix.device).split(batch_size):  # type: ignore[no-untyped-call]
        positions = None if separator is None else document_positions(batch, separator)
        outputs = model.base_model(batch, position_ids=positions, use_cache=False)
        hidden = outputs.last_hidden_state
        total += next_token_loss(hidden, matrix, batch)
        on_batch(batch.numel())
    return total.item()  # the only wait for the device


def mean_loss(
    model: PreTrainedModel,
    blocks: Int[Tensor, "blocks tokens"],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
    separator: int | None = None,
) -> float:
    """Mean next-token cross-entropy in nats per token; arguments as for `summed_loss`."""
    num_targets: int = blocks.shape[0] * (blocks.shape[1] - 1)
    return summed_loss(model, blocks, batch_size, on_batch, separator) / num_targets


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Loss in bits per byte of text, which does not depend on the tokenizer.

    Args:
        loss: mean nats per token.
        num_tokens: tokens of the text.
        num_bytes: UTF-8 bytes of the same text.
    """
    return loss * num_tokens / num_bytes / math.log(2)


def tokens_to_match(
    tokens: Sequence[float], losses: Sequence[float], target: float
) -> float | None:
    """The first token count at which a loss curve is at or below a target.

    Between evaluations the curve is a straight line.

    Args:
        tokens: ascending token counts of the evaluations.
        losses: the loss at each.
        target: the loss to reach.

    Returns:
        The token count, or None if the curve never gets there.

    >>> tokens_to_match([0, 100, 200], [9.0, 7.0, 5.0], 6.0)
    150.0
    >>> tokens_to_match([0, 100], [9.0, 7.0], 6.0) is None
    True
    """
    if losses[0] <= target:
        return float(tokens[0])
    for position in range(1, len(losses)):
        before, after = losses[position - 1], losses[position]
        if after <= target:
            start, end = tokens[position - 1], tokens[position]
            return start + (end - start) * (before - target) / (before - after)
    return None
