"""A recipe's price, before there are weights or text."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from headstart.cli import main
from headstart.recipe import recipe_from_dict
from headstart.runs.plan import distinct_reads, planned_text, print_plans
from headstart.runs.teachers import planned_teachers
from headstart.training.plan import Hardware

KEYS = {
    "data": {"source": "not/there", "block_length": 32},
    "search": {"bins": [{"low": "25K", "high": "35K"}, {"low": "40K", "high": "45K"}]},
    "pretrain": {"tokens": 1_000_000},
    "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
}


@pytest.fixture
def configs(teacher_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    shutil.copy(teacher_folder / "config.json", folder)
    return folder


def test_every_arm_of_every_bin_has_a_plan(configs: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict({**KEYS, "teacher": str(configs), "output": str(tmp_path / "run")})
    plans = print_plans(recipe, Hardware(gpus=5))
    assert [[plan.name for plan in bin] for bin in plans] == [
        ["scratch", "proportional", "subnet", "subnet+kd"]
    ] * 2
    step_tokens = 2 * 3 * 32 * 5
    for small, large in zip(*plans, strict=True):
        assert small.tokens == large.tokens
        assert small.tokens % step_tokens == 0
        assert 1_000_000 <= small.tokens < 1_000_000 + step_tokens
        assert small.memory.state < large.memory.state
    scratch, _, _, distilled = plans[0]
    assert scratch.teacher_flops == 0 < distilled.teacher_flops
    assert not (tmp_path / "run").exists()


def test_processes_share_the_text_of_a_refit(configs: Path, tmp_path: Path) -> None:
    """Half the tokens on twice the GPUs; all else is on each."""
    keys = {**KEYS, "teacher": str(configs), "output": str(tmp_path / "run")}
    search = {**KEYS["search"], "init": "least_squares"}
    recipe = recipe_from_dict({**keys, "search": search})
    of_one, of_two, of_four = (
        next(arm for arm in print_plans(recipe, Hardware(gpus=gpus))[0] if arm.name == "subnet")
        for gpus in (1, 2, 4)
    )
    saved, saved_again = (
        more.memory.refit - less.memory.refit
        for more, less in ((of_one, of_two), (of_two, of_four))
    )
    assert saved == 2 * saved_again > 0


def test_text_and_caches_are_planned_by_what_is_needed(configs: Path, tmp_path: Path) -> None:
    """By hand: 3M training tokens are 0.85 of what is read; top 8 of a small vocabulary are two
    bytes each for token and probability, and two for the rest."""
    kd = {"top_k": 8, "cache": "far/away"}
    keys = {"teacher": str(configs), "output": str(tmp_path / "run"), "data": KEYS["data"]}
    arms = [{"name": name, "kd": kd} for name in ("a", "b")]
    recipe = recipe_from_dict({**keys, "pretrain": {"tokens": 3_000_000, "arms": arms}})
    plan = planned_text(recipe, planned_teachers(recipe))
    held_out = 262_144 / 0.05
    assert plan.tokens == math.ceil(max(3_000_000 / 0.85, held_out))
    assert plan.disk_bytes == 4 * plan.tokens
    assert plan.cached_tokens == {"far/away": 3_000_000}  # that arms read, and no more
    assert plan.cache_bytes == {"far/away": 3_000_000 * (8 * 4 + 2)}


def test_distinct_reads_are_those_of_permutations() -> None:
    rng, size, reads = np.random.default_rng(0), 2_000, 700
    for num_seeds in (1, 2, 5):
        read = {*itertools.chain(*(rng.permutation(size)[:reads] for _ in range(num_seeds)))}
        assert distinct_reads(size, reads, num_seeds) == pytest.approx(len(read), rel=0.05)
    assert distinct_reads(size, 3 * size, 2) == size


def test_the_command_prints_it(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--teacher",
        str(configs),
        "--data",
        "not/there",
        "--output",
        str(tmp_path / "run"),
    ]
    size = ["--search.bin", "{low: 25K, high: 35K}", "--gpus", "8"]
    assert main(["plan", *arguments, *size]) == 0
    assert "8 x 989 TFLOP/s at 40%" in capsys.readouterr().out
    assert main(["plan", *arguments, *size, "--gpu-memory", "1MB"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 x 989 TFLOP/s at 40%, 1 MB" in printed
    assert "of 1 MB: set a smaller bin, since nothing else fits" in printed
    assert main(["plan", *arguments, *size, "--gpu-memory", "80"]) == 2
    assert "--gpu-memory is '80'; write a size above 0 with its unit" in capsys.readouterr().err
    assert main(["plan", *arguments, *size, "--mfu", "7"]) == 2
    assert "--mfu is 7.0" in capsys.readouterr().err
