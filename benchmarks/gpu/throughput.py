"""Tokens a second and MFU of training a student of 99M parameters.

    python benchmarks/gpu/throughput.py OUTPUT.json [TEACHER]

The student is the demo's teacher with 20 of its 30 layers and random weights. The same model,
batches and TrainingArguments, each with and without torch.compile:

- trainer: transformers' own Trainer with the model's own loss;
- headstart: cross-entropy in chunks;
- headstart+kd: distillation from the teacher as well, in chunks.

Each has steps that are not timed first. MFU is over the GPU's dense half-precision peak, counting
the student's FLOPs and, with kd, the teacher's forward pass. The ratio is headstart's speed over
the Trainer's, both compiled or both not, whichever is lower.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from headstart.demo import DEMO, demo_teacher
from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.system.device import default_device, load_frozen, peak_flops
from headstart.system.files import write_json
from headstart.training.arguments import training_arguments
from headstart.training.settings import Arm
from headstart.training.teacher import Teacher
from headstart.training.trainer import DistillationTrainer

GOAL = 1.0
KINDS = ("trainer", "headstart", "headstart+kd")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes the time when the untimed steps are over, and at the end, with the device idle."""

    def __init__(self, untimed_steps: int) -> None:
        self.untimed_steps = untimed_steps
        self.started = self.ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.untimed_steps, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.started, self.ended = self.ended, time.perf_counter()


def measure(
    kind: str, compiled: bool, teacher_folder: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Train a fresh student for a while; tokens a second, MFU and peak memory."""
    torch.manual_seed(0)
    device = default_device()
    config = AutoConfig.from_pretrained(teacher_folder)
    config.num_hidden_layers, config.layer_types = given.layers, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    num_blocks = given.batch * (given.untimed + given.steps)
    blocks = torch.randint(config.vocab_size, (num_blocks, given.block))
    key = "labels" if kind == "trainer" else "input_ids"
    dataset = [dict.fromkeys(("input_ids", key), block) for block in blocks]
    tokens_per_step = given.batch * given.block
    flops_per_token = Architecture.of(config).count(given.block).training_flops_per_token
    clock = Clock(given.untimed)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "per_device_train_batch_size": given.batch,
            "torch_compile": compiled,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
        }
        arguments = training_arguments(
            settings, Arm(kind), Path(folder), given.untimed + given.steps
        )
        shared: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": dataset,
            "data_collator": default_data_collator,
            "callbacks": [clock],
        }
        if kind == "trainer":
            trainer = Trainer(**shared)
        else:
            teacher = None
            if kind == "headstart+kd":
                teacher = Teacher(load_frozen(teacher_folder, device))
                forward = Architecture.of(teacher.model.config).count(given.block)
                flops_per_token += forward.inference_flops_per_token
                if compiled:
                    teacher.compile()
            trainer = DistillationTrainer(
                **shared,
                teacher=teacher,
                distillation=DistillationSettings() if teacher else None,
                tokens_per_step=tokens_per_step,
                evaluation_steps=set(),
            )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
    rate = given.steps * tokens_per_step / (clock.ended - clock.started)
    peak = peak_flops(device)
    return {
        "kind": kind,
        "compiled": compiled,
        "parameters": model.num_parameters(),
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("teacher", nargs="?", default=DEMO)
    parser.add_argument("--batch", type=int, default=16, help="blocks in a step")
    parser.add_argument("--block", type=int, default=1024, help="tokens in a block")
    parser.add_argument("--untimed", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--layers", type=int, default=20, help="of the student")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    teacher = demo_teacher() if given.teacher == DEMO else Path(given.teacher)
    rows = []
    for compiled in (False,) if given.no_compile else (False, True):
        for kind in KINDS:
            rows.append(measure(kind, compiled, teacher, given))
            print(rows[-1], flush=True)
            torch.compiler.reset()
    rates = {(row["kind"], row["compiled"]): row["tokens_per_second"] for row in rows}
    ratio = min(
        rate / rates["trainer", compiled]
        for (kind, compiled), rate in rates.items()
        if kind == "headstart"
    )
    write_json(given.output, {"rows": rows, "ratio": ratio})
    print(f"ratio: {ratio:.2f}x (goal {GOAL:.2f}x)")


if __name__ == "__main__":
    sys.exit(main())
