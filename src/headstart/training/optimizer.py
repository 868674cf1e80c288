"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from headstart.system.errors import UserError


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, that step as one.

    Args:
        parts: each made already. Their parameter groups are this one's, so that a scheduler sets
            the learning rates of all.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def muon_with_adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> JoinedOptimizer:
    """Muon for every matrix but embedding and output matrix, and AdamW for these and for vectors.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate and weight decay
    serve both; betas and epsilon are AdamW's. Vectors do not decay. Source: "Muon is Scalable for
    LLM Training" (arXiv 2502.16982), section 2.2.

    Raises:
        UserError: this version of torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or leave out "
            "the arm's optimizer"
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    end_parameters = {id(parameter) for end in ends for parameter in end.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trained if parameter.ndim != 2]
    matrices = [parameter for parameter in trained if parameter.ndim == 2]
    hidden = [matrix for matrix in matrices if id(matrix) not in end_parameters]
    outer = [matrix for matrix in matrices if id(matrix) in end_parameters]
    muon = torch.optim.Muon(
        hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": outer, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return JoinedOptimizer(
        [muon, torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)]
    )
