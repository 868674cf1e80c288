"""How often a distillation loss starts kernels and passes over logits.

    python benchmarks/loss_passes.py

Counts a microbatch of 16,384 tokens with a vocabulary of 49,152, forward and backward, from final
hidden states to the gradients of these and of the output matrix. Nothing is computed: operations
are counted on tensors without numbers, in bfloat16 as a GPU would have them. A launch is an
operation that is no view. A pass reads or writes as many bytes as the float32 logits have.

- autograd: cross-entropy and divergence each by its formula, in chunks for a CPU's caches;
- closed form: what headstart runs, in chunks for a GPU;
- compiled: the same, with what torch.compile makes of a chunk's arithmetic, counted on this CPU.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headstart.losses.chunked import CHUNK_BYTES, chunked_sum
from headstart.losses.distillation import DistillationSettings, distillation_loss
from headstart.losses.gradients import distillation_and_gradient

TOKENS, VOCAB, EMBED, TEACHER_EMBED = 16_384, 49_152, 288, 576
GOAL = 3.0
COMPILED_TOKENS = 64
"""In the chunk that is compiled for its kernels to be counted."""


@dataclass
class Counter(TorchDispatchMode):
    """Launches and bytes of all operations that run inside of it."""

    launches: int = 0
    num_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.launches += 1
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def logits_of(tokens: int, embed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and an output matrix, without numbers."""
    hidden = torch.empty(tokens, embed, dtype=torch.bfloat16, device="meta")
    return hidden, torch.empty(VOCAB, embed, dtype=torch.bfloat16, device="meta")


def count(chunk_bytes: int, is_closed: bool, skips_arithmetic: bool = False) -> Counter:
    """Count a microbatch, with the chunks' arithmetic or all but it."""
    hidden, matrix = (part.requires_grad_() for part in logits_of(TOKENS, EMBED))
    teacher_hidden, teacher_matrix = logits_of(TOKENS, TEACHER_EMBED)
    targets = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    settings = DistillationSettings()

    def token_loss(logits: Tensor, chunk: slice) -> Tensor:
        teacher = torch.nn.functional.linear(teacher_hidden[chunk], teacher_matrix)
        return distillation_loss(logits, targets[chunk], teacher, settings)

    def loss_and_gradient(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        teacher = torch.nn.functional.linear(teacher_hidden[chunk], teacher_matrix)
        if skips_arithmetic:
            return torch.empty(len(logits), device="meta"), torch.empty_like(logits)
        hard, soft, gradient = distillation_and_gradient(
            logits, targets[chunk], teacher, settings.alpha, settings.beta, settings.temperature
        )
        return settings.alpha * hard + settings.beta * soft, gradient

    with Counter() as counter:
        chunked_sum(
            hidden,
            matrix,
            token_loss,
            loss_and_gradient if is_closed else None,
            tokens_per_chunk=chunk_bytes // (4 * VOCAB),
        ).backward()
    return counter


def count_compiled() -> Counter:
    """Kernels and bytes of a small chunk's arithmetic, as torch.compile writes it."""
    metrics.reset()
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # or bytes are not counted
    compile_fx.inductor_metrics_log.propagate = False
    student, teacher = torch.randn(2, COMPILED_TOKENS, VOCAB).bfloat16()
    targets = torch.zeros(COMPILED_TOKENS, dtype=torch.int64)
    with inductor_config.patch(force_disable_caches=True):
        torch.compile(distillation_and_gradient)(student, targets, teacher, 0.5, 0.5, 1.0)
    return Counter(metrics.generated_kernel_count, metrics.num_bytes_accessed)


def main() -> None:
    found = {
        "autograd": count(CHUNK_BYTES["cpu"], is_closed=False),
        "closed form": count(CHUNK_BYTES["cuda"], is_closed=True),
    }
    rest = count(CHUNK_BYTES["cuda"], is_closed=True, skips_arithmetic=True)
    chunk, num_chunks = count_compiled(), -(-TOKENS // (CHUNK_BYTES["cuda"] // (4 * VOCAB)))
    found["compiled"] = Counter(
        rest.launches + num_chunks * chunk.launches,
        rest.num_bytes + chunk.num_bytes * TOKENS // COMPILED_TOKENS,
    )
    print("             launches  passes over logits")
    for name, counter in found.items():
        print(f"{name:12} {counter.launches:8,}  {counter.num_bytes / (4 * TOKENS * VOCAB):10.1f}")
    before, after = found["autograd"], found["compiled"]
    launches = before.launches / after.launches
    passes = before.num_bytes / after.num_bytes
    print(f"launches: {launches:.1f} times fewer (goal {GOAL:.0f})")
    print(f"ratio: {passes:.2f}x fewer passes (goal {GOAL:.2f}x)")
    if min(launches, passes) < GOAL:
        sys.exit("missed")


if __name__ == "__main__":
    main()
