"""The teacher's two halves make its logits, without gradients."""

from __future__ import annotations

import torch

from headstart.text.blocks import document_positions
from headstart.training.teacher import Teacher

BLOCKS = torch.arange(24).reshape(2, 12)


def test_hidden_and_logits_make_the_models_own_logits(teacher):
    online = Teacher(teacher)
    hidden = online.hidden(BLOCKS)
    chunks = [online.logits(hidden.flatten(0, 1)[start : start + 5]) for start in range(0, 24, 5)]
    with torch.no_grad():
        expected = teacher(BLOCKS).logits.flatten(0, 1)
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-5, atol=1e-5)
    assert not hidden.requires_grad and not chunks[0].requires_grad


def test_last_hidden_state_of_the_whole_model_is_the_base_models(teacher):
    """The trainer takes the one, evaluation and the teacher the other."""
    with torch.no_grad():
        whole = teacher(BLOCKS, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        base = teacher.base_model(BLOCKS, use_cache=False).last_hidden_state
    torch.testing.assert_close(whole.hidden_states[-1], base, rtol=0, atol=0)
    assert whole.logits.shape[1] == 1


def test_documents_apart_are_what_they_would_be_alone(teacher):
    """Also where they begin in the middle of a block."""
    separator = 7
    block = torch.tensor([[3, 9, 20, separator, 41, 5, separator, 8, 33, 2]])
    hidden = Teacher(teacher).hidden(block, document_positions(block, separator))
    for start, end in ((0, 4), (4, 7), (7, 10)):
        alone = Teacher(teacher).hidden(block[:, start:end])
        torch.testing.assert_close(hidden[:, start:end], alone, rtol=1e-5, atol=1e-5)
    joined = Teacher(teacher).hidden(block)
    assert (joined[:, 4:] - hidden[:, 4:]).abs().max() > 1e-3
