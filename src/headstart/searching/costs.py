"""FLOPs of what a search does: the importance pass, and the scores of candidates."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from headstart.calibration.costs import refit_flops, teacher_pass_flops
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.count import inference_flops_per_token, layers_flops_per_token
from headstart.searching.settings import SearchSettings


def importance_flops(
    teacher: Architecture, kinds: Collection[str], num_tokens: int, context_length: int
) -> int:
    """Of `measure_importance` by some kinds, which share one pass over the text.

    Activations need the layers alone. A Taylor score needs the loss and a backward pass, which
    counts as two forward passes; norms of weights need no pass.
    """
    if "taylor" in kinds:
        forward = inference_flops_per_token(teacher.layouts, teacher.sizes, context_length)
        return int(3 * forward * num_tokens)
    if {"activation", "contribution", "block_influence"}.isdisjoint(kinds):
        return 0
    layers = layers_flops_per_token(teacher.layouts, teacher.sizes, context_length)
    return int(layers * num_tokens)


def fitness_flops_per_token(
    teacher: Architecture, sizes: Sizes, settings: SearchSettings, context_length: int
) -> Any:
    """Of scoring a candidate on one token; sizes may be arrays.

    Its distance from the teacher needs the teacher's logits too, from hidden states that are kept.
    """
    flops = inference_flops_per_token(teacher.layouts, sizes, context_length)
    if settings.fitness == "kl":
        flops = flops + 2 * teacher.sizes["vocab"] * teacher.sizes["embed"]
    return flops


def fitness_preparation_flops(
    teacher: Architecture,
    settings: SearchSettings,
    num_refit_blocks: int,
    num_tokens: int,
    context_length: int,
) -> int:
    """Of what all candidates share.

    That is the teacher's pass through the blocks that they are refitted on, if there are any, and
    its hidden states on the `num_tokens` that they are scored on, for a distance from it.
    """
    flops = 0
    if num_refit_blocks:
        flops += teacher_pass_flops(teacher, num_refit_blocks, context_length)
    if settings.fitness == "kl":
        per_token = layers_flops_per_token(teacher.layouts, teacher.sizes, context_length)
        flops += int(per_token * num_tokens)
    return flops


def candidate_cut_flops(
    teacher: Architecture, sizes: Sizes, num_refit_blocks: int, context_length: int
) -> int:
    """Of cutting a candidate out and refitting it once, which every rung does."""
    if not num_refit_blocks:
        return 0
    return refit_flops(teacher, sizes, num_refit_blocks, context_length)
