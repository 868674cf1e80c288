"""Runs a pickled (arm, inputs, folder, kill_after) in a process that tests may kill or multiply."""

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

from headstart import device
from headstart.pretrain import arms, trainer


def main(call: Path) -> None:
    arm, inputs, folder, kill_after = pickle.loads(call.read_bytes())
    for module in (arms, device):
        module.has_fast_bf16 = lambda device: False

    def kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.ReportStep.on_step_end = kill
    arms.run_arm(arm, inputs, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
