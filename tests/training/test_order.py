"""The order of training is known beforehand, and is the one that the model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from headstart.losses.distillation import DistillationSettings
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.order import Wanted, arm_reads, first_reads, training_order
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.trainer import DistillationTrainer


def test_epochs_are_shuffled_as_accelerate_shuffles() -> None:
    sampler = SeedableRandomSampler(range(50), data_seed=7)
    expected = [place for _ in range(3) for place in sampler]
    assert training_order(50, 130, seed=7).tolist() == expected[:130]
    assert training_order(50, 30, seed=7).tolist() == expected[:30]


def test_first_reads_keep_the_order() -> None:
    orders = [training_order(20, 45, seed) for seed in (3, 4)]
    seen: list[int] = []
    for place in np.concatenate(orders).tolist():
        if place not in seen:
            seen.append(place)
    assert first_reads(orders).tolist() == seen


@pytest.mark.parametrize("data_seed", [None, 5])
def test_the_model_sees_that_order(
    student_checkpoint, teacher_checkpoint, blocks, tmp_path: Path, monkeypatch, data_seed
) -> None:
    """Over more than one epoch, whose length is no multiple of a step's."""
    split = blocks.split("train")
    assert len(split) % 7
    settings = PretrainSettings(
        tokens=(len(split) + 20) * split.shape[1], validation_tokens=80, evaluations=1
    )
    train = {"use_cpu": True, "per_device_train_batch_size": 7, "seed": 3, "data_seed": data_seed}
    inputs = ArmInputs(student_checkpoint, teacher_checkpoint, blocks, settings, train)
    seen: list[torch.Tensor] = []
    compute_loss = DistillationTrainer.compute_loss

    def recording(self: Any, model: Any, batch: Any, *more: Any, **options: Any) -> Any:
        if model.training:
            seen.append(batch["input_ids"])
        return compute_loss(self, model, batch, *more, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", recording)
    run_arm(Arm("a"), inputs, tmp_path / "arm")
    reads = arm_reads(Arm("a"), settings, train, split.shape[1])
    order = training_order(len(split), reads.stop, reads.seed)
    assert reads.start == 0
    assert len(order) > len(split)
    np.testing.assert_array_equal(torch.cat(seen).numpy(), split[order])
    assert sorted(Wanted("", (reads,)).order(len(split))) == list(range(len(split)))


@pytest.mark.parametrize(
    "kd",
    [
        DistillationSettings(0.5, 0.5),
        DistillationSettings(1.0, 0.0),
        DistillationSettings(0.0, 1.0, schedule="switch", schedule_tokens=250),
        DistillationSettings(0.0, 1.0, schedule="linear", schedule_tokens=240),
        DistillationSettings(
            1.0, 0.0, schedule="switch", schedule_tokens=250, alpha_end=0.0, beta_end=1.0
        ),
        DistillationSettings(
            1.0, 0.0, schedule="linear", schedule_tokens=250, alpha_end=0.0, beta_end=1.0
        ),
        DistillationSettings(0.0, 1.0, schedule="switch", schedule_tokens=9_999),
    ],
)
def test_the_teacher_is_asked_in_the_steps_in_which_it_has_a_weight(
    kd: DistillationSettings,
) -> None:
    weighs = [step for step in range(20) if kd.weights(step * 40)[1] > 0]
    asked = kd.asked_steps(20, 40)
    assert set(weighs) <= set(asked)
    assert len(asked) <= len(weighs) + 1  # the first step of a linear rise from zero
