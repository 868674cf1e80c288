"""Refits students, alone or on two processes under torchrun; started by test_share.py.

For each kind of teacher and number of blocks every process writes what it has refitted, in float64,
and the tokens that it has counted; then all of them extract students in float32, some of which need
the moments of their teacher, or a rotated one.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tests.conftest import random_teacher
from tests.model.oracles import random_spec

from headstart.calibration.activations import TeacherPass
from headstart.calibration.layer_by_layer import batches_of
from headstart.calibration.propagate import propagated
from headstart.calibration.share import Share
from headstart.calibration.start import Init, calibrate
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import build_student
from headstart.runs.extraction import extract_student
from headstart.system import device
from headstart.system.distributed import process_group, rank

CASES = [
    ("llama-tied-gqa", 16),
    ("llama-untied-mha-biases", 16),
    ("llama-untied-gqa", 1),  # of which the second process has none
    ("gpt_neox-untied", 5),
    ("gemma3_text-tied", 16),
]
CUT: dict[str, Any] = {"layers": 3, "embed": 32, "kv_groups": 1, "mlp": 40}
STUDENTS: dict[str, tuple[str, Init, dict[str, Any]]] = {
    "layer by layer": ("llama-untied-gqa", "least_squares", {}),
    "narrow heads": ("llama-untied-mha-biases", "least_squares", {"head_dim": 8}),
    "norms that write": ("gemma3_text-untied", "least_squares", {}),
    "rotated": ("llama-tied-gqa", "rotate+least_squares", {}),
}


@torch.no_grad()
def refit(kind: str, num_blocks: int, out: Path) -> None:
    teacher = random_teacher(kind).double()
    architecture, spec = Architecture.of(teacher.config), random_spec(teacher, **CUT)
    blocks = torch.randint(1, 128, (num_blocks, 20), generator=torch.Generator().manual_seed(0))
    share, counted = Share.of_this_process(num_blocks), []
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = build_student(state.items(), architecture, spec)
    tensors = {name: tensor.detach().clone() for name, tensor in student.named_parameters()}
    source = TeacherPass(teacher, batches_of(share.blocks(blocks)))
    parts = (source, student, tensors, spec, counted.append)
    changed = {name: tensor.clone() for name, tensor in propagated(*parts, share=share)}
    torch.save((changed, sum(counted) // len(spec.layers)), out)


def main(folder: Path, teachers: Path) -> None:
    device.has_fast_bf16 = lambda device: False
    with process_group():
        for place, case in enumerate(CASES):
            refit(*case, folder / f"{place}-{rank()}.pt")
        blocks = torch.randint(1, 128, (13, 16), generator=torch.Generator().manual_seed(1))
        for name, (kind, init, cut) in STUDENTS.items():
            spec = random_spec(random_teacher(kind), **CUT, **cut)
            checkpoint = Checkpoint.open(teachers / kind)
            source = calibrate(checkpoint, init, blocks, spec, together=True)
            extract_student(source, spec, folder / name, together=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
