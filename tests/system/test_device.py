"""Models run in the precision that is fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import is_mapped
from transformers import PreTrainedModel

from headstart.system import device as module
from headstart.system.device import has_fast_bf16, load_frozen


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_load_frozen(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
):
    monkeypatch.setattr(module, "has_fast_bf16", lambda device: fast)
    model = load_frozen(teacher_folder, torch.device("cpu"))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("written", "shared"), [("float32", True), ("bfloat16", False)])
def test_a_cpu_reads_the_files_themselves_in_their_own_precision(
    teacher: PreTrainedModel, tmp_path: Path, written: str, shared: bool
) -> None:
    """So that the processes of a machine have the weights in memory once."""
    teacher.to(getattr(torch, written)).save_pretrained(tmp_path)
    model = load_frozen(tmp_path, torch.device("cpu"))
    assert {is_mapped(weight, tmp_path) for weight in model.parameters()} == {shared}


@pytest.mark.parametrize("stays", [False, True])
def test_another_device_gets_tensor_by_tensor(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    monkeypatch.setattr(PreTrainedModel, "to", None)  # which would move a whole model
    model = load_frozen(teacher_folder, torch.device("meta"), stays=stays)
    assert {weight.device.type for weight in model.parameters()} == {"cpu" if stays else "meta"}
    assert not any(weight.requires_grad for weight in model.parameters())


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
