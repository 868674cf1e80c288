"""Stops training between two steps, and says when a checkpoint is due.

Processes under torchrun must stop after the same step, or those that go on would wait for ever. So
they tell one another after every step, by numbers in the CPU's memory: no GPU is waited for.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from headstart.system.distributed import world_size

REPEAT_SECONDS = 1.0


class SaveAndStop(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint some minutes after the last one, and when a signal wants training to end.

    SIGTERM and SIGINT let the step end that is under way. Another one `REPEAT_SECONDS` later does
    not; sooner it is the same one, which torchrun and schedulers send twice. An evaluation that was
    due after that step is left to the run that goes on.

    Args:
        save_minutes: the most between checkpoints, as long as a step takes less.
    """

    def __init__(self, save_minutes: float) -> None:
        self.save_seconds = 60 * save_minutes
        self.saved_at = time.monotonic()
        self.is_stopping, self.told_at = False, 0.0
        self.group: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals while the body trains.

        Raises:
            KeyboardInterrupt: one came, and a checkpoint is saved.
        """
        if world_size() > 1 and distributed.get_backend() != "gloo":
            self.group = distributed.new_group(backend="gloo")
        before = {}
        with suppress(ValueError):  # not in the main thread, which alone can
            for kind in (signal.SIGINT, signal.SIGTERM):
                before[kind] = signal.signal(kind, self._note)
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
        if self.is_stopping:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.is_stopping and now - self.told_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        if not self.is_stopping:
            self.is_stopping, self.told_at = True, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = time.monotonic() - self.saved_at >= self.save_seconds
        if world_size() > 1:
            wishes = torch.tensor([self.is_stopping, is_due], dtype=torch.int32)
            distributed.all_reduce(wishes, distributed.ReduceOp.MAX, group=self.group)
            self.is_stopping, is_due = map(bool, wishes.tolist())
        control.should_save = control.should_save or self.is_stopping or is_due
        if self.is_stopping and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()
