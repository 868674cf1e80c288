"""Results and searches whose numbers are set by hand."""

from __future__ import annotations

import copy
from typing import Any

from headstart.reports.table import FORMAT

Result = dict[str, Any]
Search = dict[str, Any]
HOSTILE = "<script>alert('&')</script>"


def make_arm(name: str, **changes: Any) -> Result:
    arm = {
        "name": name,
        "init": "subnet",
        "kd": None,
        "learning_rate": 1e-3,
        "parameters": 12_345_678,
        "tokens": 50_176,
        "loss_before": 9.1,
        "loss_final": 6.0,
        "tokens_to_match": 4_300.4,
        "tokens_factor": 50_176 / 4_300.4,
        "flops_to_match": 2.0e12,
        "flops_factor": 2.0,
        "loss_difference": -0.71,
        "is_bound": False,
        "standard_error": 0.021,
        "tokens_per_step": 512,
        "seconds": 95.0,
        "curve": [
            {"tokens": 0, "flops": 1e12, "loss": 9.1},
            {"tokens": 1_024, "flops": 1.1e12, "loss": 8.1},
            {"tokens": 50_176, "flops": 5e12, "loss": 6.0},
        ],
    }
    arm |= changes
    budget = {"tokens": arm["tokens"], "loss": arm["loss_final"], "spread": None}
    return {"budgets": [budget], "matches": [{}], **arm}


def never_matched(name: str, difference: float) -> Result:
    nothing = dict.fromkeys(
        ("tokens_to_match", "tokens_factor", "flops_to_match", "flops_factor"), None
    )
    return make_arm(name, loss_final=6.71 + difference, loss_difference=difference, **nothing)


def matched_before(name: str, loss_final: float = 5.9) -> Result:
    difference = loss_final - 6.71
    return make_arm(
        name,
        loss_before=6.5,
        loss_final=loss_final,
        tokens_to_match=0,
        tokens_factor=None,
        loss_difference=difference,
    )


SCRATCH_ARM = make_arm(
    "scratch",
    init="random",
    loss_before=10.83,
    loss_final=6.71,
    tokens_to_match=50_176,
    tokens_factor=1.0,
    flops_to_match=4e12,
    flops_factor=1.0,
    loss_difference=0.0,
    curve=[
        {"tokens": 0, "flops": 0.0, "loss": 10.83},
        {"tokens": 50_176, "flops": 4e12, "loss": 6.71},
    ],
)


def make_result(*arms: Result, target_loss: float | None = 6.71) -> Result:
    sizes = {"layers": 4, "embed": 64, "kv_groups": 3, "q_per_kv": 2, "head_dim": 16}
    sizes |= {"mlp": 256, "vocab": 1000}
    counts = {"parameters": 20_000_000, "non_embedding_parameters": 9_000_000}
    candidate = {"generation": 0, "origin": "sample", "parameters": 12_000_000, "loss": 9.4}
    candidate["sizes"] = {"layers": 2, "embed": 32, "kv_groups": 2, "mlp": 128}
    better = {**candidate, "generation": 1, "origin": "mutation", "loss": 9.1}
    return copy.deepcopy(
        {
            "format": FORMAT,
            "name": "demo",
            "created": "2026-11-23T19:00:00+00:00",
            "command": "headstart demo",
            "teacher": {"name": "org/teacher", "note": "", "loss": 3.4, "sizes": sizes, **counts},
            "student": {
                **counts,
                "sizes": {**sizes, "layers": 2, "embed": 32, "kv_groups": 2, "mlp": 128},
                "kept_layers": [0, 3],
                "training_flops_per_token": 7.4e7,
                "bin": [11_000_000, 13_000_000],
            },
            "budget": {
                "tokens": 50_176,
                "tokens_per_step": 512,
                "block_length": 128,
                "validation_tokens": 16_384,
                "test_tokens": 32_768,
            },
            "costs": {
                "calibration_flops": 4e11,
                "search_flops": 6e11,
                "search_tokens": 196_608,
                "search_seconds": 41.2,
                "teacher_flops_per_token": 2.7e8,
            },
            "reference": None if target_loss is None else "scratch",
            "compared_on": "validation",
            "target_loss": target_loss,
            "arms": list(arms),
            "search": {
                "space": "fine-uniform",
                "order": "importance",
                "candidates": [candidate, better],
                "winner": 1,
            },
            "recipe": {"train": {"learning_rate": 1e-3}},
            "environment": {"headstart": "0.1.0", "device": "cpu"},
        }
    )


SIZES = {"layers": 4, "embed": 64, "kv_groups": 4, "q_per_kv": 2, "head_dim": 16, "mlp": 256}


def make_candidate(generation: int, parameters: int, loss: float | None, **more: Any) -> Search:
    sizes = {"layers": 2, "embed": 32, "kv_groups": 2, "mlp": 128}
    found = {"generation": generation, "origin": "sample", "parameters": parameters, "loss": loss}
    return {**found, "sizes": sizes, **more}


def make_search(*candidates: Search, winner: int = 0, **more: Any) -> Search:
    found = {"space": "fine-uniform", "order": "activation", "bin": [1_000, 2_000]}
    found |= {"teacher": {"name": "org/teacher", "sizes": SIZES}, "candidates": list(candidates)}
    return copy.deepcopy({**found, "winner": winner, **more})


PLAIN = make_search(
    make_candidate(0, 1_100, 9.4), make_candidate(0, 1_900, 9.6), make_candidate(1, 1_500, 9.1)
)
RACED = make_search(
    make_candidate(0, 1_100, 8.0, tokens=256),
    make_candidate(0, 1_900, 9.6, tokens=1_024),
    make_candidate(1, 1_500, 9.1, tokens=1_024),
    make_candidate(1, 1_400, 7.0, tokens=512),
    winner=2,
)


def budgeted(name: str, init: str, losses: list[float], *factors: float | None) -> Result:
    """An arm with budgets of 1,000, 2,000, ... tokens, and how many times fewer tokens it needs;
    0 for what it had before training."""
    tokens = [1000 * 2**place for place in range(len(losses))]
    budgets = [
        {"tokens": at, "flops": 10.0 * at, "loss": loss, "spread": 0.01, "learning_rate": 2e-3}
        for at, loss in zip(tokens, losses, strict=True)
    ]
    matches = []
    for at, factor in zip(tokens, factors or [1.0] * len(losses), strict=True):
        match = {"tokens": at, "reference": "scratch", "target_loss": 5.0, "is_bound": factor == 2}
        match["tokens_to_match"] = factor and at / factor if factor != 0 else 0
        match |= {"tokens_factor": factor or None, "flops_factor": factor and factor / 2}
        matches.append(match)
    last = {key: matches[-1][key] for key in ("is_bound", "tokens_to_match", "tokens_factor")}
    more = {"tokens": tokens[-1], "init": init, "loss_final": losses[-1], "flops_factor": 1.5}
    return make_arm(name, budgets=budgets, matches=matches, **more, **last)
