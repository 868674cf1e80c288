"""The command `headstart` in float32, also where bfloat16 is fast: processes compare exactly."""

import sys

from headstart import cli
from headstart.system import device

if __name__ == "__main__":
    device.has_fast_bf16 = lambda device: False
    sys.exit(cli.main())
