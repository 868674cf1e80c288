"""Mean loss against transformers' own, and when a curve reaches a target, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.losses.next_token import mean_loss, next_token_loss

BLOCKS = torch.randint(0, 128, (5, 12), generator=torch.Generator().manual_seed(0))


def test_mean_loss_is_the_models_own(teacher):
    with torch.no_grad():
        expected = float(teacher(BLOCKS, labels=BLOCKS).loss)
    for batch_size in (1, 2, 5, 8):
        done: list[int] = []
        assert mean_loss(teacher, BLOCKS, batch_size, done.append) == pytest.approx(expected, 1e-6)
        assert sum(done) == BLOCKS.numel()
        assert len(done) == math.ceil(5 / batch_size)


def test_next_token_loss_of_a_model_that_knows_nothing_is_log_vocab():
    hidden, matrix = torch.zeros(5, 12, 3), torch.randn(128, 3)
    total = next_token_loss(hidden, matrix, BLOCKS)
    assert float(total) == pytest.approx(5 * 11 * math.log(128))


def test_next_token_loss_pairs_a_position_with_the_token_after_it():
    """One-hot states read out the token that the oracle expects next."""
    blocks = torch.tensor([[4, 1, 3, 0], [2, 2, 1, 4]])
    knows_next = torch.nn.functional.one_hot(blocks.roll(-1, dims=1), 5).float()
    total = next_token_loss(100 * knows_next, torch.eye(5), blocks)
    assert float(total) == pytest.approx(0, abs=1e-6)
