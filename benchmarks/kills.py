"""Does a run that is killed at random moments end like one that is not?

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 20 --processes 1

A lap starts a small run with an empty cache: text of three files, a teacher cache, importance,
moments, search, extraction, four arms, the report. It is killed with SIGKILL at a random moment and
started again, until it ends; its results must be those of the uninterrupted run, and nothing called
unfinished may be left. Processes are forked from one that has imported everything, since imports
would take most of the time; two of them get the environment that torchrun gives.

Then two runs are started at once, in one folder and with one cache: one is refused, or both are
right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

import headstart.runs.stages
import headstart.training.trainer  # noqa: F401, so that children need not import it
from headstart.cli import main as headstart_main
from headstart.training.cache import is_being_written
from tiny import small_recipe, write_teacher, write_text

CLOCKED = {"seconds", "search_seconds", "created", "command", "environment"}
"""Keys of results that depend on the clock or the place."""
STAGES = ("text", "teacher cache", "importance", "search", "extraction", "training", "report")


def write_inputs(place: Path) -> None:
    """Teacher, text and recipe."""
    text = write_text(place / "text", num_files=3, num_documents=1000)
    teacher = write_teacher(place / "teacher", text)
    tree = small_recipe(teacher, text, place / "lap" / "run")
    tree["search"] |= {"init": "least_squares", "racing": {"rungs": 3}}
    tree["pretrain"]["seeds"] = [1]
    kd = {"top_k": 8, "cache": str(place / "lap" / "teacher-cache")}
    tree["pretrain"]["arms"].append({"name": "cached", "kd": kd})
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    tree["output"] = str(place / "lap" / "other")
    (place / "other.yaml").write_text(yaml.safe_dump(tree))


def start(recipe: Path, num_processes: int = 1) -> list[int]:
    """Fork processes that run a recipe together, in a group of their own; their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            try:
                os._exit(_run(recipe, rank, num_processes, port))
            finally:
                os._exit(70)  # an error of this benchmark
        os.setpgid(child, children[0] if children else child)
        children.append(child)
    return children


