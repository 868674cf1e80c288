"""One way to take a distillation step, timed: `python kd_worker.py METHOD TEACHER STEPS`.

METHOD is "trunk", "headstart", "whittle" or "trl"; headstart is imported for its own alone, and TRL
likewise, so that each runs in the environment that has it. The last line of stdout is JSON.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return"

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

BLOCKS, BLOCK_TOKENS = 4, 512
ALPHA, BETA, TEMPERATURE = 0.5, 0.5, 2.0
Loss = Callable[[Tensor, Any, Tensor, Any, Tensor], Tensor]
"""(student's hidden states, its output layer, the teacher's, its output layer, targets) -> mean."""


def trunk(hidden: Tensor, head: Any, teacher_hidden: Tensor, teacher: Any, targets: Tensor) -> Any:
    return hidden.sum()


def headstart(
    hidden: Tensor, head: Any, teacher_hidden: Tensor, teacher: Any, targets: Tensor
) -> Tensor:
    from headstart.losses.distillation import DistillationSettings, summed_distillation_loss

    @torch.no_grad()
    def teacher_logits(chunk: slice) -> Tensor:
        return teacher(teacher_hidden[chunk])

    settings = DistillationSettings(ALPHA, BETA, TEMPERATURE)
    loss = summed_distillation_loss(hidden, head.weight, targets, teacher_logits, settings)
    return loss / len(targets)


def whittle(
    hidden: Tensor, head: Any, teacher_hidden: Tensor, teacher: Any, targets: Tensor
) -> Tensor:
    logits = head(hidden)
    with torch.no_grad():
        teacher_logits = teacher(teacher_hidden)
    hard = functional.cross_entropy(logits, targets)
    student = functional.log_softmax(logits / TEMPERATURE, dim=-1)
    wanted = functional.softmax(teacher_logits / TEMPERATURE, dim=-1)
    soft = functional.kl_div(student, wanted, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * hard + BETA * soft


def trl(hidden: Tensor, head: Any, teacher_hidden: Tensor, teacher: Any, targets: Tensor) -> Tensor:
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer

    logits = head(hidden)
    with torch.no_grad():
        teacher_logits = teacher(teacher_hidden)
    hard = functional.cross_entropy(logits, targets)
    # It divides by the positions that are not masked.
    soft = GKDTrainer.generalized_jsd_loss(
        logits[None], teacher_logits[None], targets[None], beta=0.0, temperature=TEMPERATURE
    )
    return ALPHA * hard + BETA * TEMPERATURE**2 * soft


def main() -> None:
    method, folder, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    losses: dict[str, Loss] = {
        "trunk": trunk,
        "headstart": headstart,
        "whittle": whittle,
        "trl": trl,
    }
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 320, 768
    config.num_attention_heads, config.num_key_value_heads = 5, 5
    config.num_hidden_layers, config.layer_types = 15, None
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.randint(config.vocab_size, (BLOCKS, BLOCK_TOKENS + 1))
    targets = tokens[:, 1:].flatten()
    seconds, value = [], 0.0
    for _ in range(steps + 1):  # the first one warms up
        start = time.perf_counter()
        with torch.no_grad():
            teacher_hidden = teacher.base_model(tokens[:, :-1], use_cache=False).last_hidden_state
        hidden = student.base_model(tokens[:, :-1], use_cache=False).last_hidden_state
        loss = losses[method](
            hidden.flatten(0, 1),
            student.get_output_embeddings(),
            teacher_hidden.flatten(0, 1),
            teacher.get_output_embeddings(),
            targets,
        )
        loss.backward()
        value = float(loss)
        student.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {
        "seconds": seconds[1:],
        "loss": value,
        "tokens": len(targets),
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
