"""Does a run that is killed again and again end where one that was not ends?

    python benchmarks/resume.py

A small student distils from a small teacher on the demo's text, in one process and in two under
torchrun. SIGKILL falls shortly after each of 20 random steps, once in each start, and the same
command goes on. The ratio is the share of weights that are bit for bit those of the uninterrupted
run.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from headstart.demo import demo_teacher
from headstart.losses.distillation import DistillationSettings
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import load_recipe
from headstart.system.distributed import process_group
from headstart.system.files import shipped
from headstart.text.prepare import prepare
from headstart.training import trainer
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.settings import Arm, PretrainSettings

GOAL = 1.0
NUM_KILLS, NUM_STEPS = 20, 60
BLOCK_LENGTH, BATCH_BLOCKS = 64, 4
MAX_DELAY_SECONDS = 0.1
ARM = Arm("distilled", kd=DistillationSettings(temperature=2.0))
LAUNCHERS = {
    1: [sys.executable],
    2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def work(call: Path) -> None:
    """Train as a pickle says, and die a moment after a step, if it names one."""
    inputs, folder, kill_after, delay_seconds = pickle.loads(call.read_bytes())

    def die() -> None:
        time.sleep(delay_seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if kill_after is not None and state.global_step >= kill_after:
            threading.Thread(target=die).start()

    trainer.ReportStep.on_step_end = watch  # type: ignore[method-assign]
    with process_group():
        run_arm(ARM, inputs, folder)


def start(processes: int, scratch: Path, *call: Any) -> bool:
    """Whether the run came to its end."""
    pickled = scratch / "call.pickle"
    pickled.write_bytes(pickle.dumps(call))
    command = [*LAUNCHERS[processes], str(Path(__file__)), str(pickled)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, env=environment, capture_output=True, check=False)
    return finished.returncode == 0


def small_model(folder: Path, layers: int, seed: int) -> Checkpoint:
    tokenizer = AutoTokenizer.from_pretrained(demo_teacher())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder)


def main() -> None:
    data = replace(load_recipe(shipped("demo.yaml")).data, block_length=BLOCK_LENGTH)
    blocks = prepare(data, demo_teacher())
    equal, total = 0, 0
    print("processes  starts  killed  weights that are equal")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        student = small_model(scratch / "student", 2, 0)
        teacher = small_model(scratch / "teacher", 3, 1)
        for processes in LAUNCHERS:
            tokens = NUM_STEPS * BATCH_BLOCKS * BLOCK_LENGTH
            settings = PretrainSettings(tokens=tokens, validation_tokens=512, evaluations=4)
            batch = {"per_device_train_batch_size": BATCH_BLOCKS // processes, "use_cpu": True}
            train = {**batch, "save_steps": 1 / 20, "bf16": False}
            inputs = ArmInputs(student, teacher, blocks, settings, train)
            whole, killed = scratch / f"whole-{processes}", scratch / f"killed-{processes}"
            if not start(processes, scratch, inputs, whole, None, 0.0):
                raise RuntimeError("the uninterrupted run failed")
            rng = random.Random(processes)
            num_killed = 0
            for step in sorted(rng.sample(range(1, NUM_STEPS), NUM_KILLS)):
                delay_seconds = rng.uniform(0, MAX_DELAY_SECONDS)
                num_killed += not start(processes, scratch, inputs, killed, step, delay_seconds)
            if not start(processes, scratch, inputs, killed, None, 0.0):
                raise RuntimeError("the run did not go on after it was killed")
            ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (killed, whole))
            same = sum(int((ours[name] == theirs[name]).sum()) for name in theirs)
            count = sum(one.numel() for one in theirs.values())
            print(
                f"{processes:9} {NUM_KILLS + 1:7} {num_killed:7}  {same:,} of {count:,}", flush=True
            )
            equal, total = equal + same, total + count
    print(f"ratio: {equal / total:.6f}x (goal {GOAL:.6f}x)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
    else:
        main()
