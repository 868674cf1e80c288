"""Memory of a search on the demo's teacher, and its cost for many candidates.

    python benchmarks/search_memory.py

Runs `headstart search` of the demo's recipe in a process of its own and reads the most memory that
it held. It may hold the teacher, one candidate and 1 GB, in which Python and torch themselves have
to fit. Then two processes load the demo's teacher as a search does, from files in the precision
that they compute in and from others, and score a candidate each: what each has copied of it, and
what both hold together, as parts of the files' size. Then 10,000 candidates of each space go
through evolution with a fitness that only reads their sizes: what that costs apart from evaluation,
whether it grows faster than the number of candidates, and how long the journal takes to resume.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, get_args

import torch

from headstart.model.checkpoint import Checkpoint, copy_files
from headstart.recipe import load_recipe
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate
from headstart.searching.evolution import EvolutionSettings, evolve
from headstart.searching.journal import Journal
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.space import Space, SpaceName
from headstart.searching.teacher import SearchedTeacher
from headstart.system.device import default_device, has_fast_bf16, load_frozen, release_memory
from headstart.system.files import shipped
from headstart.text.prepare import prepare

ALLOWANCE_BYTES = 10**9
RESUME_GOAL_SECONDS = 5.0
OWN_SHARE = 0.25
"""Of a teacher's files, that a process may have copied for itself once it is loaded."""


class SizesOnly:
    """Prefers deep and narrow; costs nothing."""

    num_blocks, block_length = 1, 2

    def __call__(self, candidate: Candidate, start: int, stop: int) -> float:
        return candidate.embed.size / candidate.layers.size


def main() -> None:
    teacher = Checkpoint.open(load_recipe(shipped("demo.yaml")).teacher).architecture
    peak_bytes, candidate_parameters = _search_in_a_process()
    teacher_parameters = teacher.count(1).parameters
    allowed_bytes = 4 * (teacher_parameters + candidate_parameters) + ALLOWANCE_BYTES
    print(f"peak of the search: {peak_bytes / 1e6:,.0f} MB, allowed {allowed_bytes / 1e6:,.0f} MB")

    missed_sharing = _processes_share()
    print(f"{'space':18} {'1,000':>8} {'10,000':>8} {'resume':>8}  (seconds)")
    missed = missed_sharing or peak_bytes > allowed_bytes
    for name in get_args(SpaceName):
        space = Space.build(teacher, name, Bin(20_000_000, 30_000_000))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "search.jsonl"
            short = _evolve(space, Path(folder) / "short.jsonl", 1_000)
            long = _evolve(space, path, 10_000)
            resumed = _evolve(space, path, 10_000)
        print(f"{name:18} {short:8.2f} {long:8.2f} {resumed:8.2f}", flush=True)
        missed |= resumed > RESUME_GOAL_SECONDS or long > 15 * short
    print(f"ratio: {allowed_bytes / peak_bytes:.2f}x (goal 1.00x)")
    if missed:
        sys.exit("missed: memory, sharing, the resume's 5 seconds, or linear cost; see the table")


def _search_in_a_process() -> tuple[int, int]:
    """Peak resident bytes of a search, and its winner's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "headstart.cli", "search", str(shipped("demo.yaml"))]
        subprocess.run([*command, "--output", str(run)], check=True, capture_output=True)
        outcome = json.loads((run / "search.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), outcome["parameters"]


def _processes_share() -> bool:
    """Print what two processes have of a teacher, in both precisions; whether it is too much."""
    recipe = load_recipe(shipped("demo.yaml"))
    demo = Checkpoint.open(recipe.teacher).folder
    computes_in = "bfloat16" if has_fast_bf16(default_device()) else "float32"
    context = multiprocessing.get_context("spawn")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # a tensor that is freed goes to the system
    missed = False
    print(f"{'files':10} {'candidates':10} {'copied':>7} {'both':>7}  (of the files' size)")
    for written, scored_as in (
        (computes_in, "refitted"),
        (computes_in, "slice"),
        ("float32" if computes_in == "bfloat16" else "bfloat16", "refitted"),
    ):
        with tempfile.TemporaryDirectory() as place, context.Manager() as manager:
            folder, barrier = Path(place) / "teacher", manager.Barrier(2)
            model: Any = load_frozen(demo, default_device())
            model.to(dtype=getattr(torch, written)).save_pretrained(folder)
            copy_files(demo, folder)
            del model
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            with context.Pool(2) as pool:
                jobs = [(str(folder), scored_as, barrier)] * 2
                first, second = pool.starmap(_memory_of_teacher, jobs, chunksize=1)
        own, both = max(first[0], second[0]) / size, (sum(first) + sum(second)) / size
        print(f"{written:10} {scored_as:10} {own:7.2f} {both:7.2f}", flush=True)
        if (written, scored_as) == (computes_in, "refitted"):
            missed = own > OWN_SHARE
    return missed


def _memory_of_teacher(folder: str, scored_as: Any, barrier: Barrier) -> tuple[int, int]:
    """Bytes that a process has copied of a teacher once it is loaded; and those of the teacher's
    files that it has in memory after a candidate, where what both have is half of each."""
    recipe = load_recipe(shipped("demo.yaml"))
    teacher, settings = Checkpoint.open(folder), replace(recipe.search, scored_as=scored_as)
    blocks, identity = prepare(recipe.data, teacher.folder), {"teacher_hash": teacher.hash}
    SearchedTeacher.load(teacher, blocks, settings, identity)  # with all that this imports
    before = _memory("smaps_rollup", "Anonymous")
    barrier.wait()
    loaded = SearchedTeacher.load(teacher, blocks, settings, identity)
    copied = _memory("smaps_rollup", "Anonymous") - before
    space = Space.build(teacher.architecture, settings.space, Bin(20_000_000, 30_000_000))
    (candidate,) = space.proportional(1)
    loaded.fitness(candidate, 0, loaded.fitness.num_blocks)
    barrier.wait()
    mapped = _memory("smaps", "Pss", folder) - _memory("smaps", "Anonymous", folder)
    barrier.wait()
    return copied, mapped


def _memory(kind: str, entry: str, folder: str = "") -> int:
    """Bytes of this process by an entry of /proc: of all its memory, or of files in a folder."""
    gc.collect()
    release_memory()
    total, counts = 0, not folder
    for line in Path(f"/proc/self/{kind}").read_text().splitlines():
        first, *others = line.split()
        if not first.endswith(":"):  # where a mapping begins
            counts = folder in line
        elif counts and first == f"{entry}:":
            total += int(others[0]) * 1024
    return total


def _evolve(space: Space, path: Path, num_candidates: int) -> float:
    settings = EvolutionSettings(population=50, generations=num_candidates // 50, elites=10)
    start = time.perf_counter()
    race = Race(SizesOnly(), _nothing, Journal(path, {}), RacingSettings(rungs=1), 10)
    evolve(space, race, settings)
    return time.perf_counter() - start


def _nothing(candidate: Candidate) -> int:
    return 0


if __name__ == "__main__":
    main()
