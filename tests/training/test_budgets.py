"""A branch ends as a run of its own budget does, killed or not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.losses.distillation import DistillationSettings
from headstart.system.errors import UserError
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.budgets import Budget, budgets_of
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.trainer import ReportStep
from headstart.training.variants import run_variants

STEP_TOKENS = 4 * 16
STEPS = (5, 10, 30)  # an epoch has 12
ARM = Arm("subnet", learning_rate=1e-2, kd=DistillationSettings())


@pytest.fixture(scope="module", autouse=True)
def float32() -> Any:
    from headstart.system import device
    from headstart.training import arguments

    with pytest.MonkeyPatch.context() as patch:
        for module in (arguments, device):
            patch.setattr(module, "has_fast_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def inputs(student_checkpoint, teacher_checkpoint, blocks) -> ArmInputs:
    settings = PretrainSettings(
        budgets=tuple(STEP_TOKENS * steps for steps in STEPS),
        decay=0.4,
        validation_tokens=80,
        evaluations=3,
    )
    train = {"use_cpu": True, "per_device_train_batch_size": 4, "warmup_steps": 0.2}
    return ArmInputs(student_checkpoint, teacher_checkpoint, blocks, settings, train)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_arm(ARM, inputs, folder)


def places(folder: Path) -> list[Path]:
    """The folder of each budget, ascending."""
    return [*(folder / f"budget-{STEP_TOKENS * steps}" for steps in STEPS[:-1]), folder]


def test_each_budget_ends_as_a_run_of_its_own(inputs, whole, tmp_path):
    """Alone, with the schedule written out: a warm-up of a fifth of the smallest budget, and a rate
    that falls over two fifths of its own."""
    folder, result = whole
    assert [budget["tokens"] for budget in result["budgets"]] == list(inputs.settings.budget_tokens)
    for steps, decay_steps, place, found in zip(
        STEPS, (2, 4, 12), places(folder), result["budgets"], strict=True
    ):
        schedule = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": decay_steps, "decay_type": "1-sqrt"},
            "warmup_steps": 1,
        }
        alone = replace(
            inputs,
            settings=replace(inputs.settings, budgets=(), tokens=STEP_TOKENS * steps),
            train={**inputs.train, **schedule},
        )
        (expected,) = run_arm(ARM, alone, tmp_path / str(steps))["budgets"]
        for key in ("loss", "validation_loss", "standard_error"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6)
        ours, theirs = (
            load_file(run / "model" / "model.safetensors") for run in (place, tmp_path / str(steps))
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    losses = [budget["loss"] for budget in result["budgets"]]
    assert losses == sorted(losses, reverse=True)


def test_branches_train_no_step_twice(inputs, tmp_path, monkeypatch):
    steps = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)

    monkeypatch.setattr(ReportStep, "on_step_end", on_step_end)
    run_arm(ARM, inputs, tmp_path)
    assert steps == [*range(1, 31), *range(7, 11), *range(4, 6)]
    assert not list(tmp_path.glob("budget-*/checkpoint-*"))  # nothing goes on from there


class Killed(BaseException):
    pass


@pytest.mark.parametrize("number", [3, 4, 7, 20, 30, 31, 33, 34, 35, 36])
def test_a_killed_arm_goes_on(inputs, whole, tmp_path, monkeypatch, number):
    """After any of the 36 steps, of the trunk or of a branch."""
    count = 0

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ReportStep, "on_step_end", on_step_end)
        run_arm(ARM, inputs, tmp_path)
    result = run_arm(ARM, inputs, tmp_path)
    folder, expected = whole
    for found, wanted in zip(result["budgets"], expected["budgets"], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    for place, other in zip(places(tmp_path), places(folder), strict=True):
        ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (place, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_every_budget_has_its_own_best_rate(inputs, tmp_path):
    arm = Arm("subnet", learning_rates=(1e-5, 1e-2, 1e-1))
    result = run_variants(arm, inputs, tmp_path)
    of_rates = {
        rate: json.loads((tmp_path / f"lr-{rate:g}" / "arm.json").read_text())["budgets"]
        for rate in arm.learning_rates
    }
    for place, budget in enumerate(result["budgets"]):
        validated = {rate: found[place]["validation_loss"] for rate, found in of_rates.items()}
        best = min(validated, key=lambda rate: validated[rate])
        assert budget["learning_rate"] == best
        assert budget["loss"] == of_rates[best][place]["loss"]
    assert result["learning_rate"] == result["budgets"][-1]["learning_rate"]


@pytest.mark.parametrize(
    ("settings", "train", "sentence"),
    [
        ({"budgets": (640, 640)}, {}, "has one twice, or 0; remove it"),
        ({"budgets": ("640", 0)}, {}, "has one twice, or 0; remove it"),
        ({"budgets": ("6x",)}, {}, "'6x' is not a count"),
        ({"budgets": (640,), "bytes": 9}, {}, "bytes and pretrain.budgets are both set"),
        ({"budgets": (640, 1280), "decay": 1.0}, {}, "decay is 1.0; it must be between 0 and 1"),
        ({"budgets": (640, 630)}, {}, "are [10, 10] steps of 64 tokens; leave out"),
        ({"budgets": (640,)}, {"lr_scheduler_type": "cosine"}, "lr_scheduler_type is set"),
        (
            {"budgets": (640, 1280), "decay": 0.5},
            {"warmup_steps": 5},
            "one of 10 steps, of which 5",
        ),
        ({"target": "nobody"}, {}, "target is 'nobody'; choose best or an arm: scratch, proporti"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(settings, train, sentence):
    with pytest.raises(UserError) as caught:
        budgets_of(PretrainSettings(**settings), 64, train.get("warmup_steps", 0.05), train)
    assert sentence in str(caught.value)


def test_a_single_budget_has_the_schedule_of_several():
    """So that a rate which is best in a sweep is best for the run too."""
    (only,) = budgets_of(PretrainSettings(budgets=("1M",)), 1000, 0.05, {})
    assert only == Budget(1000, 50, 200) and only.schedule()["warmup_steps"] == 50


def test_a_warm_up_is_a_share_of_the_smallest_budget():
    settings = PretrainSettings(budgets=("1M", 4_000_000, "2M"), decay=0.25)
    found = budgets_of(settings, 1000, 0.05, {})
    assert found == [Budget(steps, 50, steps // 4) for steps in (1000, 2000, 4000)]
    assert [budget.branch_step for budget in found] == [750, 1500, 3000]
    (only,) = budgets_of(PretrainSettings(tokens=1500), 1000, 0.05, {"lr_scheduler_type": "x"})
    assert only == Budget(math.ceil(1.5)) and not only.schedule()
