"""The sum of per-token losses from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = 30_000_000
"""Size of one chunk's float32 logits in `chunked_sum`: 152 tokens of a 49k vocabulary.

Just below 32 MiB, from where on glibc gives every buffer back to the kernel and each new one
pays for its pages again.
"""


def chunked_sum(
    hidden: Float[Tensor, "tokens embed"],
    output_matrix: Float[Tensor, "vocab embed"],
    token_loss: Callable[[Tensor, slice], Float[Tensor, " chunk"]],
    tokens_per_chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum a per-token loss of the logits without ever holding the logits of all tokens.

    Args:
        hidden: final hidden states.
        output_matrix: turns hidden states into logits.
        token_loss: (logits of a chunk, the chunk's slice of the tokens) -> loss of each token.
        tokens_per_chunk: how many tokens' logits exist at once; None fills `CHUNK_BYTES`.

    Returns:
        The sum, with gradients for `hidden` and `output_matrix`.
    """
    if tokens_per_chunk is None:
        tokens_per_chunk = max(1, CHUNK_BYTES // (4 * output_matrix.shape[0]))
    if torch.is_grad_enabled():
        total: Tensor = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
            hidden, output_matrix, token_loss, tokens_per_chunk
        )
        return total
    chunks = _chunks(len(hidden), tokens_per_chunk)
    return sum(
        (token_loss(functional.linear(hidden[c], output_matrix), c).sum() for c in chunks),
        hidden.new_zeros(()),
    )


def _chunks(num_tokens: int, tokens_per_chunk: int) -> list[slice]:
    starts = range(0, num_tokens, tokens_per_chunk)
    return [slice(start, min(start + tokens_per_chunk, num_tokens)) for start in starts]


class _ChunkedSum(torch.autograd.Function):
    """Takes each chunk's gradients while its logits are at hand, so that none are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        output_matrix: Tensor,
        token_loss: Callable[[Tensor, slice], Tensor],
        tokens_per_chunk: int,
    ) -> Tensor:
        hidden_gradient = torch.empty_like(hidden)
        matrix_gradient = torch.zeros_like(output_matrix)
        matrix = output_matrix.detach().requires_grad_()
        total = torch.zeros(
            (), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        for chunk in _chunks(len(hidden), tokens_per_chunk):
            with torch.enable_grad():
                part = hidden[chunk].detach().requires_grad_()
                loss = token_loss(functional.linear(part, matrix), chunk).sum()
            hidden_gradient[chunk], gradient = torch.autograd.grad(loss, (part, matrix))
            matrix_gradient += gradient
            total += loss.detach()
        ctx.save_for_backward(hidden_gradient, matrix_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, matrix_gradient = ctx.saved_tensors
        (scale,) = output_gradients
        return hidden_gradient * scale, matrix_gradient * scale, None, None
