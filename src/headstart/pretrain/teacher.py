"""The teacher that a student learns from while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on GPUs that have it, and on CPUs whose
    matrix instructions take it. Other CPUs emulate it several times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(instructions)


def load_frozen(folder: Path, device: torch.device) -> PreTrainedModel:
    """A model for inference only: eval mode, no gradients, bfloat16 where that is fast."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose logits are asked for one chunk of tokens at a time."""

    model: PreTrainedModel

    @torch.no_grad()
    def hidden(self, blocks: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens embed"]:
        """Final hidden states of a batch."""
        hidden: Tensor = self.model.base_model(blocks, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "chunk embed"]) -> Float[Tensor, "chunk vocab"]:
        """Logits of some of those hidden states."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits
