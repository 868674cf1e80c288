"""First recipes: what they hold, and that the other commands take them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from headstart.cli import main
from headstart.model.architecture import Architecture
from headstart.recipe import load_recipe
from headstart.runs import draft as module
from headstart.runs.draft import DraftSettings, draft
from headstart.runs.plan import plan_arms
from headstart.runs.teachers import planned_teachers
from headstart.training.plan import Hardware


@pytest.fixture
def flags(teacher_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> list[str]:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    given = {"--teacher": teacher_folder, "--size": "40K", "--data": corpus, "--gpus": 0}
    given |= {"--output": tmp_path / "run", "--out": tmp_path / "recipe.yaml"}
    return [str(part) for pair in given.items() for part in pair]


def test_a_draft_is_a_recipe_that_plan_prices(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *flags]) == 0
    path = tmp_path / "recipe.yaml"
    assert capsys.readouterr().out == f"{path}\n"
    recipe = load_recipe(path)
    assert recipe.output == str(tmp_path / "run")
    assert recipe.search.bin.around == "40K"
    assert recipe.pretrain.tokens == 800_000  # 20 for each of 40,000
    assert recipe.data.block_length == 512
    arms = load_recipe(None, ["--teacher", "a", "--output", "b"]).pretrain.arms
    assert [arm.name for arm in recipe.pretrain.arms] == [arm.name for arm in arms]
    assert main(["plan", str(path)]) == 0
    assert main(["search", str(path), "--dry-run"]) == 0
    assert main(["init", *flags]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_fits_no_gpu_is_told(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags[flags.index("--gpus") + 1] = "1"
    assert main(["init", *flags, "--gpu-memory", "1MB"]) == 0
    assert "arm subnet+kd needs" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_draft_runs(flags: list[str], tmp_path: Path) -> None:
    assert main(["init", *flags, "--tokens", "5000"]) == 0
    small = ["--data.block_length", "32", "--search.tokens", "256"]
    small += ["--search.evolution.generations", "1", "--pretrain.evaluations", "1"]
    small += ["--search.calibration_tokens", "512"]
    assert main(["run", str(tmp_path / "recipe.yaml"), *small]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_batch_is_the_largest_that_fits(teacher_folder: Path, corpus: Path) -> None:
    def batch_and_peak(memory_bytes: float, gpus: int = 1) -> tuple[int, int, float]:
        hardware = Hardware(gpus, memory_bytes=memory_bytes)
        settings = DraftSettings(
            str(teacher_folder), "40K", str(corpus), tokens=10**10, hardware=hardware
        )
        recipe = module._recipe(draft(settings))
        plans, _ = plan_arms(recipe, planned_teachers(recipe), hardware)
        batch = recipe.train["per_device_train_batch_size"]
        steps = recipe.train["gradient_accumulation_steps"]
        return batch, batch * steps, max(plan.memory.peak for plan in plans)

    whole = batch_and_peak(80e9)
    assert whole[0] == module.LARGEST_BATCH
    # 1e10 tokens in 2,000 steps are more than the largest step, 1,024 blocks of 512 tokens.
    assert whole[1] == 524_288 // 512
    assert batch_and_peak(80e9, gpus=4)[1] == 524_288 // 512 // 4
    # Less than activation checkpointing frees would leave the batch as it is.
    halved = batch_and_peak(0.3 * whole[2])
    assert halved[0] < whole[0] and halved[1] == whole[1]
    assert halved[2] <= 0.3 * whole[2]
    assert batch_and_peak(1e3)[0] == 1  # nothing fits, which `plan` says


def test_few_tokens_make_small_steps(teacher_folder: Path, corpus: Path) -> None:
    settings = DraftSettings(
        str(teacher_folder), "40K", str(corpus), tokens=10_000, hardware=Hardware(2)
    )
    train = module._recipe(draft(settings)).train
    assert train["per_device_train_batch_size"] == 4  # 4,096 tokens in blocks of 512, on two
    assert train["gradient_accumulation_steps"] == 1


def test_a_large_embedding_is_told_of(teacher_folder: Path, corpus: Path) -> None:
    """Of 128 rows, and of the teacher's 48 channels as many as the root of the sizes leaves."""
    settings = DraftSettings(str(teacher_folder), "40K", str(corpus))
    assert "# vocabulary" not in draft(settings)
    teacher = Architecture.read(teacher_folder).count(512).parameters
    share = 128 * 48 * (40_000 / teacher) ** 0.5 / 40_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGE_EMBEDDING", share - 1e-6)
        text = draft(settings)
    assert f"# The embedding of 128 rows may take {share:.0%} of such a student." in text
    assert "# vocabulary: {size: 64}" in text


@pytest.mark.parametrize("name", ["a b #c", "it's: here", "[x]", "- 1", "é"])
def test_any_name_stays_what_it_is(
    name: str, teacher_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = DraftSettings(str(teacher_folder), "40K", str(corpus), output=name)
    assert module._recipe(draft(settings)).output == name


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"--teacher": "./nowhere"}, "neither a folder nor a model"),
        ({"--size": "many"}, "'many' is not a count"),
        ({"--size": "9G"}, "search.bin"),
        ({"--data": "not/there.txt"}, "not/there.txt"),
        ({"--gpus": "-1"}, "'-1' is not a count"),
        ({"--gpus": "1", "--gpu-memory": "much"}, "--gpu-memory is 'much'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    changed: dict[str, str],
    sentence: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = dict(zip(flags[::2], flags[1::2], strict=True)) | changed
    assert main(["init", *(f"{option}={value}" for option, value in given.items())]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


class Terminal(io.StringIO):
    """Somebody who answers."""

    def isatty(self) -> bool:
        return True


def test_what_is_missing_is_asked_for_on_a_terminal(
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    answers = [given.pop(option) for option in ("--teacher", "--size", "--data", "--gpus")]
    rest = [part for pair in given.items() for part in pair]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(answers) + "\n"))
    assert main(["init", *rest]) == 0
    shown = capsys.readouterr()
    assert shown.err.count(": ") >= 4 and "Parameters of the student" in shown.err
    assert load_recipe(tmp_path / "recipe.yaml").data.source == answers[2]


def test_nobody_is_asked_without_a_terminal(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("demo\n"))
    assert main(["init", *flags[2:]]) == 2
    assert "init needs --teacher" in capsys.readouterr().err
