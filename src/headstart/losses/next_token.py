"""Held-out loss of a model, and when one run's loss curve reaches another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headstart.losses.chunked import chunked_sum
from headstart.losses.gradients import cross_entropy_and_gradient, widened
from headstart.text.blocks import document_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def next_token_loss(
    hidden: Float[Tensor, "batch tokens embed"],
    output_matrix: Float[Tensor, "vocab embed"],
    blocks: Int[Tensor, "batch tokens"],
    loss_and_gradient: Callable[
        [Tensor, Tensor], tuple[Tensor, Tensor]
    ] = cross_entropy_and_gradient,
) -> Float[Tensor, ""]:
    """Summed cross-entropy of every token but each block's first, in nats.

    `loss_and_gradient` is there to be given compiled.
    """
    targets = blocks[:, 1:].flatten()
    return chunked_sum(
        hidden[:, :-1].flatten(0, 1),
        output_matrix,
        lambda logits, chunk: cross_entropy(logits, targets[chunk]),
        lambda logits, chunk: loss_and_gradient(logits, targets[chunk]),
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


def cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of each target, in nats."""
    return functional.cross_entropy(widened(logits), targets, reduction="none")
