"""Speed and memory of a distillation step, next to the same step through dense logits.

    python benchmarks/kd_step.py

A student of random weights and half the width and depth of the demo's teacher takes steps on 2,048
tokens with the teacher's 49,152 token vocabulary: both forward passes, the loss, and the gradients.
Only the loss differs:

- headstart: in chunks of tokens;
- whittle: the formula of whittle 0.6.0's `distill_model`, on dense logits of both models;
- trl: TRL's own `generalized_jsd_loss` (forward KL) with the same cross-entropy on dense logits, in
  an environment of its own, if that installs;
- trunk: the sum of the student's hidden states, which is what the models need without logits.

Each runs in a process of its own, whose peak resident memory is read, and rounds alternate, so that
other work on the machine slows all alike. Memory is what a step needs above the trunk's. The ratio
is the time of the fastest peer over headstart's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from headstart.demo import demo_teacher
from peers.environment import num_threads, trl_python

GOAL, MEMORY_GOAL = 1.0, 4.0
ROUNDS, STEPS = 3, 3
LOSS_TOLERANCE = 1e-3
WORKER = Path(__file__).parent / "peers" / "kd_worker.py"


def measure(python: str | Path, method: str, teacher: Path) -> dict[str, Any]:
    """Seconds of each step, the loss, and peak resident bytes of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(WORKER), method, str(teacher), str(STEPS)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        reason = (finished.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{method} failed: {reason}")
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def main() -> None:
    pythons: dict[str, str | Path] = dict.fromkeys(
        ("trunk", "headstart", "whittle"), sys.executable
    )
    try:
        pythons["trl"] = trl_python()
    except RuntimeError as error:
        print(f"without trl: {error}", file=sys.stderr)
    teacher, found = demo_teacher(), dict[str, list[dict[str, Any]]]()
    for _ in range(ROUNDS):
        for method, python in pythons.items():
            found.setdefault(method, []).append(measure(python, method, teacher))
    losses = {method: runs[0]["loss"] for method, runs in found.items() if method != "trunk"}
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
        raise RuntimeError(f"the losses differ ({losses}), so the steps are not the same work")

    seconds = {
        method: statistics.median(step for run in runs for step in run["seconds"])
        for method, runs in found.items()
    }
    peak = {method: min(run["peak_bytes"] for run in runs) for method, runs in found.items()}
    above = {method: peak[method] - peak["trunk"] for method in losses}
    print(f"{num_threads()} threads, {found['trunk'][0]['tokens']:,} tokens a step")
    print("           tokens/s  above trunk  loss")
    for method in losses:
        rate = found[method][0]["tokens"] / seconds[method]
        print(f"{method:9} {rate:9,.0f} {above[method] / 1e6:9,.0f} MB  {losses[method]:.5f}")
    peers = [method for method in losses if method != "headstart"]
    memory = min(above[peer] for peer in peers) / above["headstart"]
    print(f"memory: {memory:.1f} times less than the leanest peer (goal {MEMORY_GOAL:.0f})")
    ratio = min(seconds[peer] for peer in peers) / seconds["headstart"]
    print(f"ratio: {ratio:.2f}x (goal {GOAL:.2f}x)")
    if memory < MEMORY_GOAL:
        sys.exit("missed: memory")


if __name__ == "__main__":
    main()
