"""What a student computes, against its teacher."""

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import TEACHERS, random_teacher
from tests.subnet.oracles import assert_same_tensors, masked_parent, random_spec, reference_logits
from transformers import AutoModelForCausalLM

from headstart.subnet.extract import build_student, extract
from headstart.subnet.rules import sizes_of
from headstart.subnet.spec import SubnetSpec

LLAMAS = [kind for kind in TEACHERS if kind.startswith("llama")]
NEOXES = [kind for kind in TEACHERS if kind.startswith("gpt_neox")]


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(0))


def in_memory(model, spec):
    return build_student(model.state_dict(), model.config, spec)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


# What is kept whole


def test_identity_is_bit_exact_on_disk(teacher, saved, tokens, tmp_path):
    folder = saved(teacher)
    out = extract(folder, SubnetSpec.identity(sizes_of(teacher.config)), tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert_same_tensors(written, load_file(folder / "model.safetensors"))
    student = AutoModelForCausalLM.from_pretrained(out)
    assert_same_tensors(student.state_dict(), teacher.state_dict())
    assert torch.equal(logits(student, tokens), logits(teacher, tokens))


def test_identity_is_bit_exact_in_memory(teacher, tokens):
    student = in_memory(teacher, SubnetSpec.identity(sizes_of(teacher.config)))
    assert_same_tensors(student.state_dict(), teacher.state_dict())
    assert torch.equal(logits(student, tokens), logits(teacher, tokens))
    for name, parameter in student.named_parameters():
        assert parameter.data_ptr() == teacher.get_parameter(name).data_ptr(), name


# What is cut


@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in TEACHERS for cut in (
        {"layers": 2}, {"mlp": 40}, {"layers": 3, "mlp": 7}
    )] + [(kind, cut) for kind in LLAMAS for cut in (
        {"kv_groups": 1}, {"layers": 3, "kv_groups": 2, "mlp": 7}
    )],
)  # fmt: skip
def test_a_student_is_its_masked_parent(kind, cut, tokens):
    model = random_teacher(kind)
    spec = random_spec(model, **cut)
    expected = logits(masked_parent(model, spec), tokens)
    torch.testing.assert_close(logits(in_memory(model, spec), tokens), expected, atol=1e-5, rtol=0)


def test_the_reference_is_the_whole_parent(teacher, tokens):
    spec = SubnetSpec.identity(sizes_of(teacher.config))
    expected = reference_logits(teacher, tokens, spec)
    torch.testing.assert_close(logits(teacher, tokens).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in LLAMAS for cut in (
        {"embed": 36},
        {"embed": 18, "layers": 2, "kv_groups": 1, "mlp": 40},
    )] + [(kind, cut) for kind in NEOXES for cut in (
        {"embed": 48, "kv_groups": 3},
        {"embed": 32, "kv_groups": 2, "layers": 3, "mlp": 40},
    )],
)  # fmt: skip
def test_a_narrower_student_is_the_reference_over_kept_channels(kind, cut, tokens, saved, tmp_path):
    model = random_teacher(kind)
    spec = random_spec(model, **cut)
    expected = reference_logits(model, tokens, spec)
    student = in_memory(model, spec)
    torch.testing.assert_close(logits(student, tokens).double(), expected, atol=1e-5, rtol=0)
    written = AutoModelForCausalLM.from_pretrained(extract(saved(model), spec, tmp_path / "out"))
    assert torch.equal(logits(written, tokens), logits(student, tokens))
