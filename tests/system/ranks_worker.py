"""What two processes under torchrun share, one line each: started by test_distributed.py."""

import json
import sys
from pathlib import Path

import torch

from headstart.system.distributed import from_main, gather, is_main, process_group, rank, world_size
from headstart.system.errors import UserError


def main(log: Path) -> None:
    def write(entry: object) -> None:
        with log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    with process_group():
        with process_group():  # as when a search is part of a longer command
            write({"gathered": gather({"rank": rank(), "of": world_size(), "main": is_main()})})
        assert gather(None) == [None, None]
        assert gather(("only", 1) if rank() else None) == [None, ("only", 1)]

        calls: list[int] = []
        write({"decided": gather(from_main(lambda: [rank(), calls.append(rank())][0]))})
        write({"called": gather(calls)})

        def fail(error: Exception) -> None:
            raise error

        for error in (UserError("the user's mistake"), OSError("no space left"), KeyError()):
            try:
                from_main(lambda error=error: fail(error))
                outcome = ["passed", ""]
            except Exception as caught:
                outcome = [type(caught).__name__, str(caught)]
            write({"failed": gather(outcome)})  # nobody was left waiting
    write({"joined": torch.distributed.is_initialized()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
