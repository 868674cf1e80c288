"""An independent count of floating point operations: torch's, over the calls that really happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten: Any = torch.ops.aten
Shape = Sequence[int]


def _attention(query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Queries times keys, and weights times values, of all pairs of tokens."""
    batch, heads, tokens, head_dim = query
    return 4 * batch * heads * tokens * key[2] * head_dim


def _attention_backward(_: Shape, query: Shape, key: Shape, *__: Any, **___: Any) -> int:
    """Twice the forward pass, as for any product; what is computed again is not counted."""
    return 2 * _attention(query, key)


def _added_product(total: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _cholesky(matrix: Shape, *_: Any, **__: Any) -> int:
    return matrix[-1] ** 3 // 3


def _cholesky_solve(right: Shape, factor: Shape, *_: Any, **__: Any) -> int:
    return 2 * factor[-1] ** 2 * right[-1]


def _eigenvectors(matrix: Shape, *_: Any, **__: Any) -> int:
    return 9 * matrix[-1] ** 3


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.addmm_: _added_product,
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_solve: _cholesky_solve,
    aten._linalg_eigh: _eigenvectors,
}
"""Of what torch's counter has no formula for."""


def counted_flops(call: Callable[[], Any]) -> int:
    """Of one call, without the tables of rotary angles, which are products of positions."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    counts = counter.get_flop_counts()
    total = sum(counts.get("Global", {}).values())
    angles = [of_module for name, of_module in counts.items() if name.endswith("rotary_emb")]
    return int(total - sum(sum(of_module.values()) for of_module in angles))
