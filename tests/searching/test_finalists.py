"""Finalists are trained as plain torch would, apart from the teacher, and once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import extract, random_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.model.architecture import Architecture
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.finalists import FinalistSettings, choose_finalists, run_finals
from headstart.searching.fitness import HeldOutLoss
from headstart.searching.journal import Evaluated, Journal
from headstart.searching.space import Space, SpaceName
from headstart.searching.units import Units

SETTINGS = FinalistSettings(count=3, steps=20, learning_rate=2e-3, batch_size=3)
BLOCK_LENGTH = 20


def counting(num_blocks: int, seed: int) -> Tensor:
    """Blocks with something to learn: each counts in steps of 1 to 5."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(128, (num_blocks, 1), generator=generator)
    stride = torch.randint(1, 6, (num_blocks, 1), generator=generator)
    return (start + stride * torch.arange(BLOCK_LENGTH)) % 128


def fitness_of(teacher: PreTrainedModel, held_out: Tensor) -> HeldOutLoss:
    architecture = Architecture.of(teacher.config)
    orders = Orders.of_teacher(architecture.sizes)
    return HeldOutLoss(teacher, architecture, orders, held_out, 4)


def whole_width(teacher: PreTrainedModel) -> Candidate:
    """Half the depth and neurons; the embedding is kept whole, and so is the teacher's own."""
    sizes = Architecture.of(teacher.config).sizes
    groups, neurons = (Units(sizes["kv_groups"]),), (Units(sizes["mlp"] // 2),)
    return Candidate(Units(2), Units(sizes["embed"]), sizes["head_dim"], groups, neurons)


def sampled(teacher: PreTrainedModel, name: SpaceName, seed: int = 0) -> Candidate:
    bin = Bin(1, teacher.num_parameters() // 2)
    return Space.build(Architecture.of(teacher.config), name, bin).sample(random.Random(seed))


def scored(candidate: Candidate, loss: float = 5.0) -> Evaluated:
    return Evaluated(1, "mutation", candidate, 100, loss, 7 * BLOCK_LENGTH, 0.5)


def plain_loss(model: PreTrainedModel, held_out: Tensor, train: Tensor) -> float:
    """The same training, told by torch and transformers alone."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS.learning_rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 2))
    for step in range(20):
        batch = torch.stack(
            [train[place % len(train)] for place in (3 * step, 3 * step + 1, 3 * step + 2)]
        )
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=held_out, labels=held_out).loss)


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-untied"])
@pytest.mark.parametrize("num_blocks", [80, 10], ids=["once", "repeated"])
def test_training_is_that_of_a_plain_loop(kind: str, num_blocks: int, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    teacher.save_pretrained(tmp_path / "teacher")
    held_out, train = counting(7, seed=0), counting(num_blocks, seed=1)
    fitness = fitness_of(teacher, held_out)
    candidates = [whole_width(teacher), sampled(teacher, "fine-uniform")]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    journal = Journal(tmp_path / "j", {})
    finals = run_finals(
        list(map(scored, candidates)), fitness, train, SETTINGS, journal, fitness.student
    )
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    for place, (candidate, final) in enumerate(zip(candidates, finals, strict=True)):
        folder = tmp_path / f"student-{place}"
        extract(tmp_path / "teacher", candidate.spec(fitness.teacher, fitness.orders), folder)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = plain_loss(student, held_out, train)
        untrained = fitness(candidate, 0, 7) / (7 * (BLOCK_LENGTH - 1))
        assert final.loss == pytest.approx(expected, abs=1e-5)
        assert final.loss < untrained - 0.2
        assert replace(final, loss=5.0, seconds=0.5, steps=0, started=False) == scored(candidate)
        assert final.steps == 20 and final.seconds > 0


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-untied"])
def test_layerwise_finalists_learn_too(kind: str, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    held_out, train = counting(7, seed=0), counting(40, seed=1)
    fitness = fitness_of(teacher, held_out)
    samples = (sampled(teacher, "fine-layerwise", seed) for seed in range(100))
    candidate = next(sample for sample in samples if len({units.size for units in sample.mlp}) > 2)
    journal = Journal(tmp_path / "j", {})
    (final,) = run_finals([scored(candidate)], fitness, train, SETTINGS, journal, fitness.student)
    twin = fitness.student(candidate).requires_grad_(True)
    for parameter in twin.parameters():
        parameter.data = parameter.data.clone()
    assert final.loss == pytest.approx(plain_loss(twin, held_out, train), abs=1e-5)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each optimizer that was made; the third dies at once."""
    made: list[int] = []

    class Counted(torch.optim.AdamW):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            made.append(len(made))
            if len(made) == 3:
                raise KeyboardInterrupt
            super().__init__(*arguments, **more)

    monkeypatch.setattr(torch.optim, "AdamW", Counted)
    return made


def test_finals_that_were_killed_go_on(trainings: list[int], tmp_path: Path) -> None:
    teacher = random_teacher("llama-tied-gqa")
    fitness, train = fitness_of(teacher, counting(7, seed=0)), counting(10, seed=1)
    finalists = [scored(sampled(teacher, "fine-uniform", seed)) for seed in range(4)]
    settings = replace(SETTINGS, steps=2)

    def finals() -> list[Evaluated]:
        journal = Journal(tmp_path / "j", {})
        journal.append(
            [score for score in finalists if journal.find(score.candidate, score.tokens) is None]
        )
        told: list[Evaluated] = []
        scores = run_finals(
            finalists, fitness, train, settings, journal, fitness.student, told.append
        )
        assert told == scores
        return scores

    with pytest.raises(KeyboardInterrupt):
        finals()
    first_two = [score for score in Journal(tmp_path / "j", {}).scores.values() if score.steps]
    assert [score.candidate for score in first_two] == [score.candidate for score in finalists[:2]]
    scores = finals()
    assert scores[:2] == first_two  # even their seconds
    assert [score.candidate for score in scores] == [score.candidate for score in finalists]
    assert len(trainings) == 5  # of which the third was killed
    assert finals() == scores and len(trainings) == 5
    settings = replace(settings, steps=3)  # another training is another score
    finals()
    assert len(trainings) == 9


def test_finalists_are_the_best_of_different_shapes() -> None:
    def score(layers: int, embed: int, neurons: int, loss: float) -> Evaluated:
        inner = (Units(neurons),)
        return scored(Candidate(Units(layers), Units(embed), 8, inner, inner), loss=loss)

    ranked = [
        score(10, 100, 1, 1.0),
        score(13, 130, 1, 1.1),  # too like the first
        score(10, 100, 2, 1.2),  # of its very shape
        score(14, 100, 1, 1.3),  # deeper by 1.4
        score(10, 70, 1, 1.4),  # narrower by more than 1.4
        score(19, 100, 1, 1.5),  # too like the fourth
        score(10, 50, 1, 1.6),
    ]
    found = [choose_finalists(ranked, count) for count in range(6)]
    places = [[ranked.index(score) for score in chosen] for chosen in found]
    assert places == [[], [0], [0, 3], [0, 3, 4], [0, 3, 4, 6], [0, 3, 4, 6]]
    # The one that is always in keeps out what is too like it.
    kept = choose_finalists(ranked, 3, always=ranked[5].candidate)
    assert [ranked.index(score) for score in kept] == [0, 4, 5]
    assert choose_finalists(ranked, 0, always=ranked[5].candidate) == []
    assert choose_finalists([], 3) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": -1}, "count is -1; use at least 0"),
        ({"steps": -1}, "steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; it must be above 0"),
    ],
)
def test_settings_errors_name_the_setting(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"search.finalists.{message}"):
        replace(SETTINGS, **changed)
