"""Distillation losses: pure functions from logits to one value per token, and their chunked sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = 30_000_000
"""Size of one chunk's float32 logits in `chunked_sum`: 152 tokens of a 49k vocabulary.

Just below 32 MiB, from where on glibc gives every buffer back to the kernel and each new one
pays for its pages again.
"""


@dataclass(frozen=True)
class DistillationSettings:
    """`alpha * CE + beta * temperature^2 * KL(teacher || student)`.

    Attributes:
        alpha: weight of the cross-entropy with the text.
        beta: weight of the divergence from the teacher.
        temperature: by which both sides' logits are divided before the softmax.
    """

    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) < 0 or self.alpha + self.beta == 0:
            raise ValueError(
                f"kd.alpha {self.alpha} and kd.beta {self.beta} may not be negative, nor both 0"
            )
        if self.temperature <= 0:
            raise ValueError(f"kd.temperature is {self.temperature}; it must be above 0")


def cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of each target, in nats."""
    return functional.cross_entropy(_widened(logits), targets, reduction="none")


def forward_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """KL(teacher || student) of each token at a temperature, in nats, without the factor T^2.

    Source: Hinton et al. (arXiv 1503.02531), section 2.
    """
    student = torch.log_softmax(_widened(student_logits) / temperature, dim=-1)
    teacher = torch.log_softmax(_widened(teacher_logits) / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def distillation_loss(
    student_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    settings: DistillationSettings,
) -> Float[Tensor, " tokens"]:
    """`alpha * CE + beta * T^2 * KL(teacher || student)` of each token.

    T^2 keeps the gradient's size the same at every temperature.
    """
    hard = cross_entropy(student_logits, targets)
    soft = forward_kl(student_logits, teacher_logits, settings.temperature)
    return settings.alpha * hard + settings.beta * settings.temperature**2 * soft


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


def _widened(logits: Tensor) -> Tensor:
    """Lower precisions as float32; float32 and float64 as they are."""
    return logits.to(_wide(logits.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
        total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
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
