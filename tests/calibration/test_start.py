"""Calibration as a whole: what is cut, by which statistics, and that it is done once."""

from typing import get_args

import pytest
import torch
from tests.conftest import random_teacher
from tests.model.oracles import assert_same_tensors, random_spec
from transformers import AutoModelForCausalLM

from headstart.calibration import start as module
from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics, collect_statistics
from headstart.calibration.propagate import refit_on_itself
from headstart.calibration.share import Share
from headstart.calibration.start import Init, calibrate, cut_architecture
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import assemble_student, slice_tensors
from headstart.model.spec import SubnetSpec
from headstart.runs.extraction import extract_student


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and full precision whatever the CPU is fast at."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("headstart.system.device.has_fast_bf16", lambda device: False)


@pytest.fixture
def blocks():
    return torch.randint(1, 128, (16, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("init", get_args(Init))
def test_a_student_on_disk_is_the_one_in_memory(init, teacher_folder, blocks, tmp_path):
    found = calibrate(Checkpoint.open(teacher_folder), init, blocks)
    cut = AutoModelForCausalLM.from_pretrained(found.teacher.folder)
    assert cut.config.tie_word_embeddings == (init != "rotate+least_squares")
    spec = random_spec(cut, layers=3, embed=30, kv_groups=1, mlp=40)
    architecture, tensors = Architecture.of(cut.config), found.teacher.tensors()
    if found.statistics is not None:
        tensors = refitted(tensors, architecture, spec, found.statistics)
    sliced = dict(slice_tensors(tensors, architecture, spec))
    if found.blocks is not None:
        sliced = refit_on_itself(found.teacher, sliced.items(), spec, found.blocks)
    student = assemble_student(sliced.items(), architecture, spec)
    out = extract_student(found, spec, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(out)
    assert type(written) is type(cut)
    assert_same_tensors(written.state_dict(), student.state_dict())
    assert Architecture.read(out).count(20).parameters == written.num_parameters()


@pytest.mark.parametrize("init", get_args(Init))
@torch.no_grad()
def test_keeping_everything_keeps_the_teachers_logits(init, teacher_folder, blocks, tmp_path):
    found = calibrate(Checkpoint.open(teacher_folder), init, blocks)
    spec = SubnetSpec.identity(found.teacher.architecture.sizes)
    out = extract_student(found, spec, tmp_path / "out")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (out, teacher_folder)
    )
    expected = teacher(blocks).logits
    torch.testing.assert_close(student(blocks).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_second_calibration_reads_nothing_but_the_cache(teacher_folder, blocks, monkeypatch):
    checkpoint = Checkpoint.open(teacher_folder)
    first = calibrate(checkpoint, "rotate+least_squares", blocks)
    monkeypatch.setattr(module, "load_frozen", None)
    again = calibrate(checkpoint, "rotate+least_squares", blocks)
    plain = calibrate(checkpoint, "least_squares", blocks)
    assert (again.teacher, again.flops) == (first.teacher, first.flops)
    assert first.statistics and again.statistics and plain.statistics
    assert torch.equal(again.statistics.basis, first.statistics.basis)
    assert plain.statistics.folder == first.statistics.folder
    assert plain.teacher == checkpoint and 0 < plain.flops < first.flops
    with pytest.raises(TypeError):
        calibrate(checkpoint, "least_squares", blocks[:8])  # other tokens are measured anew


def test_what_cannot_be_rotated_is_refused_before_it_is_measured(saved, blocks, monkeypatch):
    monkeypatch.setattr(module, "load_frozen", None)
    checkpoint = Checkpoint.open(saved(random_teacher("gpt_neox-untied")))
    with pytest.raises(ValueError, match="gpt_neox teacher cannot be rotated"):
        calibrate(checkpoint, "rotate+least_squares", blocks)
    with pytest.raises(ValueError, match="gpt_neox teacher cannot be rotated"):
        cut_architecture(checkpoint.architecture, "rotate+least_squares")


def test_processes_exchange_tensors_in_one_order(tmp_path, monkeypatch):
    """Of a teacher whose biases come after all weights: a layer's weight waits for its bias, on the
    process alone that solves for the layer."""
    monkeypatch.setattr(Share, "of_layer", lambda share, tensor, layer, device: tensor)
    teacher = random_teacher("llama-untied-mha-biases")
    architecture = Architecture.of(teacher.config)
    spec = random_spec(teacher, layers=3, embed=32, mlp=40)
    collect_statistics(teacher, [torch.arange(1, 65)[None]], tmp_path)
    state = sorted(teacher.state_dict().items(), key=lambda pair: pair[0].endswith("bias"))
    made, exchanged = list[list[str]](), list[list[str]]()
    for share in (Share(0, 2), Share(1, 2)):
        whole = refitted(state, architecture, spec, Statistics(tmp_path), share=share)
        sliced = list(slice_tensors(whole, architecture, spec))
        made.append([name for name, _ in sliced])
        exchange = module._exchanged(sliced, architecture, len(spec.layers), share)
        exchanged.append([name for name, _ in exchange])
    assert made[0] != made[1] and sorted(made[0]) == sorted(made[1])
    assert exchanged[0] == exchanged[1]
