"""Rotated teachers: the same function at full width, ordered by what the stream holds."""

import pytest
import torch
from tests.conftest import random_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.calibration.moments import Statistics, collect_statistics, rms_norms_of, sources_of
from headstart.calibration.rotate import (
    check_rotates,
    principal_basis,
    read_rotated,
    rotated_architecture,
    rotated_tensors,
    write_rotated,
)
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import build_student
from headstart.model.spec import SubnetSpec

ROTATE = [
    "llama-tied-gqa",
    "llama-untied-gqa",
    "llama-untied-mha-biases",
    "mistral-untied",
    "qwen2-tied",
    "qwen2-untied",
    "qwen3-tied",
    "qwen3-untied-biases",
    "phi3-untied",
    "phi3-tied-partial",
]


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (6, 20), generator=torch.Generator().manual_seed(0))


def measured(model, tokens, folder):
    folder.mkdir()
    collect_statistics(model, tokens.split(3), folder)
    return Statistics(folder)


def rotated_teacher(model, basis):
    """The model in another basis, in memory, and its architecture."""
    teacher = Architecture.of(model.config)
    architecture = rotated_architecture(teacher)
    tensors = rotated_tensors(model.state_dict(), teacher, basis)
    whole = SubnetSpec.identity(architecture.sizes)
    return build_student(tensors, architecture, whole), architecture


@pytest.mark.parametrize("kind", ROTATE)
def test_a_rotated_teacher_computes_what_it_did(kind, tokens, saved, tmp_path):
    """On disk and loaded by transformers itself, in float32, with random norms and biases."""
    model = random_teacher(kind)
    statistics = measured(model, tokens, tmp_path / "statistics")
    (tmp_path / "rotated").mkdir()
    teacher = Checkpoint.open(saved(model))
    write_rotated(teacher, principal_basis(statistics.residual()), tmp_path / "rotated")
    turned, _ = read_rotated(tmp_path / "rotated")
    rotated = AutoModelForCausalLM.from_pretrained(turned.folder)
    assert type(rotated) is type(model)
    assert not rotated.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(
            rotated(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4
        )
    for name, parameter in rotated.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    architecture = Architecture.of(rotated.config)
    assert architecture.count(20).parameters == rotated.num_parameters()
    for name in turned.files:
        architecture.match(name)


@pytest.mark.parametrize("kind", ROTATE)
def test_its_channels_are_uncorrelated_and_ordered(kind, tokens, tmp_path):
    model = random_teacher(kind)
    before = measured(model, tokens, tmp_path / "before").residual()
    basis = principal_basis(before)
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64))
    rotated, _ = rotated_teacher(model, basis)
    after = measured(rotated, tokens, tmp_path / "after").residual()
    variances = after.diagonal()
    assert (variances.diff() < 1e-3).all()
    torch.testing.assert_close(after, torch.diag(variances), atol=1e-3, rtol=0)
    eigenvalues = torch.linalg.eigvalsh(before).flip(0)
    torch.testing.assert_close(variances, eigenvalues, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ROTATE)
def test_turned_statistics_are_those_of_the_rotated_teacher(kind, tokens, tmp_path):
    """Measured anew, in a second pass."""
    model = random_teacher(kind)
    before = measured(model, tokens, tmp_path / "before")
    basis = principal_basis(before.residual())
    turned = Statistics(before.folder, basis)
    rotated, architecture = rotated_teacher(model, basis)
    anew = measured(rotated, tokens, tmp_path / "after")
    for pattern in set(sources_of(architecture).values()):
        source = pattern.format(i=2)
        for moments in ("gram", "mean"):
            found, expected = (getattr(side, moments)(source) for side in (turned, anew))
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    for pattern in rms_norms_of(architecture):
        norm = pattern.format(i=2)
        torch.testing.assert_close(turned.share(norm), anew.share(norm), atol=1e-3, rtol=1e-3)


def test_the_basis_does_not_depend_on_the_signs_that_a_solver_chose():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    basis = principal_basis(half @ half.T)
    largest = basis.abs().argmax(dim=0)
    assert (basis[largest, torch.arange(8)] > 0).all()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt_neox-untied", "gpt_neox teacher cannot be rotated: its .* is a LayerNorm"),
        ("olmo2-tied", "olmo2 teacher cannot be rotated: .*into the residual stream"),
        ("gemma3_text-tied", "gemma3_text teacher cannot be rotated: .*into the residual stream"),
    ],
)
def test_other_norms_are_refused_by_name(kind, reason):
    with pytest.raises(ValueError, match=reason):
        check_rotates(Architecture.of(random_teacher(kind).config))


def test_the_tokenizer_goes_along(teacher_folder, tmp_path):
    whole = torch.eye(48, dtype=torch.float64)
    write_rotated(Checkpoint.open(teacher_folder), whole, tmp_path)
    turned, basis = read_rotated(tmp_path)
    assert torch.equal(basis, whole)
    assert AutoTokenizer.from_pretrained(turned.folder).eos_token == "<end>"
