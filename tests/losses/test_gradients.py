"""Losses and gradients in closed form against autograd of what torch and a formula say."""

import pytest
import torch
from torch.nn import functional

from headstart.losses.gradients import cross_entropy_and_gradient, distillation_and_gradient

TOKENS, VOCAB = 6, 13
TARGETS = torch.tensor([0, 12, 5, 5, 1, 9])


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (4 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_cross_entropy_and_its_gradient_are_torchs():
    student = logits(0).requires_grad_()
    expected = functional.cross_entropy(student, TARGETS, reduction="none")
    expected.sum().backward()
    loss, gradient = cross_entropy_and_gradient(student.detach(), TARGETS)
    torch.testing.assert_close((loss, gradient), (expected.detach(), student.grad))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.8), (0.0, 1.0), (1.0, 0.2)])
def test_distillation_and_its_gradient_are_torchs(alpha, beta, temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)
    hard = functional.cross_entropy(student, TARGETS, reduction="none")
    soft = temperature**2 * functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    (alpha * hard + beta * soft).sum().backward()
    kept = student.detach().clone(), teacher.clone()
    found = distillation_and_gradient(student.detach(), TARGETS, teacher, alpha, beta, temperature)
    torch.testing.assert_close(found, (hard.detach(), soft.detach(), student.grad))
    assert torch.equal(student, kept[0]) and torch.equal(teacher, kept[1])  # neither is written to


def test_losses_are_as_precise_under_autocast():
    student, teacher = (logits(seed, torch.bfloat16) for seed in (0, 1))
    expected = distillation_and_gradient(student, TARGETS, teacher, 0.3, 0.8, 2.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_and_gradient(student, TARGETS, teacher, 0.3, 0.8, 2.5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_half_precision_logits_are_widened_and_keep_their_gradients_precision():
    student, teacher = (logits(seed, torch.bfloat16) for seed in (0, 1))
    exact = distillation_and_gradient(student.double(), TARGETS, teacher.double(), 0.3, 0.8, 1.0)
    hard, soft, gradient = distillation_and_gradient(student, TARGETS, teacher, 0.3, 0.8, 1.0)
    torch.testing.assert_close((hard, soft), (exact[0].float(), exact[1].float()))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), exact[2], rtol=0.01, atol=1e-3)
    hard, gradient = cross_entropy_and_gradient(student, TARGETS)
    assert (hard.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
