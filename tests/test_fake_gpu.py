"""A rehearsal without a GPU: what would run on one, on tensors that have a device and no numbers.

PyTorch's FakeTensorMode refuses operations on tensors of two devices, as a GPU does. "lazy" stands
for the GPU, the only other device whose tensors a build without CUDA indexes. A second mode counts
how often the program waits for the device, to read a number or to copy to the CPU.

Not reached: autocast and a GPU's own kernels; the optimizer and the loader of batches; what goes on
with numbers on the CPU (orders of units, the choice of a search); files; refitting a slice by
moments and rotation, which both begin with these.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, TrainingArguments

from headstart.calibration import moments
from headstart.calibration.activations import TeacherPass
from headstart.calibration.moments import collect_statistics
from headstart.calibration.propagate import propagated
from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.model.cut import assemble_student, slice_tensors
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.fitness import DivergenceFromTeacher, HeldOutLoss
from headstart.searching.importance import measure_importance
from headstart.searching.units import Units
from headstart.training.teacher import Teacher
from headstart.training.trainer import DistillationTrainer

GPU = torch.device("lazy")
FAMILIES = TEACHERS | DESCENDANTS
KINDS = pytest.mark.parametrize("kind", FAMILIES)


class FakeGPU(TorchDispatchMode):
    """Counts what waits for the device; a number that is read from it is 1."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.waits = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_of_gpu = any(tensor.device.type == GPU.type for tensor in tensors)
        if is_of_gpu and function is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return 1
        result = function(*args, **(kwargs or {}))
        self.waits += is_of_gpu and isinstance(result, Tensor) and result.device.type == "cpu"
        return result

    @_disable_current_modes()
    def model(self, kind: str) -> PreTrainedModel:
        """A random model in eval mode that claims to be on the device."""
        with torch.device("meta"):
            model = FAMILIES[kind]()
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False)]:
                fake = FakeTensor(self.mode, tensor.detach(), GPU)
                setattr(module, name, torch.nn.Parameter(fake))
            for name, tensor in [*module.named_buffers(recurse=False)]:
                setattr(module, name, FakeTensor(self.mode, tensor, GPU))
        model.tie_weights()
        return model.eval()


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with FakeTensorMode() as mode, FakeGPU(mode) as gpu:
        yield gpu


def some_blocks(device: torch.device = GPU) -> Tensor:
    return torch.zeros(4, 16, dtype=torch.int64, device=device)


def some_candidate(architecture: Architecture) -> tuple[Candidate, Orders]:
    sizes = architecture.sizes
    layers = sizes["layers"]
    orders = Orders(
        layers=tuple(range(layers)),
        embed=tuple(range(sizes["embed"])),
        kv_groups=(tuple(range(sizes["kv_groups"])),) * layers,
        mlp=(tuple(range(sizes["mlp"])),) * layers,
    )
    groups = sizes["kv_groups"] - 1
    embed = groups * sizes["q_per_kv"] * sizes["head_dim"]
    embed = embed if embed < sizes["embed"] else sizes["embed"] // 2
    parts = Units(layers - 1), Units(embed), sizes["head_dim"], (Units(groups),), (Units(8),)
    return Candidate(*parts), orders


def test_the_fake_gpu_finds_what_it_is_for(gpu):
    tensor = torch.ones(3, device=GPU)
    with pytest.raises(FakeTensorDeviceMismatchError):
        tensor + torch.ones(3)
    assert bool(tensor.sum() > 0) and tensor[0].item() == 1 and tensor.cpu().shape == (3,)
    assert gpu.waits == 3
    assert (tensor * 2).to(GPU).sum().device.type == GPU.type and gpu.waits == 3


@KINDS
@pytest.mark.parametrize("learns", [True, False], ids=["teacher", "text"])
def test_a_training_step_waits_for_nothing(kind, learns, gpu, tmp_path, monkeypatch):
    set_up = TrainingArguments._setup_devices
    monkeypatch.setattr(
        TrainingArguments, "device", property(lambda self: set_up.__get__(self) and GPU)
    )
    monkeypatch.setattr(DistillationTrainer, "_move_model_to_device", lambda *arguments: None)
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    model = gpu.model(kind)
    trainer = DistillationTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        teacher=Teacher(gpu.model(kind).requires_grad_(False)) if learns else None,
        distillation=DistillationSettings() if learns else None,
        tokens_per_step=64,
        evaluation_steps=set(),
    )
    model.train()
    gpu.waits = 0
    for _ in range(2):
        loss = trainer.compute_loss(model, {"input_ids": some_blocks()})
        loss.backward()
    assert gpu.waits == 0
    gradients = {parameter.grad.device.type for parameter in model.parameters()}
    assert gradients == {GPU.type} == {loss.device.type}


@KINDS
@pytest.mark.parametrize("fitness", [HeldOutLoss, DivergenceFromTeacher])
def test_scoring_a_candidate_waits_for_its_score_alone(kind, fitness, gpu):
    teacher = gpu.model(kind)
    architecture = Architecture.of(teacher.config)
    candidate, orders = some_candidate(architecture)
    score = fitness(teacher, architecture, orders, some_blocks(), 2)
    gpu.waits = 0
    score(candidate, 0, 4)
    assert gpu.waits == 1


@KINDS
@pytest.mark.parametrize("units", ["magnitude", "activation", "contribution", "taylor"])
def test_importance_waits_for_its_four_scores_however_much_text(kind, units, gpu):
    teacher, counts = gpu.model(kind), []
    for num_batches in (1, 3):
        gpu.waits = 0
        measure_importance(teacher, [some_blocks()] * num_batches, units=units)
        counts.append(gpu.waits)
    assert counts == [4, 4]


@KINDS
def test_moments_wait_once_for_each(kind, gpu, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(moments, "save_file", lambda tensors, file: written.extend(tensors))
    collect_statistics(gpu.model(kind), [some_blocks()] * 3, Path())
    assert gpu.waits == len(written) > 0


@KINDS
def test_refitting_waits_once_for_each_tensor(kind, gpu):
    teacher = gpu.model(kind)
    architecture = Architecture.of(teacher.config)
    candidate, orders = some_candidate(architecture)
    spec = candidate.spec(architecture, orders)
    sliced = dict(slice_tensors(teacher.state_dict().items(), architecture, spec))
    student = assemble_student(sliced.items(), architecture, spec)
    on_cpu = {name: tensor.cpu() for name, tensor in sliced.items()}
    gpu.waits = 0
    refitted = list(propagated(TeacherPass(teacher, [some_blocks()] * 3), student, on_cpu, spec))
    assert gpu.waits == len(refitted) > 0
