"""The teacher's two halves make its logits, without gradients, in the precision that is fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headstart.pretrain import teacher as module
from headstart.pretrain.teacher import Teacher, has_fast_bf16, load_frozen

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


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_load_frozen(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
):
    monkeypatch.setattr(module, "has_fast_bf16", lambda device: fast)
    model = load_frozen(teacher_folder, torch.device("cpu"))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("device", "supported", "fast"),
    [
        ("cpu", (), False),
        ("cpu", ("avx512",), True),
        ("cpu", ("amx",), True),
        ("cpu", ("cuda",), False),
        ("cuda", ("cuda",), True),
        ("cuda", ("avx512", "amx"), False),
        ("mps", ("avx512", "amx", "cuda"), False),
    ],
)
def test_bf16_is_fast_only_in_hardware(monkeypatch, device, supported, fast):
    def cuda(including_emulation: bool = True) -> bool:
        return including_emulation or "cuda" in supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", cuda)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in supported)
    assert has_fast_bf16(torch.device(device)) is fast
