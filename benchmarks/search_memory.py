"""Memory of a search on the demo's teacher, and its cost for many candidates.

    python benchmarks/search_memory.py

Runs `headstart search` of the demo's recipe in a process of its own and reads the most memory that
it held. It may hold the teacher, one candidate and 1 GB, in which Python and torch themselves have
to fit. Then 10,000 candidates of each space go through evolution with a fitness that only reads
their sizes: what that costs apart from evaluation, whether it grows faster than the number of
candidates, and how long the journal takes to resume.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

from headstart.model.checkpoint import Checkpoint
from headstart.recipe import load_recipe
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate
from headstart.searching.evolution import EvolutionSettings, evolve
from headstart.searching.journal import Journal
from headstart.searching.racing import Race, RacingSettings
from headstart.searching.space import Space, SpaceName
from headstart.system.files import shipped

ALLOWANCE_BYTES = 10**9
RESUME_GOAL_SECONDS = 5.0


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

    print(f"{'space':18} {'1,000':>8} {'10,000':>8} {'resume':>8}  (seconds)")
    missed = peak_bytes > allowed_bytes
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
        sys.exit("missed: memory, the resume's 5 seconds, or linear cost; see the table")


def _search_in_a_process() -> tuple[int, int]:
    """Peak resident bytes of a search, and its winner's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "headstart.cli", "search", str(shipped("demo.yaml"))]
        subprocess.run([*command, "--output", str(run)], check=True, capture_output=True)
        outcome = json.loads((run / "search.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), outcome["parameters"]


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
