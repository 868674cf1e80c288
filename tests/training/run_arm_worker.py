"""Runs a pickled (arm, inputs, folder, kill_after) in a process that tests may kill or multiply.

A negative `kill_after` tells the second process to stop after so many steps, by SIGTERM.
"""

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from headstart.system import device
from headstart.system.distributed import process_group, rank
from headstart.training import arguments, arms, trainer


def let_cpus_shard() -> None:
    """torch's FSDP2 works on CPUs; accelerate turns it on for processes of other kinds only."""
    whole = PartialState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        whole(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def check_shares() -> None:
    """End in an error unless each process keeps half of the teacher's layers."""
    whole = arms.load_teacher

    def load(*args: Any) -> Any:
        teacher = whole(*args)
        for name, parameter in teacher.model.base_model.named_parameters():
            share = parameter.to_local().numel() / parameter.numel()
            assert share <= 0.6, f"{name} is not sharded"
        return teacher

    arms.load_teacher = load


def main(call: Path) -> None:
    arm, inputs, folder, kill_after = pickle.loads(call.read_bytes())
    if inputs.train.get("fsdp"):
        let_cpus_shard()
    if arm.kd and arm.kd.shard_teacher:
        check_shares()
    for module in (arguments, device):
        module.has_fast_bf16 = lambda device: False

    def kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if kill_after and state.global_step == -kill_after and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.ReportStep.on_step_end = kill
    with process_group():
        arms.run_arm(arm, inputs, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
