"""Losses of a chunk of tokens with the gradients of their sums, without autograd.

Autograd would pass over the logits more often, and a chunk's arithmetic could not be compiled into
a few kernels (benchmarks/loss_passes.py counts both).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def widened(logits: Tensor) -> Tensor:
    """Lower precisions as float32; float32 and float64 as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_probabilities(
    logits: Float[Tensor, "tokens vocab"], temperature: float = 1.0
) -> Float[Tensor, "tokens vocab"]:
    """Natural logs of the softmax, at least in float32, in a tensor of their own."""
    wide = widened(logits)
    return torch.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)


def cross_entropy_and_gradient(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocab"]]:
    """Negative log-likelihood of each target in nats, and its gradient: softmax - one-hot."""
    student = log_probabilities(logits)
    loss, gradient = -_of_targets(student, targets), student.exp_()
    _subtract_at(gradient, targets, 1.0)
    return loss, gradient.to(logits.dtype)


def distillation_and_gradient(
    student_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    teacher_logits: Float[Tensor, "tokens shared"],
    alpha: float,
    beta: float,
    temperature: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, "tokens vocab"]]:
    """Cross-entropy and `T^2 * KL(teacher || student)` of each token, and the gradient of
    `alpha` times the first and `beta` times the second.

    With p the student's probabilities and q the teacher's at temperature T, the second's gradient
    is `T * (p - q)`. A teacher with fewer tokens is compared with the student on the first ones.
    """
    num_shared = teacher_logits.shape[-1]
    student = log_probabilities(student_logits[:, :num_shared], temperature)
    teacher = log_probabilities(teacher_logits, temperature)
    probabilities = teacher.exp()
    soft = temperature**2 * teacher.sub_(student).mul_(probabilities).sum(dim=-1)
    if temperature == 1 and num_shared == student_logits.shape[-1]:
        hard, gradient = -_of_targets(student, targets), student.exp_()
        gradient.mul_(alpha + beta).sub_(probabilities.mul_(beta))
        _subtract_at(gradient, targets, alpha)
    else:
        hard, gradient = cross_entropy_and_gradient(widened(student_logits), targets)
        difference = student.exp_().sub_(probabilities)
        gradient.mul_(alpha)[:, :num_shared].add_(difference.mul_(beta * temperature))
    return hard, soft, gradient.to(student_logits.dtype)


def _of_targets(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(-1, targets[:, None]).squeeze(-1)


def _subtract_at(values: Tensor, places: Tensor, amount: float) -> None:
    """Take an amount off one value of each row."""
    columns = places[:, None]
    if torch.compiler.is_compiling():  # a comparison joins the kernel before it, a scatter cannot
        values.sub_((columns == torch.arange(values.shape[-1], device=values.device)) * amount)
    else:
        values.scatter_add_(-1, columns, values.new_full(columns.shape, -amount))
