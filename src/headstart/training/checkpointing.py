"""Decides whether an arm computes its activations again, where the recipe does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.model.architecture import Architecture
from headstart.system.device import memory_bytes
from headstart.system.distributed import from_main, gather, is_main, world_size
from headstart.system.formats import bytes_text
from headstart.system.progress import console
from headstart.training.memory import CHECKPOINTING_KEYS, chosen_memory, setup_of
from headstart.training.settings import Arm


def choose_checkpointing(
    arm: Arm,
    arguments: Any,
    train: Mapping[str, Any],
    teacher: Architecture,
    student: Architecture,
    block_length: int,
    separates: bool,
) -> None:
    """Let an arm compute activations again on GPUs where it fits with that and not without.

    Nothing is changed where the recipe says it, or on other devices. All processes plan for the
    smallest GPU of all, and do what the main process has planned. The main process tells the user.

    Args:
        arm: that is about to train.
        arguments: its TrainingArguments; they are changed in place.
        train: the recipe's `train:` block, with the arm's own over it.
        teacher: that it distils from, if it does.
        student: that is trained.
        block_length: tokens in a block.
        separates: whether tokens attend to their own document only.
    """
    setup = setup_of(arguments, train, block_length, separates)
    sizes = gather(memory_bytes(arguments.device))
    known = [size for size in sizes if size is not None]
    if setup.sets_checkpointing or len(known) < len(sizes):
        return
    available = min(known)
    checkpoints, memory = from_main(
        lambda: chosen_memory(arm.kd, teacher, student, setup, world_size(), available)
    )
    if checkpoints:
        for key in CHECKPOINTING_KEYS:  # what TrainingArguments mirrors once, when it is made
            setattr(arguments, key, True)
    held = f"about {bytes_text(memory.peak)} of {bytes_text(available)}"
    if is_main() and checkpoints:
        console.print(
            f"arm {arm.name} computes activations again instead of keeping them, to hold {held} "
            "on a GPU; train.activation_checkpointing: false turns that off"
        )
    elif is_main() and memory.peak > available:
        console.print(
            f"arm {arm.name} is planned to hold {held} on a GPU, and activation checkpointing "
            "would not make it fit; lower train.per_device_train_batch_size if it runs out of "
            "memory, and see `headstart plan`"
        )
