"""The sum of per-token losses from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = {"cpu": 30_000_000, "cuda": 400_000_000}
"""Size of one chunk's float32 logits in `chunked_sum`, by kind of device.

On a CPU, 152 tokens of a 49k vocabulary: just below 32 MiB, from where on glibc gives every buffer
back to the kernel and each new one pays for its pages again. On a GPU, 2,034 tokens: each chunk
reads the whole output matrix, and starts its kernels anew.
"""

CHUNKS_PER_PRODUCT = 4
"""Chunks on a CPU whose half-precision gradients become the output matrix' in one product.

That product is rounded and then added in the matrix' own precision, and reading and writing the
whole matrix for that costs more than a chunk's arithmetic.
"""


TokenLoss = Callable[[Tensor, slice], Float[Tensor, " chunk"]]
LossAndGradient = Callable[
    [Tensor, slice], tuple[Float[Tensor, " chunk"], Float[Tensor, "chunk vocab"]]
]


def chunked_sum(
    hidden: Float[Tensor, "tokens embed"],
    output_matrix: Float[Tensor, "vocab embed"],
    token_loss: TokenLoss,
    loss_and_gradient: LossAndGradient | None = None,
    tokens_per_chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum a per-token loss of the logits without ever holding the logits of all tokens.

    Args:
        hidden: final hidden states.
        output_matrix: turns hidden states into logits.
        token_loss: (logits of a chunk, the chunk's slice of the tokens) -> loss of each token.
        loss_and_gradient: the same, with the gradient of the sum by the logits; None asks autograd.
        tokens_per_chunk: how many tokens' logits exist at once; None fills `CHUNK_BYTES`.

    Returns:
        The sum, with gradients for `hidden` and `output_matrix`.
    """
    if tokens_per_chunk is None:
        num_bytes = CHUNK_BYTES.get(output_matrix.device.type, CHUNK_BYTES["cpu"])
        tokens_per_chunk = max(1, num_bytes // (4 * output_matrix.shape[0]))
    if torch.is_grad_enabled():
        total: Tensor = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
            hidden, output_matrix, loss_and_gradient or _by_autograd(token_loss), tokens_per_chunk
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


def _by_autograd(token_loss: TokenLoss) -> LossAndGradient:
    def loss_and_gradient(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            loss = token_loss(logits.requires_grad_(), chunk)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), gradient

    return loss_and_gradient


class _ChunkedSum(torch.autograd.Function):
    """Takes each chunk's gradients while its logits are at hand, so that none are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        output_matrix: Tensor,
        loss_and_gradient: LossAndGradient,
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
        together = 1 if adds_in_place or device.type == "cuda" else CHUNKS_PER_PRODUCT
        for group in (chunks[i : i + together] for i in range(0, len(chunks), together)):
            gradients: list[Tensor] = []
            for chunk in group:
                logits = functional.linear(inputs[chunk], matrix)
                losses, logits_gradient = loss_and_gradient(logits, chunk)
                gradients.append(logits_gradient)
                total += losses.sum()
            tokens = slice(group[0].start, group[-1].stop)
            gradient = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
            hidden_gradient[tokens] = gradient @ matrix
            if adds_in_place:
                matrix_gradient.addmm_(gradient.T, inputs[tokens])
            else:
                matrix_gradient += gradient.T @ inputs[tokens]
            del logits, logits_gradient, gradients, gradient  # before the next ones are made
        ctx.save_for_backward(hidden_gradient, matrix_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, matrix_gradient = ctx.saved_tensors  # autograd narrows the latter again
        (scale,) = output_gradients
        return hidden_gradient * scale, matrix_gradient * scale, None, None
