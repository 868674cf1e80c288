"""The chunked sum of losses against the dense one, finite differences, and what it sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headstart.losses.chunked import chunked_sum
from headstart.losses.distillation import DistillationSettings, distillation_loss
from headstart.losses.next_token import cross_entropy

TOKENS, VOCAB, EMBED = 7, 11, 5
SETTINGS = DistillationSettings(alpha=0.3, beta=0.8, temperature=2.5)


@pytest.fixture
def teacher() -> Tensor:
    return 3 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def targets() -> Tensor:
    return torch.tensor([0, 10, 3, 3, 7, 1, 9])


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
        return chunked_sum(h, m, token_loss, tokens_per_chunk=tokens_per_chunk)

    dense = with_gradients(dense_sum, hidden, matrix)
    torch.testing.assert_close(
        with_gradients(in_chunks, hidden, matrix), dense, rtol=1e-6, atol=1e-6
    )
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(hidden, matrix), dense[0], rtol=1e-6, atol=1e-6)


def test_chunked_sum_agrees_with_finite_differences(hidden, matrix, token_loss):
    inputs = (hidden.double().requires_grad_(), matrix.double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, m: chunked_sum(h, m, token_loss, tokens_per_chunk=3), inputs
    )


@pytest.mark.parametrize("grad", [True, False])
def test_chunked_sum_sees_every_token_once_and_few_at_a_time(hidden, matrix, grad):
    seen: list[int] = []

    def token_loss(logits: Tensor, chunk: slice) -> Tensor:
        assert len(logits) <= 3
        seen.extend(range(TOKENS)[chunk])
        return logits.sum(dim=1)

    with torch.set_grad_enabled(grad):
        chunked_sum(hidden, matrix, token_loss, tokens_per_chunk=3)
    assert seen == list(range(TOKENS))


def test_many_chunks_of_a_bfloat16_matrix_add_up_as_in_float64():
    """Each chunk's gradient is rounded, but their sum is not: errors do not grow with chunks."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(256, EMBED, generator=generator).bfloat16()
    matrix = torch.randn(VOCAB, EMBED, generator=generator).bfloat16()
    targets = torch.randint(0, VOCAB, (256,), generator=generator)

    def gradient_of(hidden: Tensor, matrix: Tensor) -> Tensor:
        def token_loss(logits: Tensor, chunk: slice) -> Tensor:
            return cross_entropy(logits, targets[chunk])

        loss_of = lambda h, m: chunked_sum(h, m, token_loss, tokens_per_chunk=1)  # noqa: E731
        return with_gradients(loss_of, hidden, matrix)[2]

    exact = gradient_of(hidden.double(), matrix.double())
    found = gradient_of(hidden, matrix)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.005


def test_chunked_sum_runs_under_autocast(hidden, matrix, token_loss):
    def in_chunks(h: Tensor, m: Tensor) -> Tensor:
        return chunked_sum(h, m, token_loss, tokens_per_chunk=3)

    exact = with_gradients(in_chunks, hidden, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        near = with_gradients(in_chunks, hidden, matrix)
        with torch.no_grad():
            torch.testing.assert_close(in_chunks(hidden, matrix), near[0])
    assert {part.dtype for part in near} == {torch.float32}
    torch.testing.assert_close(near, exact, rtol=0.03, atol=0.03)
    assert not torch.equal(near[0], exact[0])  # the logits were bfloat16
