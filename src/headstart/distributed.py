"""Ranks and the few collectives that headstart needs; torch.distributed underneath."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from headstart.device import default_device

Value = TypeVar("Value")


def world_size() -> int:
    """Processes that work together, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, for as long as the body runs."""
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Others wait for as long as the main process tokenises; torchrun ends all when one fails.
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1)
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the body before the others, who then find its files."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def gather(value: Value) -> list[Value]:
    """Every process' value, by rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
