"""Several budgets in one run: a trunk at a constant learning rate, and a branch for each budget.

A run's last loss depends on how its learning rate falls, so a curve says little of what a shorter
run would have ended with. The trunk is the run of the largest budget. Where the rate of a smaller
budget would begin to fall, its checkpoint is kept, and the branch goes on from there.

Source: Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"
(arXiv 2405.18392).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from headstart.system.distributed import is_main
from headstart.system.errors import UserError
from headstart.system.files import finished_folder, write_json
from headstart.training.settings import PretrainSettings

SCHEDULE_KEYS = ("lr_scheduler_type", "lr_scheduler_kwargs")
"""Of `train:`, which several budgets set themselves."""


@dataclass(frozen=True)
class Budget:
    """One budget in optimizer steps.

    Attributes:
        num_steps: of the whole run.
        warmup_steps: over which the rate rises.
        decay_steps: at the end, over which the rate falls to zero; 0 for the schedule of `train:`,
            which a single budget of `pretrain.tokens` has.
    """

    num_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0

    @property
    def branch_step(self) -> int:
        """The step after which the rate falls."""
        return self.num_steps - self.decay_steps

    def schedule(self) -> dict[str, Any]:
        """What TrainingArguments are told of it."""
        if not self.decay_steps:
            return {}
        decay = {"num_decay_steps": self.decay_steps, "decay_type": "1-sqrt"}
        return {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": decay,
            "warmup_steps": self.warmup_steps,
        }


def budgets_of(
    settings: PretrainSettings, step_tokens: int, warmup_steps: float, train: Mapping[str, Any]
) -> list[Budget]:
    """Every budget in steps, ascending.

    Args:
        settings: with the budgets in tokens.
        step_tokens: that one step sees.
        warmup_steps: of `train:`; below 1 a share, which is then of the smallest budget.
        train: what the user has set of TrainingArguments.

    Raises:
        UserError: two budgets are as many steps, one is too short for its warm-up, or `train:` has
            a schedule of its own.
    """
    steps = [math.ceil(tokens / step_tokens) for tokens in settings.budget_tokens]
    if not settings.budgets:
        return [Budget(steps[0])]
    for key in SCHEDULE_KEYS:
        if key in train:
            raise UserError(
                f"train.{key} is set, and with pretrain.budgets the rate is constant until "
                "it falls to zero; leave it out"
            )
    if len(set(steps)) < len(steps):
        raise UserError(
            f"pretrain.budgets {list(settings.budgets)} are {steps} steps of {step_tokens:,} "
            "tokens; leave out those that are as long as another"
        )
    warmup = math.ceil(warmup_steps * steps[0]) if warmup_steps < 1 else int(warmup_steps)
    budgets = [Budget(count, warmup, math.ceil(settings.decay * count)) for count in steps]
    if budgets[0].branch_step <= warmup:
        raise UserError(
            f"pretrain.budgets has one of {steps[0]} steps, of which {warmup} warm up and "
            f"{budgets[0].decay_steps} are for the rate to fall; lower train.warmup_steps, or "
            "leave that budget out"
        )
    return budgets


class KeepBranches(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint where a branch begins, and keeps it for the branch.

    Args:
        branches: the folder and the budget of each branch.
    """

    def __init__(self, branches: Mapping[Path, Budget]) -> None:
        self.branches = {budget.branch_step: folder for folder, budget in branches.items()}
        self.budgets = branches

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step in self.branches

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self.branches.get(state.global_step)
        if folder is not None and is_main():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            begin_branch(checkpoint, folder, self.budgets[folder])


def begin_branch(checkpoint: Path, folder: Path, budget: Budget) -> None:
    """Put a trunk's checkpoint where the run of a smaller budget goes on from it, unless it is
    there or that run is done."""
    if folder.is_dir():
        return
    with finished_folder(folder) as unfinished:
        begun = unfinished / checkpoint.name
        shutil.copytree(checkpoint, begun, copy_function=_link_or_copy)
        state = json.loads((begun / "trainer_state.json").read_text())
        write_json(begun / "trainer_state.json", {**state, "max_steps": budget.num_steps})


def _link_or_copy(source: str, target: str) -> None:
    """Checkpoints are never written to again, so that a second name costs no room."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
