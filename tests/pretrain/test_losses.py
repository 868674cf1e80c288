"""Losses against explicit probabilities in float64, hand cases, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.pretrain.losses import (
    DistillationSettings,
    chunked_sum,
    cross_entropy,
    distillation_loss,
    forward_kl,
)

TOKENS, VOCAB, EMBED = 7, 11, 5
SETTINGS = DistillationSettings(alpha=0.3, beta=0.8, temperature=2.5)


@pytest.fixture
def student() -> Tensor:
    return 3 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def teacher() -> Tensor:
    return 3 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def targets() -> Tensor:
    return torch.tensor([0, 10, 3, 3, 7, 1, 9])


def probabilities(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(logits.detach().numpy() / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def surprise(student: Tensor, targets: Tensor) -> np.ndarray:
    return -np.log(probabilities(student)[np.arange(len(targets)), targets.numpy()])


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    return (p * np.log(p / q)).sum(axis=1)


def test_cross_entropy_is_minus_the_log_of_the_targets_probability(student, targets):
    np.testing.assert_allclose(cross_entropy(student, targets), surprise(student, targets), 1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_is_the_sum_of_p_log_p_over_q(student, teacher, temperature):
    expected = divergence(student, teacher, temperature)
    np.testing.assert_allclose(forward_kl(student, teacher, temperature), expected, 1e-12)


def test_forward_kl_weighs_by_the_teacher():
    even, uneven = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[3.0, 1.0]]).log()
    to_uneven_student = 0.5 * np.log(2 / 3) + 0.5 * np.log(2)
    to_even_student = 0.75 * np.log(3 / 2) + 0.25 * np.log(1 / 2)
    assert float(forward_kl(uneven, teacher_logits=even)) == pytest.approx(to_uneven_student)
    assert float(forward_kl(even, teacher_logits=uneven)) == pytest.approx(to_even_student)


def test_forward_kl_to_oneself_is_zero(student):
    shifted = student + torch.randn(TOKENS, 1)  # a constant changes no probability
    torch.testing.assert_close(forward_kl(student, shifted), torch.zeros(TOKENS).double())


def test_distillation_loss_is_the_weighted_sum(student, teacher, targets):
    hard, soft = surprise(student, targets), divergence(student, teacher, 2.5)
    loss = distillation_loss(student, targets, teacher, SETTINGS)
    np.testing.assert_allclose(loss, 0.3 * hard + 0.8 * 2.5**2 * soft, 1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_the_closed_form(student, teacher, targets, temperature):
    settings = DistillationSettings(alpha=0.3, beta=0.8, temperature=temperature)
    student.requires_grad_()
    distillation_loss(student, targets, teacher, settings).sum().backward()
    hard = probabilities(student) - np.eye(VOCAB)[targets]
    soft = probabilities(student, temperature) - probabilities(teacher, temperature)
    np.testing.assert_allclose(student.grad, 0.3 * hard + 0.8 * temperature * soft, atol=1e-12)


def test_hot_gradient_matches_logits(student, teacher, targets):
    """Hinton et al., equation 4: without T^2 this limit would vanish."""
    student.requires_grad_()
    settings = DistillationSettings(alpha=0.0, beta=1.0, temperature=1e4)
    distillation_loss(student, targets, teacher, settings).sum().backward()
    gap = (student - teacher).detach()
    expected = (gap - gap.mean(dim=1, keepdim=True)) / VOCAB
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-3)


def test_gradients_agree_with_finite_differences(student, teacher, targets):
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, targets), student)
    assert torch.autograd.gradcheck(lambda s, t: forward_kl(s, t, 2.5), (student, teacher))
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, targets, teacher.detach(), SETTINGS), student
    )


def test_low_precision_is_widened_before_the_softmax(student, teacher, targets):
    low_student, low_teacher = student.bfloat16(), teacher.bfloat16()
    loss = distillation_loss(low_student, targets, low_teacher, SETTINGS)
    exact = distillation_loss(low_student.double(), targets, low_teacher.double(), SETTINGS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"alpha": -0.1}, r"kd\.alpha -0\.1 and kd\.beta 0\.5 may not be negative"),
        ({"beta": -0.1}, r"kd\.beta -0\.1"),
        ({"alpha": 0.0, "beta": 0.0}, "nor both 0"),
        ({"temperature": 0.0}, r"kd\.temperature is 0\.0; it must be above 0"),
        ({"temperature": -1.0}, r"kd\.temperature is -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        DistillationSettings(**settings)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(TOKENS, EMBED, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(VOCAB, EMBED, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["cross-entropy", "distillation"])
def token_loss(request, targets, teacher) -> Callable[[Tensor, slice], Tensor]:
    if request.param == "cross-entropy":
        return lambda logits, chunk: cross_entropy(logits, targets[chunk])
    return lambda logits, chunk: distillation_loss(
        logits, targets[chunk], teacher[chunk].to(logits.dtype), SETTINGS
    )


def with_gradients(loss_of, hidden: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A loss divided by 13 on its way to the gradients, as by num_items_in_batch."""
    hidden, matrix = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    total = loss_of(hidden, matrix)
    (total / 13).backward()
    return total.detach(), hidden.grad, matrix.grad


@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 3, 7, 100])
def test_chunked_sum_equals_dense(hidden, matrix, token_loss, tokens_per_chunk):
    def dense_sum(h: Tensor, m: Tensor) -> Tensor:
        return token_loss(h @ m.T, slice(None)).sum()

    def in_chunks(h: Tensor, m: Tensor) -> Tensor:
        return chunked_sum(h, m, token_loss, tokens_per_chunk)

    dense = with_gradients(dense_sum, hidden, matrix)
    torch.testing.assert_close(
        with_gradients(in_chunks, hidden, matrix), dense, rtol=1e-6, atol=1e-6
    )
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(hidden, matrix), dense[0], rtol=1e-6, atol=1e-6)


def test_chunked_sum_agrees_with_finite_differences(hidden, matrix, token_loss):
    inputs = (hidden.double().requires_grad_(), matrix.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda h, m: chunked_sum(h, m, token_loss, 3), inputs)


@pytest.mark.parametrize("grad", [True, False])
def test_chunked_sum_sees_every_token_once_and_few_at_a_time(hidden, matrix, grad):
    seen: list[int] = []

    def token_loss(logits: Tensor, chunk: slice) -> Tensor:
        assert len(logits) <= 3
        seen.extend(range(TOKENS)[chunk])
        return logits.sum(dim=1)

    with torch.set_grad_enabled(grad):
        chunked_sum(hidden, matrix, token_loss, 3)
    assert seen == list(range(TOKENS))


def test_chunked_sum_runs_under_autocast(hidden, matrix, token_loss):
    def in_chunks(h: Tensor, m: Tensor) -> Tensor:
        return chunked_sum(h, m, token_loss, 3)

    exact = with_gradients(in_chunks, hidden, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        near = with_gradients(in_chunks, hidden, matrix)
        with torch.no_grad():
            torch.testing.assert_close(in_chunks(hidden, matrix), near[0])
    assert {part.dtype for part in near} == {torch.float32}
    torch.testing.assert_close(near, exact, rtol=0.03, atol=0.03)
    assert not torch.equal(near[0], exact[0])  # the logits were bfloat16