def _run(recipe: Path, rank: int, num_processes: int, port: int) -> int:
    """Write the teacher cache and run a recipe, in a forked process; the exit code."""
    if num_processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes}
        os.environ.update({key: str(number) for key, number in numbers.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    log = os.open(recipe.parent / f"log-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = headstart_main(["cache-teacher", str(recipe)])
    code = code or headstart_main(["run", str(recipe)])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(children: list[int]) -> list[int]:
    """The exit codes of processes; below 0, the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed(children: list[int], seconds: float) -> bool:
    """Kill a group of processes after some seconds, unless one has ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.005)
    os.killpg(children[0], signal.SIGKILL)
    return True


def stage_of(lap: Path) -> str:
    """The stage that a run is in, by the files that are there."""
    run = lap / "run"
    is_done = {
        "text": any((lap / "cache" / "data").glob("*/manifest.json")),
        "teacher cache": (run / "search.jsonl").is_file()
        or (
            any((lap / "teacher-cache").glob("*.npy"))
            and not is_being_written(str(lap / "teacher-cache"))
        ),
        "importance": (run / "orders.json").is_file(),
        "search": (run / "search.json").is_file(),
        "extraction": (run / "student").is_dir(),
        "training": len(list(run.glob("arms/*/seed-1/arm.json"))) == 4,
        "report": False,
    }
    return next(stage for stage in STAGES if not is_done[stage])


def without_clocks(value: Any) -> Any:
    """A result without what depends on the clock or the place."""
    if isinstance(value, dict):
        return {key: without_clocks(inner) for key, inner in value.items() if key not in CLOCKED}
    return [without_clocks(inner) for inner in value] if isinstance(value, list) else value


def results_of(run: Path) -> dict[str, Any]:
    """All that a run has found, weights as hashes."""
    files = ["result.json", "search.json", "orders.json", "student/subnet.json"]
    found = {name: without_clocks(json.loads((run / name).read_text())) for name in files}
    for weights in sorted(run.rglob("model.safetensors")):
        if "checkpoint-" not in str(weights):
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            found[str(weights.relative_to(run))] = digest
    return found


def different(ours: Any, theirs: Any, key: str = "") -> list[str]:
    """The keys in which two results differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = {**ours, **theirs}
        return [
            found
            for name in names
            for found in different(ours.get(name), theirs.get(name), f"{key}/{name}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for place, pair in pairs for found in different(*pair, f"{key}[{place}]")]
    return [] if ours == theirs else [key]


def leftovers(lap: Path) -> list[str]:
    return [str(path.relative_to(lap)) for path in lap.rglob("*") if "unfinished" in path.name]


def anew(place: Path) -> Path:
    """An empty lap, with a cache of its own."""
    lap = place / "lap"
    shutil.rmtree(lap, ignore_errors=True)
    lap.mkdir()
    for log in place.glob("log-*"):
        log.unlink()
    return lap


def last_words(place: Path) -> str:
    logs = sorted(place.glob("log-*"), key=lambda log: log.stat().st_mtime)
    return logs[-1].read_text(errors="replace").strip()[-600:] if logs else ""


def laps(
    place: Path, num_processes: int, num_kills: int, rng: random.Random, deadline: float
) -> tuple[dict[str, Any], Counter[str], int, list[str]]:
    """Kill runs so many times.

    Returns:
        The uninterrupted run's results, kills by stage, laps, and what was wrong.
    """
    lap = anew(place)
    clock = time.monotonic()
    codes = wait(start(place / "recipe.yaml", num_processes))
    assert codes == [0] * num_processes, last_words(place)
    duration = time.monotonic() - clock
    expected = results_of(lap / "run")
    assert not leftovers(lap), leftovers(lap)
    kills: Counter[str] = Counter()
    num_laps, problems = 0, list[str]()
    while kills.total() < num_kills and time.monotonic() < deadline:
        lap, num_laps, of_lap = anew(place), num_laps + 1, 0
        while True:
            children = start(place / "recipe.yaml", num_processes)
            is_over = kills.total() == num_kills or time.monotonic() > deadline
            is_killed = killed(children, math.inf if is_over else rng.uniform(0, duration))
            stage = stage_of(lap)
            codes = wait(children)
            if not is_killed:
                break
            kills[stage] += 1
            of_lap += 1
        if codes != [0] * num_processes:
            problems.append(f"lap {num_laps}: exit codes {codes}: {last_words(place)}")
        else:
            keys = different(results_of(lap / "run"), expected)
            problems += [f"lap {num_laps}: {key} differs" for key in keys[:5]]
        problems += [f"lap {num_laps}: {path} is left" for path in leftovers(lap)]
        said = (
            f"{num_processes} processes, lap {num_laps}: {of_lap} kills, {len(problems)} problems"
        )
        print(said, file=sys.stderr, flush=True)
    return expected, kills, num_laps, problems


def at_once(place: Path, expected: dict[str, Any], times: int) -> list[str]:
    """Start two runs at once, in one folder and with one cache; what was wrong."""
    problems = []
    for _ in range(times):
        lap = anew(place)
        both = [start(place / "recipe.yaml")[0] for _ in range(2)]
        codes = sorted(wait(both))
        if codes not in ([0, 2], [0, 0]):
            problems.append(f"in one folder: exit codes {codes}: {last_words(place)}")
        elif different(results_of(lap / "run"), expected):
            problems.append("in one folder: other results")
        lap = anew(place)
        both = [start(place / name)[0] for name in ("recipe.yaml", "other.yaml")]
        codes = wait(both)
        if codes != [0, 0]:
            problems.append(f"with one cache: exit codes {codes}: {last_words(place)}")
            continue
        for run in ("run", "other"):
            keys = different(results_of(lap / run), expected)
            where = ("/output", "/name")  # of which there are two
            problems += [f"with one cache: {key}" for key in keys if not key.endswith(where)]
        problems += [f"with one cache: {path} is left" for path in leftovers(lap)]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="over all numbers of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--at-once", type=int, default=5, help="times that two are started at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-minutes", type=float, default=120.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.limit_minutes
    rng, problems, table = random.Random(options.seed), list[str](), {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["HEADSTART_CACHE"] = str(place / "lap" / "cache")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads do not survive a fork
        os.environ["OMP_NUM_THREADS"] = "1"
        if (child := os.fork()) == 0:  # so that this process has done nothing before it forks
            write_inputs(place)
            os._exit(0)
        assert wait([child]) == [0]
        for number, num_processes in enumerate(options.processes, 1):
            share = deadline - (deadline - time.monotonic()) * (1 - number / len(options.processes))
            num_kills = options.kills // len(options.processes)
            expected, *found = laps(place, num_processes, num_kills, rng, share)
            table[num_processes] = found[:2]
            problems += [f"{num_processes} processes, {problem}" for problem in found[2]]
            if num_processes == 1:
                problems += at_once(place, expected, options.at_once)
    names = " | ".join(f"{number} process{'es' * (number > 1)}" for number in table)
    print(f"| killed in | {names} |\n| :-- |{' --: |' * len(table)}")
    for stage in STAGES:
        print(f"| {stage} | {' | '.join(str(kills[stage]) for kills, _ in table.values())} |")
    print(f"| all | {' | '.join(str(kills.total()) for kills, _ in table.values())} |")
    print(f"| laps | {' | '.join(str(num_laps) for _, num_laps in table.values())} |")
    print(f"\n{len(problems)} problems")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
