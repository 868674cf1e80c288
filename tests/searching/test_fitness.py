"""Fitness equals the loss that transformers gives for the student."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import extract, random_teacher
from tests.model.oracles import reference_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.model.architecture import Architecture
from headstart.model.spec import SubnetSpec
from headstart.searching.bins import Bin
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.fitness import (
    DivergenceFromTeacher,
    HeldOutLoss,
    fitting_batch_size,
    put_in_order,
)
from headstart.searching.space import Space, SpaceName
from headstart.searching.units import Units

NUM_BLOCKS, BLOCK_LENGTH = 7, 24
NUM_TARGETS = NUM_BLOCKS * (BLOCK_LENGTH - 1)

one_of_each_family = pytest.mark.parametrize(
    "teacher", ["llama-tied-gqa", "gpt_neox-untied"], indirect=True
)


@pytest.fixture
def blocks() -> Tensor:
    return torch.randint(128, (NUM_BLOCKS, BLOCK_LENGTH), generator=torch.manual_seed(2))


def fitness_of(
    teacher: PreTrainedModel, blocks: Tensor, batch_size: int = 3, kl: bool = False
) -> HeldOutLoss:
    """Read the axes in a random order."""
    rng, architecture = random.Random(0), Architecture.of(teacher.config)
    teacher_order = Orders.of_teacher(architecture.sizes)

    def shuffled(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rng.sample(units, len(units)))

    orders = Orders(
        shuffled(teacher_order.layers),
        shuffled(teacher_order.embed),
        tuple(map(shuffled, teacher_order.kv_groups)),
        tuple(map(shuffled, teacher_order.mlp)),
    )
    kind = DivergenceFromTeacher if kl else HeldOutLoss
    return kind(teacher, architecture, orders, blocks, batch_size)


def space_of(teacher: PreTrainedModel, largest: float, name: SpaceName = "fine-uniform") -> Space:
    """Sub-networks of at most this share of the teacher."""
    return Space.build(
        Architecture.of(teacher.config), name, Bin(1, int(largest * teacher.num_parameters()))
    )


@torch.no_grad()
def test_fitness_equals_the_loss_of_the_student_on_disk(
    teacher: PreTrainedModel, blocks: Tensor, tmp_path: Path
) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    fitness, space = fitness_of(teacher, blocks), space_of(teacher, largest=0.8)
    for seed in range(2):
        candidate = space.sample(random.Random(seed))
        folder = tmp_path / f"student-{seed}"
        extract(tmp_path / "teacher", candidate.spec(fitness.teacher, fitness.orders), folder)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loss = float(student(input_ids=blocks, labels=blocks).loss)
        assert fitness(candidate, 0, NUM_BLOCKS) / NUM_TARGETS == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kl", [False, True])
def test_layerwise_fitness_equals_that_of_the_whole_weights_in_float64(
    teacher: PreTrainedModel, blocks: Tensor, kl: bool
) -> None:
    """Nothing is sliced by the oracle: what is dropped is multiplied by zero."""
    fitness, space = fitness_of(teacher, blocks, kl=kl), space_of(teacher, 0.8, "fine-layerwise")
    samples = (space.sample(random.Random(seed)) for seed in range(100))
    candidate = next(sample for sample in samples if len({units.size for units in sample.mlp}) > 1)
    identity = SubnetSpec.identity(fitness.teacher.sizes)
    student, whole = (
        reference_logits(teacher, blocks, spec)[:, :-1].log_softmax(-1)
        for spec in (candidate.spec(fitness.teacher, fitness.orders), identity)
    )
    if kl:
        nats = (whole.exp() * (whole - student)).sum(-1)
    else:
        nats = -student.gather(-1, blocks[:, 1:, None]).squeeze(-1)
    for start, stop in ((0, 1), (1, 6), (2, 7)):
        expected = float(nats[start:stop].sum())
        assert fitness(candidate, start, stop) == pytest.approx(expected, rel=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kl", [False, True])
def test_a_teacher_in_order_is_the_same_and_gives_the_same_candidates_as_views(
    teacher: PreTrainedModel, blocks: Tensor, kl: bool
) -> None:
    fitness, logits = fitness_of(teacher, blocks, kl=kl), teacher(blocks).logits
    as_refitted = replace(fitness, refit_blocks=blocks)
    candidates = [
        space_of(teacher, 0.8, name).sample(random.Random(1))
        for name in ("coarse-uniform", "fine-layerwise")
    ]
    before = [fitness(candidate, 0, NUM_BLOCKS) for candidate in candidates]
    refitted = [as_refitted(candidate, 0, NUM_BLOCKS) for candidate in candidates]
    first = next(iter(fitness.state))
    moved, orders = fitness.state[first].clone(), fitness.orders
    fitness = replace(fitness, orders=put_in_order(fitness.state, fitness.teacher, orders))
    assert not torch.equal(fitness.state[first], moved)
    torch.testing.assert_close(teacher(blocks).logits, logits, rtol=1e-4, atol=1e-5)
    after = [fitness(candidate, 0, NUM_BLOCKS) for candidate in candidates]
    assert after == pytest.approx(before, rel=1e-5)
    as_refitted = replace(fitness, refit_blocks=blocks)
    after = [as_refitted(candidate, 0, NUM_BLOCKS) for candidate in candidates]
    assert after == pytest.approx(refitted, rel=1e-5)
    places = {tensor.untyped_storage().data_ptr() for tensor in fitness.state.values()}
    for weight in fitness.student(candidates[0]).parameters():
        assert weight.untyped_storage().data_ptr() in places


@torch.no_grad()
@pytest.mark.parametrize("name", ["fine-uniform", "fine-layerwise"])
def test_divergence_equals_the_dense_formula(
    teacher: PreTrainedModel, blocks: Tensor, name: SpaceName
) -> None:
    fitness = fitness_of(teacher, blocks, kl=True)
    candidate = space_of(teacher, 0.8, name).sample(random.Random(1))
    student = fitness.student(candidate)
    ours, theirs = (
        model(blocks).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher)
    )
    expected = float((theirs.exp() * (theirs - ours)).sum())
    assert fitness(candidate, 0, NUM_BLOCKS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kl", [False, True])
@one_of_each_family
def test_parts_add_up_in_batches_of_any_size(
    teacher: PreTrainedModel, blocks: Tensor, kl: bool
) -> None:
    candidate = space_of(teacher, 0.5, "fine-layerwise").sample(random.Random(0))
    for batch_size in (1, 3, 50):
        fitness = fitness_of(teacher, blocks, batch_size, kl)
        parts = [fitness(candidate, *part) for part in ((0, 2), (2, 3), (3, 7))]
        whole = fitness_of(teacher, blocks, 7, kl)(candidate, 0, 7)
        assert sum(parts) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kl", [False, True])
def test_a_candidate_that_computes_no_numbers_has_no_score(blocks: Tensor, kl: bool) -> None:
    teacher = random_teacher("llama-tied-gqa")
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    fitness = replace(fitness_of(teacher, blocks, kl=kl), refit_blocks=blocks)
    candidate = space_of(teacher, 0.5, "fine-layerwise").sample(random.Random(0))
    assert math.isnan(fitness(candidate, 0, NUM_BLOCKS))


def test_the_whole_teacher_has_its_own_loss(teacher: PreTrainedModel, blocks: Tensor) -> None:
    sizes = Architecture.of(teacher.config).sizes
    layers, embed, groups, neurons = (
        Units(sizes[axis]) for axis in ("layers", "embed", "kv_groups", "mlp")
    )
    candidate = Candidate(layers, embed, sizes["head_dim"], (groups,), (neurons,))
    with torch.no_grad():
        expected = float(teacher(input_ids=blocks, labels=blocks).loss)
    found = fitness_of(teacher, blocks)(candidate, 0, NUM_BLOCKS) / NUM_TARGETS
    assert found == pytest.approx(expected, abs=1e-5)
    divergence = fitness_of(teacher, blocks, kl=True)(candidate, 0, NUM_BLOCKS)
    assert divergence == pytest.approx(0, abs=1e-4)


@one_of_each_family
def test_fitness_leaves_teacher_and_disk_alone(
    teacher: PreTrainedModel, blocks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    fitness, space = fitness_of(teacher, blocks), space_of(teacher, largest=1)
    rng = random.Random(0)
    losses = {
        candidate: fitness(candidate, 0, NUM_BLOCKS)
        for candidate in (space.sample(rng) for _ in range(4))
    }
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert list(tmp_path.iterdir()) == []
    for candidate, loss in reversed(losses.items()):
        assert fitness(candidate, 0, NUM_BLOCKS) == loss  # nothing between left a trace


def test_a_batch_on_a_cpu_is_as_many_blocks_as_pay() -> None:
    from headstart.searching.fitness import CPU_TOKENS_PER_BATCH

    sizes = [fitting_batch_size(None, length, torch.device("cpu"), 4) for length in (256, 10**6)]  # type: ignore[arg-type]
    assert sizes == [CPU_TOKENS_PER_BATCH // 256, 1]


def test_a_batch_on_a_gpu_fills_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_teacher("llama-tied-gqa").config
    sizes, free = Architecture.of(config).sizes, 0

    def fitting(num_bytes: int, block_length: int = 64, bytes_per_number: int = 2) -> int:
        nonlocal free
        free = num_bytes
        return fitting_batch_size(sizes, block_length, torch.device("cuda"), bytes_per_number)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    gib = 1 << 30
    assert fitting(gib // 8) == pytest.approx(2 * fitting(gib // 16), abs=1)
    assert fitting(gib // 8) == pytest.approx(2 * fitting(gib // 8, 128), abs=1)
    assert fitting(gib // 8) == pytest.approx(2 * fitting(gib // 8, 64, 4), abs=1)
    # Of each token at least the residual stream and two neurons' worth must fit into the half.
    least_bytes = 64 * (config.hidden_size + 2 * config.intermediate_size) * 2
    assert 2 * fitting(gib // 8) * least_bytes < gib // 8
    assert fitting(1000) == 1
    assert fitting(1000 * gib) * 64 <= 1 << 18  # no batch is worth more
