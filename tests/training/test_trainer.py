"""Trainer steps against steps in plain torch, and which steps and checkpoints it picks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from headstart.losses.distillation import DistillationSettings
from headstart.system.device import load_frozen
from headstart.text.blocks import BlockDataset, TokenBlocks
from headstart.training import trainer as trainer_module
from headstart.training.teacher import Teacher
from headstart.training.trainer import (
    DistillationTrainer,
    evaluation_steps,
    last_whole_checkpoint,
    seconds_until,
)

LEARNING_RATE = 0.1
KD = DistillationSettings(alpha=0.3, beta=0.8, temperature=2.5)


@pytest.fixture
def model(student_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(student_folder)


@pytest.fixture
def online_teacher(teacher_folder: Path) -> Teacher:
    return Teacher(load_frozen(teacher_folder, torch.device("cpu")))


@pytest.fixture
def train_blocks(blocks: TokenBlocks) -> np.ndarray:
    return blocks.split("train")[:8]


@pytest.fixture
def make_trainer(model, blocks, train_blocks, tmp_path):
    """A trainer with plain SGD, by default of one step on all of `train_blocks`."""

    def make(
        teacher: Teacher | None = None,
        evaluation_steps: tuple[int, ...] = (),
        on_step: Any = lambda steps, note: None,
        kd: DistillationSettings = KD,
        **arguments: Any,
    ) -> DistillationTrainer:
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 3,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return DistillationTrainer(
            model=model,
            args=TrainingArguments(**(defaults | arguments)),
            train_dataset=BlockDataset(train_blocks),
            eval_dataset=BlockDataset(blocks.split("validation")),
            teacher=teacher,
            distillation=kd if teacher else None,
            tokens_per_step=train_blocks.size,
            evaluation_steps=set(evaluation_steps),
            on_step=on_step,
        )

    return make


def dense_loss(
    model: PreTrainedModel,
    rows: np.ndarray,
    teacher: Teacher | None,
    weights: tuple[float, float] = (KD.alpha, KD.beta),
) -> Tensor:
    """The loss as transformers and torch write it, from all logits at once."""
    alpha, beta = weights
    tokens = torch.from_numpy(rows.astype(np.int64))
    outputs = model(tokens, labels=tokens)
    if teacher is None:
        return outputs.loss
    with torch.no_grad():
        teacher_logits = teacher.model(tokens).logits[:, :-1].flatten(0, 1)
    soft = functional.kl_div(
        torch.log_softmax(outputs.logits[:, :-1].flatten(0, 1) / KD.temperature, dim=1),
        torch.log_softmax(teacher_logits / KD.temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return alpha * outputs.loss + beta * KD.temperature**2 * soft


def manual_step(
    model: PreTrainedModel,
    rows: np.ndarray,
    teacher: Teacher | None,
    weights: tuple[float, float] = (KD.alpha, KD.beta),
) -> float:
    loss = dense_loss(model, rows, teacher, weights)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    model.zero_grad()
    return loss.item()


@pytest.mark.parametrize("is_counted", [True, False], ids=["counted", "not-counted"])
def test_gradients_do_not_depend_on_how_a_batch_is_accumulated(
    make_trainer, model, online_teacher, monkeypatch, is_counted
):
    """1 x 8, 2 x 4 and 8 x 1 blocks, also if the Trainer does not count the targets."""
    if not is_counted:
        count = DistillationTrainer.compute_loss
        monkeypatch.setattr(
            DistillationTrainer,
            "compute_loss",
            lambda self, model, inputs, return_outputs=False, num_items_in_batch=None: count(
                self, model, inputs, return_outputs
            ),
        )
    before = {name: part.clone() for name, part in model.state_dict().items()}
    steps = []
    for batch_size in (1, 2, 8):
        model.load_state_dict(before)
        trainer = make_trainer(
            online_teacher,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
        )
        trainer.train()
        after = trainer.model.state_dict()
        steps.append({name: (before[name] - after[name]) / LEARNING_RATE for name in before})
    for other in steps[1:]:
        for name, gradient in steps[0].items():
            torch.testing.assert_close(gradient, other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("distil", [False, True], ids=["text", "teacher"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_is_the_step_of_plain_torch(
    make_trainer, model, train_blocks, online_teacher, distil, accumulation
):
    teacher = online_teacher if distil else None
    expected = copy.deepcopy(model)
    expected_loss = manual_step(expected, train_blocks, teacher)
    trainer = make_trainer(
        teacher,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(expected_loss, abs=1e-4)]


@pytest.mark.parametrize(
    ("schedule", "expected_weights"),
    [
        ("switch", [(0.3, 0.8), (0.3, 0.8), (0.9, 0.0), (0.9, 0.0)]),
        ("linear", [(0.3, 0.8), (0.6, 0.4), (0.9, 0.0), (0.9, 0.0)]),
    ],
)
def test_weights_follow_the_schedule_and_the_teacher_is_asked_only_while_it_weighs(
    make_trainer, model, train_blocks, online_teacher, schedule, expected_weights, monkeypatch
):
    expected = copy.deepcopy(model)
    for weights in expected_weights:
        manual_step(expected, train_blocks, online_teacher, weights)
    asked, hidden = [], Teacher.hidden
    monkeypatch.setattr(Teacher, "hidden", lambda *args: asked.append(1) or hidden(*args))
    kd = replace(
        KD, schedule=schedule, schedule_tokens=2 * train_blocks.size, alpha_end=0.9, beta_end=0.0
    )
    make_trainer(online_teacher, kd=kd, max_steps=4).train()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    assert len(asked) == 2


def test_evaluation_is_cross_entropy_also_when_distilling(
    make_trainer, model, blocks, online_teacher
):
    model.eval()
    expected = dense_loss(model, blocks.split("validation"), None).item()
    trainer = make_trainer(online_teacher)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluates_before_training_and_at_the_asked_steps(make_trainer):
    steps: list[int] = []
    trainer = make_trainer(
        evaluation_steps=(2, 3, 7),
        on_step=lambda step, note: steps.append((step, note)),
        max_steps=7,
        eval_on_start=True,
    )
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 3, 7]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6, 7]
    last_train = next(entry["loss"] for entry in history if entry["step"] == 6)
    last_evaluation = next(e["eval_loss"] for e in history if e["step"] == 3 and "eval_loss" in e)
    assert f"train {last_train:.3f}" in steps[-1][1]
    assert f"validation {last_evaluation:.3f}" in steps[-1][1]


def test_the_teacher_is_neither_trained_nor_saved(make_trainer, model, online_teacher, tmp_path):
    before = copy.deepcopy(online_teacher.model.state_dict())
    make_trainer(online_teacher, max_steps=2, save_strategy="steps", save_steps=2).train()
    torch.testing.assert_close(online_teacher.model.state_dict(), before, rtol=0, atol=0)
    assert not online_teacher.model.training
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) <= set(model.state_dict())
    assert sum(tensor.numel() for tensor in saved.values()) == model.num_parameters()


@pytest.mark.parametrize(
    ("num_steps", "num_evaluations"), [(1, 1), (1, 20), (3, 20), (20, 3), (100, 20), (12207, 20)]
)
def test_evaluation_steps_grow_and_end_at_the_last(num_steps, num_evaluations):
    steps = evaluation_steps(num_steps, num_evaluations)
    assert steps[0] >= 1 and steps[-1] == num_steps
    assert steps == sorted(set(steps))
    assert len(steps) <= num_evaluations
    gaps = np.diff([0, *steps])
    assert all(later >= earlier - 1 for earlier, later in pairwise(gaps))


def test_enough_steps_get_as_many_evaluations_as_asked():
    assert len(evaluation_steps(1000, 20)) == 20


def write_checkpoint(folder: Path, step: int, state: str | None = '{"log_history": []}') -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"weight": torch.ones(50)}, checkpoint / "model.safetensors")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path):
    kept = [write_checkpoint(tmp_path, step) for step in (9, 100, 10)]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert all(checkpoint.is_dir() for checkpoint in kept)


@pytest.mark.parametrize("state", [None, "", '{"log_history": [{"ste'])
def test_cut_off_checkpoints_are_removed(tmp_path, state):
    write_checkpoint(tmp_path, 9)
    cut_off = [write_checkpoint(tmp_path, step, state) for step in (10, 11)]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert not any(checkpoint.exists() for checkpoint in cut_off)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_cut_file_is_passed_over(tmp_path, name):
    for step in (9, 10):
        folder = write_checkpoint(tmp_path, step)
        for state in ("optimizer.pt", "rng_state.pth"):
            torch.save({"step": torch.ones(50)}, folder / state)
    assert last_whole_checkpoint(tmp_path) == folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_a_checkpoint_counts_as_whole_once_every_process_has_written_its_part(
    make_trainer, tmp_path, monkeypatch
):
    """Processes wait for one another after all else is there, and before trainer_state.json."""
    seen: list[set[str]] = []

    def barrier() -> None:
        seen.append({path.name for path in (tmp_path / "checkpoint-1").iterdir()})

    monkeypatch.setattr(trainer_module, "barrier", barrier)
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    whole = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert [whole - names for names in seen] == [{"trainer_state.json"}]


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "absent") is None
    write_checkpoint(tmp_path, 10, state=None)
    assert last_whole_checkpoint(tmp_path) is None


def test_seconds_are_those_of_the_last_log(tmp_path):
    history = [{"step": 1, "seconds": 2.5}, {"step": 2, "seconds": 7.0}, {"step": 2}]
    checkpoint = write_checkpoint(tmp_path, 2, json.dumps({"log_history": history}))
    assert seconds_until(checkpoint) == 7.0
    assert seconds_until(None) == 0.0


@pytest.mark.parametrize("bf16", [True, False])
def test_logits_have_the_precision_of_training(make_trainer, online_teacher, monkeypatch, bf16):
    seen: set[torch.dtype] = set()
    trainer = make_trainer(online_teacher, bf16=bf16, use_cpu=True)
    loss = trainer.distillation_loss

    def watched(logits: Tensor, *rest: Any) -> Any:
        seen.add(logits.dtype)
        return loss(logits, *rest)

    monkeypatch.setattr(trainer, "distillation_loss", watched)
    trainer.train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("learns", [True, False])
def test_a_compiled_step_is_the_step(
    make_trainer, online_teacher, model, train_blocks, backend, learns
):
    teacher = online_teacher if learns else None
    expected = copy.deepcopy(model)
    manual_step(expected, train_blocks, teacher)
    torch._dynamo.reset()
    make_trainer(teacher, torch_compile=True, torch_compile_backend=backend).train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
