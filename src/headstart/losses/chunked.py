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

CHUNKS_PER_PRODUCT = 4
"""Chunks whose half-precision gradients become the output matrix' in one product.

That product is rounded and then added in the matrix' own precision, and reading and writing the
whole matrix for that costs more than a chunk's arithmetic.
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
        device, dtype = hidden.device, hidden.dtype
        has_autocast = torch.amp.is_autocast_available(device.type)  # not of "meta"
        if has_autocast and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        inputs, matrix = hidden.to(dtype), output_matrix.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        # Summed in float32 at least: half precision would lose what later chunks add.
        wide = torch.promote_types(output_matrix.dtype, torch.float32)
        matrix_gradient = torch.zeros_like(output_matrix, dtype=wide)
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device)
        adds_in_place = dtype == wide
        chunks = _chunks(len(hidden), tokens_per_chunk)
        together = 1 if adds_in_place else CHUNKS_PER_PRODUCT
        for group in (chunks[i : i + together] for i in range(0, len(chunks), together)):
            gradients: list[Tensor] = []
            for chunk in group:
                with torch.enable_grad():
                    logits = functional.linear(inputs[chunk], matrix).requires_grad_()
                    loss = token_loss(logits, chunk).sum()
                gradients += torch.autograd.grad(loss, logits)
                total += loss.detach()
            tokens = slice(group[0].start, group[-1].stop)
            gradient = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
            hidden_gradient[tokens] = gradient @ matrix
            if adds_in_place:
                matrix_gradient.addmm_(gradient.T, inputs[tokens])
            else:
                matrix_gradient += gradient.T @ inputs[tokens]
        ctx.save_for_backward(hidden_gradient, matrix_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, matrix_gradient = ctx.saved_tensors  # autograd narrows the latter again
        (scale,) = output_gradients
        return hidden_gradient * scale, matrix_gradient * scale, None, None
