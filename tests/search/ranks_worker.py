"""What two processes under torchrun share, one line each: started by tests/test_distributed.py."""

import json
import sys
import time
from pathlib import Path

import torch

from headstart.distributed import gather, is_main, main_first, process_group, rank, world_size


def main(log: Path) -> None:
    def write(entry: object) -> None:
        with log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    with process_group():
        with process_group():  # as when a search is part of a longer command
            write({"gathered": gather({"rank": rank(), "of": world_size(), "main": is_main()})})
        assert gather(None) == [None, None]
        assert gather(("only", 1) if rank() else None) == [None, ("only", 1)]

        with main_first():
            write({"enters": rank()})
            time.sleep(0.3 if is_main() else 0)
            write({"leaves": rank()})

        failures = []
        try:
            with main_first():
                if is_main():
                    raise ValueError("the main process fails")
        except ValueError as error:
            failures.append(str(error))
        write({"failures": gather(failures)})  # nobody was left waiting
    write({"joined": torch.distributed.is_initialized()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
