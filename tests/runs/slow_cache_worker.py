"""`headstart cache-teacher` in float32, small shards and no hurry: started by test_caches.py."""

import sys
import time
from typing import Any

from headstart import cli
from headstart.runs import caches
from headstart.system import device
from headstart.training.cache_writer import write_cache

SHARD_BYTES = 4_000


def write_slowly(*arguments: Any, on_blocks: Any, **options: Any) -> dict[str, Any]:
    def wait(num_blocks: int) -> None:
        on_blocks(num_blocks)
        time.sleep(pause)

    return write_cache(*arguments, shard_bytes=SHARD_BYTES, on_blocks=wait, **options)


if __name__ == "__main__":
    pause = float(sys.argv.pop(1))
    device.has_fast_bf16 = lambda device: False
    caches.write_cache = write_slowly
    caches.fitting_batch_size = lambda *arguments: 5
    sys.exit(cli.main())
