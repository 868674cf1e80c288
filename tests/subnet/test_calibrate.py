"""Calibration as a whole: what is cut, by which statistics, and that it is done once."""

from typing import get_args

import pytest
import torch
from tests.conftest import random_teacher
from tests.subnet.oracles import assert_same_tensors, random_spec
from transformers import AutoModelForCausalLM

from headstart.subnet import calibrate as module
from headstart.subnet.calibrate import Init, calibrate, calibration_flops, cut_config
from headstart.subnet.count import count
from headstart.subnet.cut import slice_tensors, student_of
from headstart.subnet.extract import extract, read_tensors
from headstart.subnet.propagate import refit_on_itself
from headstart.subnet.rules import read_config, sizes_of
from headstart.subnet.spec import SubnetSpec
from headstart.subnet.statistics import statistics_flops


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and full precision whatever the CPU is fast at."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("headstart.device.has_fast_bf16", lambda device: False)


@pytest.fixture
def blocks():
    return torch.randint(1, 128, (16, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("init", get_args(Init))
def test_a_student_on_disk_is_the_one_in_memory(init, teacher_folder, blocks, tmp_path):
    found = calibrate(teacher_folder, init, blocks)
    cut = AutoModelForCausalLM.from_pretrained(found.teacher)
    assert cut.config.tie_word_embeddings == (init != "rotate+least_squares")
    spec = random_spec(cut, layers=3, embed=30, kv_groups=1, mlp=40)
    sliced = dict(slice_tensors(read_tensors(found.teacher), cut.config, spec, found.statistics))
    if found.blocks is not None:
        sliced = refit_on_itself(found.teacher, sliced.items(), spec, found.blocks)
    student = student_of(sliced.items(), cut.config, spec)
    out = extract(
        found.teacher, spec, tmp_path / "out", statistics=found.statistics, blocks=found.blocks
    )
    written = AutoModelForCausalLM.from_pretrained(out)
    assert type(written) is type(cut)
    assert_same_tensors(written.state_dict(), student.state_dict())
    assert count(read_config(out), 20).parameters == written.num_parameters()


@pytest.mark.parametrize("init", get_args(Init))
@torch.no_grad()
def test_keeping_everything_keeps_the_teachers_logits(init, teacher_folder, blocks, tmp_path):
    found = calibrate(teacher_folder, init, blocks)
    spec = SubnetSpec.identity(sizes_of(read_config(found.teacher)))
    out = extract(
        found.teacher, spec, tmp_path / "out", statistics=found.statistics, blocks=found.blocks
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (out, teacher_folder)
    )
    expected = teacher(blocks).logits
    torch.testing.assert_close(student(blocks).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_second_calibration_reads_nothing_but_the_cache(teacher_folder, blocks, monkeypatch):
    first = calibrate(teacher_folder, "rotate+least_squares", blocks)
    monkeypatch.setattr(module, "load_frozen", None)
    again = calibrate(teacher_folder, "rotate+least_squares", blocks)
    plain = calibrate(teacher_folder, "least_squares", blocks)
    assert (again.teacher, again.flops) == (first.teacher, first.flops)
    assert first.statistics and again.statistics and plain.statistics
    assert torch.equal(again.statistics.basis, first.statistics.basis)
    assert plain.statistics.folder == first.statistics.folder
    assert plain.teacher == teacher_folder and plain.flops == first.flops
    with pytest.raises(TypeError):
        calibrate(teacher_folder, "least_squares", blocks[:8])  # other tokens are measured anew


def test_what_cannot_be_rotated_is_refused_before_it_is_measured(saved, blocks, monkeypatch):
    monkeypatch.setattr(module, "load_frozen", None)
    folder = saved(random_teacher("gpt_neox-untied"))
    with pytest.raises(ValueError, match="gpt_neox teacher cannot be rotated"):
        calibrate(folder, "rotate+least_squares", blocks)
    with pytest.raises(ValueError, match="gpt_neox teacher cannot be rotated"):
        cut_config(read_config(folder), "rotate+least_squares")


def test_flops_are_a_forward_pass_and_the_products(teacher_folder, blocks):
    config = read_config(teacher_folder)
    outputs = 2 * config.vocab_size * config.hidden_size
    forward = (count(config, 20).inference_flops_per_token - outputs) * blocks.numel()
    expected = forward + statistics_flops(config, blocks.numel())
    assert calibrate(teacher_folder, "least_squares", blocks).flops == expected
    assert calibrate(teacher_folder, "slice", blocks).flops == 0
    assert calibration_flops(config, "rotate+least_squares", *blocks.shape) == expected
