"""The teacher that a student learns from while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose logits are asked for one chunk of tokens at a time."""

    model: PreTrainedModel

    @torch.no_grad()
    def hidden(
        self,
        blocks: Int[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens embed"]:
        """Final hidden states of a batch; positions that begin anew begin a new document."""
        outputs = self.model.base_model(blocks, position_ids=positions, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "chunk embed"]) -> Float[Tensor, "chunk vocab"]:
        """Logits of some of those hidden states."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits
