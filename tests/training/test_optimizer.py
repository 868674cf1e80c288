"""Each parameter is moved by its own optimizer, and the state survives a round trip."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from headstart.training.optimizer import muon_with_adamw

SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
BLOCKS = torch.arange(24).reshape(2, 12)


def take_step(model, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(BLOCKS, labels=BLOCKS).loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.fixture
def model(student_folder):
    return AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)


def test_steps_are_those_of_muon_and_adamw_on_their_own(model):
    other = copy.deepcopy(model)
    joined = muon_with_adamw(model, **SETTINGS)
    named = dict(other.named_parameters())
    outer = [name for name in named if "embed" in name or "lm_head" in name]
    hidden = [name for name in named if "proj" in name]
    vectors = [name for name in named if "norm" in name]
    assert {*outer, *hidden, *vectors} == set(named) and hidden and vectors
    muon = torch.optim.Muon(
        [named[name] for name in hidden], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = [
        torch.optim.AdamW(
            [named[name] for name in names], lr=1e-2, betas=(0.9, 0.95), weight_decay=decay
        )
        for names, decay in ((outer, 0.1), (vectors, 0.0))
    ]
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        take_step(model, joined)
        take_step(other, muon, *adamw)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameter, before[name])


def test_a_loaded_state_goes_on_where_it_was_saved(model):
    first = muon_with_adamw(model, **SETTINGS)
    take_step(model, first)
    resumed = copy.deepcopy(model)
    second = muon_with_adamw(resumed, **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):  # as a schedule does
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
    take_step(model, first)
    take_step(resumed, second)
    for parameter, other in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)


def test_torch_without_muon_is_told(model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"has no Muon: install torch 2\.9 or later"):
        muon_with_adamw(model, **SETTINGS)
