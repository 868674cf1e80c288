"""Losses against explicit probabilities in float64, hand cases, and finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.losses.distillation import (
    DistillationSettings,
    Divergence,
    distillation_loss,
    divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    sample,
    sampled_kl,
    summed_distillation_loss,
    symmetric_kl,
    top_k,
    top_k_kl,
)
from headstart.losses.next_token import cross_entropy

TOKENS, VOCAB = 7, 11
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


def kl(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    return (p * np.log(p / q)).sum(axis=1)


def test_cross_entropy_is_minus_the_log_of_the_targets_probability(student, targets):
    np.testing.assert_allclose(cross_entropy(student, targets), surprise(student, targets), 1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_is_the_sum_of_p_log_p_over_q(student, teacher, temperature):
    expected = kl(student, teacher, temperature)
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_reverse_kl_is_forward_kl_with_sides_exchanged(student, teacher, temperature):
    expected = kl(teacher, student, temperature)
    np.testing.assert_allclose(reverse_kl(student, teacher, temperature), expected, 1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_symmetric_kl_is_the_mean_of_both(student, teacher, temperature):
    expected = (kl(student, teacher, temperature) + kl(teacher, student, temperature)) / 2
    np.testing.assert_allclose(symmetric_kl(student, teacher, temperature), expected, 1e-12)


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_jensen_shannon_measures_both_against_their_mixture(student, teacher, temperature, mixture):
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    middle = mixture * p + (1 - mixture) * q
    expected = mixture * (p * np.log(p / middle)).sum(axis=1)
    expected += (1 - mixture) * (q * np.log(q / middle)).sum(axis=1)
    found = jensen_shannon(student, teacher, temperature, mixture)
    np.testing.assert_allclose(found, expected, 1e-10)
    bound = -mixture * np.log(mixture) - (1 - mixture) * np.log(1 - mixture)
    assert (found.numpy() < bound).all()


def test_jensen_shannon_of_sides_without_overlap_is_the_entropy_of_the_mixture():
    student, teacher = torch.tensor([[60.0, -60.0]]), torch.tensor([[-60.0, 60.0]])
    expected = -0.2 * np.log(0.2) - 0.8 * np.log(0.8)
    assert float(jensen_shannon(student, teacher, 1.0, 0.2)) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_kl_puts_all_others_in_one_bucket(student, teacher, count, temperature):
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    expected = []
    for ours, theirs in zip(q, p, strict=True):
        kept = np.argsort(-theirs)[:count]
        buckets = [np.append(side[kept], 1 - side[kept].sum()) for side in (theirs, ours)]
        expected.append((buckets[0] * np.log(buckets[0] / buckets[1])).sum())
    found = top_k_kl(student, top_k(teacher, count, temperature), temperature)
    np.testing.assert_allclose(found, expected, 1e-9)
    whole = kl(student, teacher, temperature)
    np.testing.assert_array_less(found, whole + (1e-9 if count == VOCAB - 1 else 0))


@pytest.mark.parametrize("count", [VOCAB, VOCAB + 5])
def test_top_k_of_the_whole_vocabulary_is_forward_kl(student, teacher, count):
    student.requires_grad_()
    kept, whole = (
        top_k_kl(student, top_k(teacher, count, 2.0), 2.0),
        forward_kl(student, teacher, 2.0),
    )
    torch.testing.assert_close(kept, whole, rtol=1e-12, atol=0)
    of_kept, of_whole = (torch.autograd.grad(loss.sum(), student)[0] for loss in (kept, whole))
    torch.testing.assert_close(of_kept, of_whole)


@pytest.mark.parametrize("sampling_temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sampled_kl_is_unbiased(student, teacher, temperature, sampling_temperature):
    """The mean over many draws lies within five standard errors, of the value and each gradient."""
    torch.manual_seed(0)
    num_draws, teacher = 20_000, teacher / 3  # flat enough for every token to be drawn at times
    student.requires_grad_()
    drawn = sample(teacher.repeat(num_draws, 1), 5, temperature, sampling_temperature)
    assert drawn.ids.shape == drawn.weights.shape == (num_draws * TOKENS, 5)
    copies = student.detach().repeat(num_draws, 1).requires_grad_()
    losses = sampled_kl(copies, drawn, temperature)
    (gradients,) = torch.autograd.grad(losses.sum(), copies)
    whole = forward_kl(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(whole.sum(), student)
    for draws, expected in ((losses, whole), (gradients, gradient)):
        found = draws.detach().view(num_draws, *expected.shape)
        error = found.std(dim=0) / num_draws**0.5
        assert ((found.mean(dim=0) - expected).abs() <= 5 * error + 1e-9).all()
        assert (error < 0.05).all()


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_settings_choose_the_divergence(student, teacher, kind):
    settings = DistillationSettings(temperature=2.0, divergence=kind, mixture=0.3)
    expected = {
        "forward_kl": kl(student, teacher, 2.0),
        "reverse_kl": kl(teacher, student, 2.0),
        "symmetric_kl": (kl(student, teacher, 2.0) + kl(teacher, student, 2.0)) / 2,
        "jensen_shannon": jensen_shannon(student, teacher, 2.0, 0.3),
    }
    np.testing.assert_allclose(divergence(student, teacher, settings), expected[kind], 1e-10)


def test_settings_choose_top_k_and_samples(student, teacher):
    kept = divergence(student, teacher, DistillationSettings(temperature=2.0, top_k=3))
    torch.testing.assert_close(kept, top_k_kl(student, top_k(teacher, 3, 2.0), 2.0))
    torch.manual_seed(5)
    settings = DistillationSettings(temperature=2.0, samples=4, sampling_temperature=1.5)
    drawn = divergence(student, teacher, settings)
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, sampled_kl(student, sample(teacher, 4, 2.0, 1.5), 2.0))


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_divergences_from_oneself_and_their_gradients_are_zero(student, kind):
    shifted = student + torch.randn(TOKENS, 1)
    student.requires_grad_()
    loss = divergence(student, shifted, DistillationSettings(divergence=kind))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss.detach(), torch.zeros(TOKENS).double())
    torch.testing.assert_close(gradient, torch.zeros(TOKENS, VOCAB).double())


SCHEDULES = {
    "constant": [(0.3, 0.8)] * 4,
    "linear": [(0.3, 0.8), (0.45, 0.6), (0.9, 0.0), (0.9, 0.0)],
    "switch": [(0.3, 0.8), (0.3, 0.8), (0.9, 0.0), (0.9, 0.0)],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_follow_the_schedule(student, teacher, targets, schedule):
    ends = {"alpha_end": 0.9, "beta_end": 0.0, "schedule_tokens": 100}
    more = {} if schedule == "constant" else {"schedule": schedule, **ends}
    settings = DistillationSettings(alpha=0.3, beta=0.8, temperature=2.5, **more)
    hard, soft = surprise(student, targets), kl(student, teacher, 2.5)
    for tokens, (alpha, beta) in zip((0, 25, 100, 1000), SCHEDULES[schedule], strict=True):
        assert settings.weights(tokens) == pytest.approx((alpha, beta))
        loss = distillation_loss(student, targets, teacher, settings, tokens)
        np.testing.assert_allclose(loss, alpha * hard + beta * 2.5**2 * soft, 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("beta", "beta_end"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.0, 0.0)])
def test_teacher_tokens_are_those_with_a_weight(schedule, beta, beta_end):
    more = {"schedule": schedule, "schedule_tokens": 40, "beta_end": beta_end}
    more = {} if schedule == "constant" else more
    settings = DistillationSettings(beta=beta, **more)
    for tokens in (0, 10, 40, 90):
        # A linear schedule that starts from 0 has no weight at the very first token alone.
        num_asked = sum(settings.weights(token)[1] > 0 for token in range(tokens))
        assert settings.teacher_tokens(tokens) - num_asked in (
            0,
            int(schedule == "linear" and not beta),
        )


def test_distillation_loss_is_the_weighted_sum(student, teacher, targets):
    hard, soft = surprise(student, targets), kl(student, teacher, 2.5)
    loss = distillation_loss(student, targets, teacher, SETTINGS)
    np.testing.assert_allclose(loss, 0.3 * hard + 0.8 * 2.5**2 * soft, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [9, 11, 14])
def test_sides_of_other_heights_are_compared_on_their_shared_rows(
    student, teacher, targets, rows, temperature
):
    """By hand in float64, value and gradient: cross-entropy over all of the student's rows, KL over
    the first nine of both, each scaled to sum to one."""
    shared = 9
    targets = targets.clamp(max=shared - 1)
    padding = 20 * torch.ones(TOKENS, max(0, rows - VOCAB)).double()
    wide = torch.cat([teacher[:, :rows], padding], dim=1)
    settings = DistillationSettings(alpha=0.3, beta=0.8, temperature=temperature)
    p, q = (
        probabilities(wide[:, :shared], temperature),
        probabilities(student[:, :shared], temperature),
    )
    expected = 0.3 * surprise(student, targets)
    expected += 0.8 * temperature**2 * (p * np.log(p / q)).sum(axis=1)
    gradient = 0.3 * (probabilities(student) - np.eye(VOCAB)[targets])
    gradient[:, :shared] += 0.8 * temperature * (q - p)

    student.requires_grad_()
    loss = distillation_loss(student, targets, wide, settings, shared_rows=shared)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(student.grad, gradient, atol=1e-12)
    # The trainer's way to the same: hidden states and a matrix, and what a cache keeps.
    matrix = torch.eye(VOCAB).double()
    kept = top_k(wide[:, :shared], shared, temperature)
    for outputs, told in (
        (lambda chunk: wide[chunk], settings),
        (lambda chunk: type(kept)(*(values[chunk] for values in kept)), replace(settings, top_k=9)),
    ):
        hidden = student.detach().clone().requires_grad_()
        total = summed_distillation_loss(hidden, matrix, targets, outputs, told, shared_rows=shared)
        total.backward()
        np.testing.assert_allclose(total.detach(), expected.sum(), rtol=1e-12)
        np.testing.assert_allclose(hidden.grad, gradient, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_rows_that_are_not_shared_play_no_part(student, teacher, targets, kind):
    settings = DistillationSettings(alpha=0.0, beta=1.0, divergence=kind)
    expected = distillation_loss(student[:, :9], targets % 9, teacher[:, :9], settings)
    found = distillation_loss(student, targets % 9, teacher, settings, shared_rows=9)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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
    for kind in get_args(Divergence):
        settings = DistillationSettings(temperature=2.5, divergence=kind, mixture=0.3)
        assert torch.autograd.gradcheck(
            lambda s, t: divergence(s, t, settings),  # noqa: B023
            (student, teacher),
        )
    kept, drawn = top_k(teacher.detach(), 4, 2.5), sample(teacher.detach(), 4, 2.5)
    assert torch.autograd.gradcheck(lambda s: top_k_kl(s, kept, 2.5), student)
    assert torch.autograd.gradcheck(lambda s: sampled_kl(s, drawn, 2.5), student)


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
        ({"sampling_temperature": 0.0}, r"kd\.sampling_temperature is 0\.0; it must be above 0"),
        ({"mixture": 1.0}, r"kd\.mixture is 1\.0; it must lie between 0 and 1"),
        ({"top_k": -1}, r"kd\.top_k is -1; it may not be negative"),
        ({"top_k": 5, "samples": 5}, r"kd\.top_k 5 and kd\.samples 5 are both set; keep one"),
        ({"top_k": 5, "divergence": "reverse_kl"}, "reverse_kl needs all of the teacher's"),
        ({"schedule": "linear"}, "linear and switch need a number of tokens"),
        ({"schedule_tokens": 5}, "constant takes none"),
        ({"alpha_end": 0.0}, r"kd\.alpha_end 0\.0 and kd\.beta_end 0\.0 may not be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        DistillationSettings(**settings)
