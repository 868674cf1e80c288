"""Ranks and the few collectives that headstart needs; torch.distributed underneath."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from headstart.system.device import default_device
from headstart.system.errors import UserError

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


def run_processes(count: int, arguments: list[str]) -> list[int]:
    """Run so many processes of this machine that work together, without its GPUs.

    They share its cores. Each runs Python with these arguments.

    Returns:
        The exit codes of those that failed; none if all went well.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = str(max((os.cpu_count() or 1) // count, 1))
    # The second is of tokenizers.
    os.environ |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(os.getpid()),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return [failure.exitcode for failure in error.failures.values()]
    return []


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        distributed.barrier()


def from_main(decide: Callable[[], Value]) -> Value:
    """What the main process decides, on every process.

    All that depends on the disk is decided in this way: is the text prepared, which checkpoint is
    the newest. The other processes wait, and do not look at a disk that may have changed since.
    Under torchrun it works inside `process_group`.

    Args:
        decide: called on the main process alone; its value must be one that pickle can write.

    Raises:
        Exception: what `decide` raised, on the main process; on the others the same message, as a
            UserError if it was one and as a RuntimeError if not. So all processes end with it.
    """
    if world_size() == 1:
        return decide()
    decided: list[Any] = [None, None, None]
    failure: BaseException | None = None
    if is_main():
        try:
            decided[0] = decide()
        except Exception as error:
            failure = error
            decided[1:] = str(error) or type(error).__name__, isinstance(error, UserError)
    distributed.broadcast_object_list(decided)
    if failure is not None:
        raise failure
    value, message, is_users = decided
    if message is not None:
        raise UserError(message) if is_users else RuntimeError(message)
    return cast(Value, value)


@contextmanager
def entered_by_main(enter: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let all processes go on once the main one has entered a context, such as a lock."""
    with ExitStack() as stack:
        from_main(lambda: stack.enter_context(enter()))
        yield


def gather(value: Value) -> list[Value]:
    """Every process' value, by rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
