"""Where models run, and in which precision."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def default_device() -> torch.device:
    """This process' GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Of one GPU in dense half-precision products, by a part of its name; from makers' data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """The most FLOPs a second that a device can do, or None where nobody has written it down."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def memory_bytes(device: torch.device) -> int | None:
    """All memory of a GPU; None of other devices, which share it with all else that runs."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on GPUs that have it, and on CPUs whose
    matrix instructions take it. Other CPUs emulate it several times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(instructions)


def release_memory() -> None:
    """Give back to the system what was freed; glibc keeps most of it, in pieces, for later."""
    with suppress(OSError, AttributeError, TypeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)


def load_frozen(folder: Path, device: torch.device, stays: bool = False) -> PreTrainedModel:
    """A model for inference only: eval mode, no gradients, bfloat16 where that is fast.

    A GPU gets one tensor after the other from the mapped files, so that the CPU's memory never
    holds all. On a CPU the parameters are the mapped files themselves where these have the
    precision already, and processes share them for as long as nobody writes to them.

    Args:
        folder: of its checkpoint.
        device: where it will run.
        stays: leave it in the CPU's memory, for the caller to move.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    place = None if stays or device.type == "cpu" else {"": device}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=place
    )
    return model.eval().requires_grad_(False)
