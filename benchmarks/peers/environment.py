"""The peers' own virtual environments, and how a benchmark asks whittle something.

Peers pin other versions of torch, transformers and datasets than headstart uses, so they never
share a process. An environment is made once, under headstart's cache; a request to whittle goes to
`whittle_worker.py` as JSON on stdin, and the answer comes back as the last line of its stdout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from headstart.system.files import cache_root

WHITTLE = "whittle==0.6.0"
TRL = "trl==1.16.0"
TORCH = "torch==2.13.0"
"""headstart's own version, so that both sides run on the same kernels where pip allows it."""
PYARROW = "pyarrow==20.0.0"
"""whittle's syne-tune keeps NumPy below 2, with which newer pyarrow installs but does not import,
and whittle.importance with it."""
XLLAMACPP = "xllamacpp"
"""Bindings of llama.cpp as a ready-made wheel."""
TRANSFORMERS_4 = "transformers==4.57.6"
"""The last one before 5, which most servers pin."""
PEFT = "peft==0.21.2"
WORKER = "whittle_worker.py"


def num_threads() -> int:
    """Threads for both sides: OMP_NUM_THREADS, else every core."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def whittle_python() -> Path:
    """The Python of whittle's environment, installed first if need be.

    Raises:
        RuntimeError: it cannot be installed.
    """
    # pyarrow for whittle's NumPy. torchvision may have a compiled part for another build of torch
    # than the one that pip chose, and then no import of whittle works; without it lightning goes
    # on, and nothing here sees an image.
    return _python_with(WHITTLE, (PYARROW,), unwanted="torchvision")


def trl_python() -> Path:
    """The Python of TRL's environment, installed first if need be.

    Raises:
        RuntimeError: it cannot be installed.
    """
    return _python_with(TRL)


def llama_cpp_python() -> Path:
    """The Python of an environment with llama.cpp, installed first if need be.

    Raises:
        RuntimeError: it cannot be installed.
    """
    return _python_with(XLLAMACPP, needs_torch=False)


def transformers_4_python() -> Path:
    """The Python of an environment with the last transformers 4, installed first if need be.

    Raises:
        RuntimeError: it cannot be installed.
    """
    return _python_with(TRANSFORMERS_4)


def peft_python() -> Path:
    """The Python of an environment with PEFT and headstart's own version of transformers.

    Raises:
        RuntimeError: it cannot be installed.
    """
    return _python_with(PEFT, (f"transformers=={version('transformers')}",))


def _python_with(
    package: str, more: tuple[str, ...] = (), unwanted: str = "", needs_torch: bool = True
) -> Path:
    """The Python of an environment that has one package.

    The marker is written last, so an install that was killed is done again from nothing.
    """
    folder = cache_root() / "peers" / package.replace("==", "-")
    marker, python = folder / "installed", folder / "bin" / "python"
    if marker.is_file():
        return python
    if not (3, 10) <= sys.version_info < (3, 13):
        raise RuntimeError(
            f"{package} needs Python 3.10 to 3.12 and this is {sys.version.split()[0]}; run the "
            "benchmarks with one of those"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"installing {package} into {folder} (once, a few minutes)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # torch alone first, so that a build for CPUs is kept where the index has one.
    if not (
        needs_torch and _pip_install(python, TORCH) and _pip_install(python, package, *more, TORCH)
    ):
        if needs_torch:
            print(f"pip cannot combine {package} with {TORCH}; going on without", file=sys.stderr)
        if not _pip_install(python, package, *more):
            raise RuntimeError(
                f"pip could not install {package} (its reason is above); check the network and "
                "pip's index settings"
            )
    if unwanted:
        uninstall = [str(python), "-m", "pip", "uninstall", "--yes", "--quiet", unwanted]
        subprocess.run(uninstall, stdout=2, check=True)
    marker.write_text(package + "\n")
    return python


def _pip_install(python: Path, *arguments: str) -> bool:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    # pip talks to stdout; ours is for the table.
    return subprocess.run([*command, *arguments], stdout=2, check=False).returncode == 0


def ask(
    python: Path,
    worker: str,
    command: str,
    environment: Mapping[str, str] | None = None,
    **request: Any,
) -> Any:
    """The answer of one worker in this folder, the last line that it prints.

    Raises:
        RuntimeError: it failed; the message ends with its own last line.
    """
    finished = subprocess.run(
        [str(python), "-I", str(Path(__file__).with_name(worker)), command],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if finished.returncode:
        reason = (finished.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{worker} failed in its command {command!r}: {reason}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def ask_whittle(command: str, **request: Any) -> dict[str, Any]:
    """Run one command of the worker on the CPU.

    Args:
        command: a function of `whittle_worker.py`.
        request: its arguments; an array travels as a .npy file.

    Raises:
        RuntimeError: the worker failed; the message ends with its own last line.
    """
    python = whittle_python()
    with tempfile.TemporaryDirectory() as scratch:
        for name, value in request.items():
            if isinstance(value, np.ndarray):
                request[name] = str(Path(scratch) / f"{name}.npy")
                np.save(request[name], value)
        # whittle takes a GPU wherever it finds one; both sides are compared on the CPU.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads()),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        request["num_threads"] = num_threads()
        answer: dict[str, Any] = ask(python, WORKER, command, environment, **request)
    return answer


def litgpt_checkpoint(teacher: Path, model: str) -> Path:
    """A Hugging Face folder in the format that whittle reads, converted once.

    Args:
        teacher: the folder, which stays as it is.
        model: litgpt's name of the architecture.
    """
    target = cache_root() / "peers" / "litgpt" / teacher.name
    if not target.is_dir():
        ask_whittle("convert", source=str(teacher), target=str(target), model=model)
    return target
