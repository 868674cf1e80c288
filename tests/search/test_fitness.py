"""Fitness equals the loss that transformers gives for the student on disk."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.search.fitness import HeldOutLoss
from headstart.search.space import (
    SEARCHED_AXES,
    Bin,
    Candidate,
    GridSettings,
    Orders,
    Space,
    shapes_in_bin,
)
from headstart.subnet.extract import extract
from headstart.subnet.rules import sizes_of

one_of_each_family = pytest.mark.parametrize(
    "teacher", ["llama-tied-gqa", "gpt_neox-untied"], indirect=True
)


@pytest.fixture
def blocks() -> Tensor:
    return torch.randint(128, (7, 24), generator=torch.manual_seed(2))


def fitness_of(teacher: PreTrainedModel, blocks: Tensor, batch_size: int = 3) -> HeldOutLoss:
    """Read the axes in a random order."""
    rng, own = random.Random(0), Orders.of_teacher(teacher.config)

    def shuffled(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rng.sample(units, len(units)))

    orders = Orders(
        shuffled(own.layers),
        shuffled(own.embed),
        tuple(map(shuffled, own.kv_groups)),
        tuple(map(shuffled, own.mlp)),
    )
    state = teacher.state_dict()
    if teacher.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return HeldOutLoss(state, teacher.config, orders, blocks, batch_size)


def space_of(teacher: PreTrainedModel, largest: float) -> Space:
    """Fine sub-networks of at most this share of the teacher."""
    sizes = sizes_of(teacher.config)
    bin = Bin(1, int(largest * teacher.num_parameters()))
    shapes = shapes_in_bin(teacher.config, GridSettings(), bin)
    return Space(shapes, tuple(sizes[axis] for axis in SEARCHED_AXES), fine=True)


@torch.no_grad()
def loss_on_disk(folder: Path, blocks: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return float(model(input_ids=blocks, labels=blocks).loss)


def test_fitness_equals_the_loss_of_the_student_on_disk(
    teacher: PreTrainedModel, blocks: Tensor, tmp_path: Path
) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    fitness, space = fitness_of(teacher, blocks), space_of(teacher, largest=0.8)
    for seed in range(2):
        candidate = space.sample(random.Random(seed))
        folder = tmp_path / f"student-{seed}"
        extract(tmp_path / "teacher", candidate.spec(fitness.orders), folder)
        assert fitness(candidate) == pytest.approx(loss_on_disk(folder, blocks), abs=1e-5)


def test_the_whole_teacher_has_its_own_loss(teacher: PreTrainedModel, blocks: Tensor) -> None:
    sizes = sizes_of(teacher.config)
    candidate = Candidate(*(tuple(range(sizes[axis])) for axis in SEARCHED_AXES))
    with torch.no_grad():
        expected = float(teacher(input_ids=blocks, labels=blocks).loss)
    assert fitness_of(teacher, blocks)(candidate) == pytest.approx(expected, abs=1e-5)


@one_of_each_family
def test_fitness_leaves_teacher_and_disk_alone(
    teacher: PreTrainedModel, blocks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    fitness, space = fitness_of(teacher, blocks), space_of(teacher, largest=1)
    rng = random.Random(0)
    losses = {candidate: fitness(candidate) for candidate in (space.sample(rng) for _ in range(4))}
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert list(tmp_path.iterdir()) == []
    for candidate, loss in reversed(losses.items()):
        assert fitness(candidate) == loss  # nothing that came between left a trace


@one_of_each_family
def test_batch_size_does_not_change_the_loss(teacher: PreTrainedModel, blocks: Tensor) -> None:
    candidate = space_of(teacher, largest=0.5).sample(random.Random(0))
    losses = [fitness_of(teacher, blocks, size)(candidate) for size in (1, 3, 7, 50)]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)
