"""Several seeds and learning rates are single runs, and their table is those runs' mean."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest

from headstart.training import variants
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.variants import run_variants


@pytest.fixture(scope="session")
def inputs(student_checkpoint, teacher_checkpoint, blocks) -> ArmInputs:
    settings = PretrainSettings(tokens=4 * 64, validation_tokens=80, evaluations=2, seeds=(3, 5))
    train = {"use_cpu": True, "per_device_train_batch_size": 4}
    return ArmInputs(student_checkpoint, teacher_checkpoint, blocks, settings, train)


def test_the_best_rate_is_reported_as_the_mean_over_its_seeds(inputs, tmp_path):
    arm = Arm("scratch", init="random", learning_rates=(1e-6, 1e-2))
    result = run_variants(arm, inputs, tmp_path / "all")
    single = {
        (rate, seed): run_arm(
            Arm("scratch", init="random", learning_rate=rate),
            replace(inputs, train={**inputs.train, "seed": seed}),
            tmp_path / f"{rate}-{seed}",
        )
        for rate in arm.learning_rates
        for seed in inputs.settings.seeds
    }
    runs, single = single, {key: run["curve"] for key, run in single.items()}
    last = {key: curve[-1]["loss"] for key, curve in single.items()}
    tested = [runs[1e-2, seed]["budgets"][0]["loss"] for seed in inputs.settings.seeds]
    assert len(set(last.values())) == 4
    assert result["learning_rate"] == 1e-2
    assert result["sweep"] == [
        {"learning_rate": rate, "loss_final": statistics.fmean([last[rate, 3], last[rate, 5]])}
        for rate in arm.learning_rates
    ]
    assert [seed["curve"] for seed in result["seeds"]] == [single[1e-2, 3], single[1e-2, 5]]
    assert result["loss_spread"] == pytest.approx(abs(tested[0] - tested[1]) / 2**0.5, rel=1e-9)
    (budget,) = result["budgets"]
    assert budget["losses"] == tested
    assert budget["loss"] == pytest.approx(sum(tested) / 2)
    before = [runs[1e-2, seed]["before"]["loss"] for seed in inputs.settings.seeds]
    assert result["before"]["loss"] == pytest.approx(sum(before) / 2)
    for point, one, other in zip(result["curve"], single[1e-2, 3], single[1e-2, 5], strict=True):
        assert point["tokens"] == one["tokens"]
        assert point["loss"] == pytest.approx((one["loss"] + other["loss"]) / 2)
    kept = json.loads((tmp_path / "all" / result["folder"] / "arm.json").read_text())
    assert kept["curve"] == single[1e-2, 3]


def test_one_rate_and_seed_is_the_arms_own_folder(inputs, tmp_path):
    alone = replace(inputs, settings=replace(inputs.settings, seeds=()))
    result = run_variants(Arm("subnet"), alone, tmp_path)
    assert (tmp_path / "arm.json").is_file() and result["folder"] == ""
    assert result["loss_spread"] is None


def test_a_rate_that_diverges_is_not_the_best(inputs, tmp_path, monkeypatch):
    losses = {1e-4: math.nan, 1e-3: 5.0, 1e-2: math.nan}
    trained = []

    def run_arm(arm, inputs, folder):
        trained.append(arm.learning_rate)
        loss = losses[arm.learning_rate]
        curve = [{"tokens": 0, "loss": 6.0}, {"tokens": 64, "loss": loss}]
        budget = {"tokens": 64, "loss": loss, "standard_error": 0.1, "validation_loss": loss}
        before = {"loss": 6.0, "standard_error": 0.1}
        budgets = [{**budget, "seconds": 1.0}]
        return {"curve": curve, "seconds": 1.0, "before": before, "budgets": budgets}

    monkeypatch.setattr(variants, "run_arm", run_arm)
    result = run_variants(Arm("subnet", learning_rates=tuple(losses)), inputs, tmp_path)
    assert set(trained) == set(losses)
    assert result["learning_rate"] == 1e-3 and result["curve"][-1]["loss"] == 5.0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Arm("a", learning_rates=(1e-3, -1.0)), "learning_rate -1.0; it must be above 0"),
        (lambda: Arm("a", learning_rates=(1e-3, 1e-3)), "one of its learning_rates twice"),
        (lambda: PretrainSettings(seeds=(1, 1)), r"pretrain.seeds \[1, 1\] has one twice"),
        (lambda: PretrainSettings(peak_tflops=-1.0), "pretrain.peak_tflops is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
