"""What calibration is charged is what torch counts while it happens, to the last operation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher
from tests.flop_oracle import counted_flops
from tests.model.oracles import random_layerwise_spec, random_spec

from headstart.calibration.activations import TeacherPass
from headstart.calibration.costs import (
    propagation_flops,
    rotation_flops,
    slice_refit_flops,
    statistics_flops,
)
from headstart.calibration.layer_by_layer import batches_of
from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics, collect_statistics
from headstart.calibration.propagate import propagated
from headstart.calibration.rotate import principal_basis, rotated_architecture, rotated_tensors
from headstart.model.architecture import Architecture
from headstart.model.cut import build_student, slice_tensors
from headstart.model.spec import SubnetSpec

FAMILIES = [*TEACHERS, *DESCENDANTS]
ROTATABLE = ("llama-tied-gqa", "llama-untied-gqa", "mistral-untied", "qwen2-tied", "phi3-untied")
NARROWABLE = [kind for kind in FAMILIES if not kind.startswith("gemma3")]
CUT = {"layers": 3, "embed": 24, "kv_groups": 1, "mlp": 40}


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(2, 128, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", FAMILIES)
def test_measuring_a_teacher(kind: str, blocks: torch.Tensor, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    counted = counted_flops(lambda: collect_statistics(teacher, batches_of(blocks), tmp_path))
    assert statistics_flops(Architecture.of(teacher.config), *blocks.shape) == counted


@pytest.mark.parametrize("kind", ROTATABLE)
def test_rotating_a_teacher(kind: str, blocks: torch.Tensor, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    architecture = Architecture.of(teacher.config)
    collect_statistics(teacher, batches_of(blocks), tmp_path)
    statistics = Statistics(tmp_path)
    state = {name: teacher.get_parameter(name) for name, _ in teacher.named_parameters()}

    def rotate() -> None:
        dict(rotated_tensors(state, architecture, principal_basis(statistics.residual())))

    with torch.no_grad():
        assert rotation_flops(architecture) == counted_flops(rotate)


@pytest.mark.parametrize(
    ("kind", "is_rotated"),
    [*((kind, False) for kind in FAMILIES), *((kind, True) for kind in ROTATABLE)],
)
def test_refitting_a_slice(
    kind: str, is_rotated: bool, blocks: torch.Tensor, tmp_path: Path
) -> None:
    teacher = random_teacher(kind)
    architecture = Architecture.of(teacher.config)
    collect_statistics(teacher, batches_of(blocks), tmp_path)
    statistics = Statistics(tmp_path)
    tensors = {name: tensor.detach() for name, tensor in teacher.named_parameters()}
    if is_rotated:
        cut_from = rotated_architecture(architecture)
        basis = principal_basis(statistics.residual())
        tensors = dict(rotated_tensors(tensors, architecture, basis))
        architecture, statistics = cut_from, replace(statistics, basis=basis)
    for cut in (CUT, {"mlp": 40}, {"layers": 3, "embed": 32}):
        spec = random_layerwise_spec(teacher, 0, **cut)

        def refit(spec: SubnetSpec = spec) -> None:
            changed = refitted(tensors.items(), architecture, spec, statistics)
            dict(slice_tensors(changed, architecture, spec))

        sizes = spec.sizes(architecture.sizes)
        assert slice_refit_flops(architecture, sizes, is_rotated) == counted_flops(refit)


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [*((kind, 16) for kind in FAMILIES), *((kind, 8) for kind in NARROWABLE)],
)
def test_refitting_a_student_on_itself(kind: str, head_dim: int, blocks: torch.Tensor) -> None:
    teacher = random_teacher(kind)
    architecture = Architecture.of(teacher.config)
    cut = CUT if head_dim == architecture.sizes["head_dim"] else CUT | {"head_dim": head_dim}
    for make_spec in (random_spec, random_layerwise_spec):
        spec = make_spec(teacher, 0, **cut)
        student = build_student(teacher.state_dict().items(), architecture, spec)
        own = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        student.load_state_dict(own)
        tensors = {name: tensor.clone() for name, tensor in student.named_parameters()}
        batches = batches_of(blocks)
        beside = TeacherPass(teacher, batches)
        counted = counted_flops(lambda: list(propagated(beside, student, tensors, spec)))  # noqa: B023
        sizes = spec.sizes(architecture.sizes)
        assert propagation_flops(architecture, sizes, *blocks.shape) == counted
