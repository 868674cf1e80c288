"""Parts of a run as jobs of their own, side by side; together they give the run's answer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.runs.conftest import answer

from headstart.cli import main
from headstart.recipe import recipe_from_dict
from headstart.runs.folder import locked
from headstart.runs.stages import run_recipe

CLI = str(Path(__file__).parents[1] / "float32_cli.py")
CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster"
BINS = [{"low": "30K", "high": "35K"}, {"low": "40K", "high": "45K", "name": "large"}]


@pytest.fixture
def tree(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small recipe with two bins and finalists, as a whole run of it."""
    search = {**recipe["search"], "bins": BINS, "finalists": {"count": 2}}
    del search["bin"]
    return {**recipe, "output": str(tmp_path / "whole"), "search": search}


def written(tree: dict[str, Any], folder: Path) -> list[str]:
    """The command of a recipe file for another folder, without the arm."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**tree, "output": str(folder)}))
    return ["run", str(file)]


def test_jobs_at_once_give_the_runs_answer(tree: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(recipe_from_dict(tree))
    command = written(tree, tmp_path / "jobs")
    arms = [arm["name"] for arm in tree["pretrain"]["arms"]]
    folder = tmp_path / "jobs" / "large"
    logs = [tmp_path / f"log-{number}" for number in range(len(arms))]
    with locked(folder):  # until all of them wait for it, so that they go on at once
        jobs = []
        for arm, log in zip(arms, logs, strict=True):
            part = ["--bin", "large", "--arm", arm]
            # As this process, which results name.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with log.open("w") as stream:
                started = [sys.executable, CLI, *command, *part]
                jobs.append(subprocess.Popen(started, env=environment, stderr=stream))
        end = time.monotonic() + 300
        while not all("waiting for it" in log.read_text() for log in logs):
            assert time.monotonic() < end and not any(job.poll() for job in jobs)
            time.sleep(0.05)
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(timeout=300) == 0, log.read_text()
    assert answer(tmp_path / "jobs" / "large") == answer(tmp_path / "whole" / "large")
    run_recipe(recipe_from_dict({**tree, "output": str(tmp_path / "jobs")}))  # the other bin
    for folder in ("30K-35K", "large"):
        assert answer(tmp_path / "jobs" / folder) == answer(tmp_path / "whole" / folder)


def test_what_is_there_is_reported(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*written(tree, tmp_path / "jobs"), "--bin", "large", "--arm"]
    assert main([*command, "subnet"]) == 0
    assert "Not trained yet: scratch, subnet+kd." in capsys.readouterr().out
    folder = tmp_path / "jobs" / "large"
    (subnet,) = answer(folder)["arms"]
    assert (subnet["name"], subnet["reference"]) == ("subnet", None)
    assert main([*command, "scratch"]) == 0
    scratch, again = answer(folder)["arms"]
    assert scratch["name"] == "scratch" == again["reference"]
    assert again["curve"] == subnet["curve"]
    assert main(["report", str(folder)]) == 0
    assert "Not trained yet: subnet+kd." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (["--bin", "huge"], "--bin is 'huge'; choose one of these: 30K-35K, large"),
        (["--bin", "large", "--arm", "x"], "--arm is 'x'; choose one of scratch, subnet, subnet"),
        (["--arm", "scratch"], "--arm scratch needs --bin, since the recipe has several bins"),
    ],
)
def test_a_part_that_is_not_there_is_refused(
    part: list[str],
    message: str,
    tree: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*written(tree, tmp_path / "jobs"), *part]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


def test_an_arm_is_for_one_process_at_a_time(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*written(tree, tmp_path / "jobs"), "--bin", "large", "--arm"]
    folder = tmp_path / "jobs" / "large" / "arms" / "scratch"
    folder.parent.mkdir(parents=True)
    assert main([*command, "subnet"]) == 2  # which is no run yet
    folder.parent.rmdir()
    assert main([*command, "subnet"]) == 0
    with locked(folder):
        kept = folder / ".unfinished-model-x"
        kept.write_text("")
        capsys.readouterr()
        assert main([*command, "scratch"]) == 2
        assert f"works in {folder}" in capsys.readouterr().err
        assert kept.exists()  # another process may be writing it


PARTS = [
    f"--bin {bin} --arm {arm}"
    for bin in ("30K-35K", "large")
    for arm in ("scratch", "subnet", "subnet+kd")
]


def test_the_parts_of_a_recipe_are_listed(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, file) = written(tree, tmp_path / "jobs")
    assert main(["jobs", file]) == 0
    assert capsys.readouterr().out.splitlines() == PARTS
    assert main(["jobs", file, "--search.bins", "[]", "--search.bin.around", "30K"]) == 0
    assert capsys.readouterr().out.splitlines() == [part.split(" ", 2)[2] for part in PARTS[:3]]


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """An environment whose `srun` runs what follows, and whose `torchrun` says it."""
    folder = tmp_path / "commands"
    folder.mkdir()
    scripts = {
        "srun": 'shift; exec "$@"',  # its own option
        "torchrun": 'printf "%s\n" "$@"',
        "headstart": f'exec {sys.executable} -m headstart.cli "$@"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_slurm_script_gives_every_job_its_part(
    tree: dict[str, Any], tmp_path: Path, commands: dict[str, str]
) -> None:
    (_, file) = written(tree, tmp_path / "jobs")
    script = ["bash", str(CLUSTER / "slurm.sh"), file]
    beyond = {**commands, "SLURM_ARRAY_TASK_ID": "7"}
    said = subprocess.run(script, env=beyond, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (2, "")
    for number in (1, 6):
        environment = {**commands, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_GPUS_ON_NODE": "8"}
        said = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
        launch = ["--nproc-per-node", "8", "-m", "headstart.cli", "run", file]
        assert said.stdout.splitlines() == [*launch, *PARTS[number - 1].split()]


def test_the_skypilot_job_runs_its_part(
    tree: dict[str, Any], tmp_path: Path, commands: dict[str, str]
) -> None:
    (_, file) = written(tree, tmp_path / "jobs")
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    given = {"RECIPE": file, "PART": PARTS[4], "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    assert given.keys() >= {name for name, value in task["envs"].items() if value is None}
    said = subprocess.run(
        ["bash", "-euc", task["run"]],
        env={**commands, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    launch = ["--nproc-per-node", "8", "-m", "headstart.cli", "run", file]
    assert said.stdout.splitlines() == [*launch, *PARTS[4].split()]
