"""Activations are computed again where a GPU needs it, alike in all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEACHERS

from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.training import checkpointing
from headstart.training.arguments import training_arguments
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.checkpointing import choose_checkpointing
from headstart.training.memory import chosen_memory, setup_of
from headstart.training.settings import Arm, PretrainSettings

ARM = Arm("subnet+kd", kd=DistillationSettings())
MODEL = Architecture.of(TEACHERS["llama-untied-gqa"]().config)
BLOCK_LENGTH = 256


def made(folder: Path, train: dict[str, Any]) -> Any:
    return training_arguments({"use_cpu": True, **train}, ARM, folder)


def peaks(folder: Path) -> tuple[int, int]:
    """Planned without and with checkpoints."""
    found = []
    for checkpoints in (False, True):
        train = {"activation_checkpointing": checkpoints}
        setup = setup_of(made(folder, train), train, BLOCK_LENGTH, False)
        found.append(chosen_memory(ARM.kd, MODEL, MODEL, setup, 1, 0.0)[1].peak)
    return found[0], found[1]


def chosen(folder: Path, train: dict[str, Any]) -> tuple[bool, bool]:
    arguments = made(folder, train)
    choose_checkpointing(ARM, arguments, train, MODEL, MODEL, BLOCK_LENGTH, False)
    return arguments.gradient_checkpointing, arguments.activation_checkpointing


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what each process' GPU has."""

    def let(*sizes: int | None) -> None:
        monkeypatch.setattr(checkpointing, "memory_bytes", lambda device: sizes[0])
        monkeypatch.setattr(checkpointing, "gather", lambda own: list(sizes))

    return let


def test_it_is_chosen_if_that_alone_makes_the_arm_fit(memory, tmp_path, capsys):
    plain, again = peaks(tmp_path)
    assert again < plain
    memory(plain)
    assert chosen(tmp_path, {}) == (False, False)
    assert capsys.readouterr().err == ""
    for sizes in ((plain - 1,), (again,), (plain, again)):  # the smallest GPU counts
        memory(*sizes)
        assert chosen(tmp_path, {}) == (True, True)
        told = " ".join(capsys.readouterr().err.split())
        assert told.startswith("arm subnet+kd computes activations again")
        assert told.endswith("train.activation_checkpointing: false turns that off")
    memory(again - 1)
    assert chosen(tmp_path, {}) == (False, False)
    assert "lower train.per_device_train_batch_size" in " ".join(capsys.readouterr().err.split())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_what_the_recipe_says_stands(memory, tmp_path, key, value):
    plain, _ = peaks(tmp_path)
    memory(plain - 1)
    assert chosen(tmp_path, {key: value}) == (value, value)


def test_other_devices_are_left_alone(memory, tmp_path):
    memory(None)
    assert chosen(tmp_path, {}) == (False, False)
    memory(1, None)
    assert chosen(tmp_path, {}) == (False, False)


def test_the_trainer_does_what_was_chosen(
    student_checkpoint, teacher_checkpoint, blocks, tmp_path, monkeypatch
):
    """The same losses, from activations that were computed again."""
    settings = PretrainSettings(tokens=128, validation_tokens=80, evaluations=1)
    train = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4}
    inputs = ArmInputs(student_checkpoint, teacher_checkpoint, blocks, settings, train)
    plain = run_arm(ARM, inputs, tmp_path / "plain")
    calls = []
    monkeypatch.setattr(checkpointing, "memory_bytes", lambda device: 10**12)
    whole = checkpointing.chosen_memory
    monkeypatch.setattr(
        checkpointing, "chosen_memory", lambda *args: calls.append(1) or (True, whole(*args)[1])
    )
    again = run_arm(ARM, inputs, tmp_path / "again")
    assert calls
    losses = [[point["loss"] for point in run["curve"]] for run in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
