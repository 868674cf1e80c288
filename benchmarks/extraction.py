"""Memory and time of cutting a student out of a teacher that is much larger.

    python benchmarks/extraction.py [FOLDER]

The teacher has the shape of Pythia-6.9B, in bfloat16 and in shards of 5 GB, 13.7 GB in all, of
numbers made up on disk; the student that of Pythia-410M, with channels, heads and neurons from all
over the teacher and half of each head. FOLDER, which needs 15 GB, is a temporary one if not given.
Extraction runs in a process of its own, whose peak resident memory is read; that includes whatever
of the teacher's file is mapped at that moment. Beside it stands `dd`, which reads as many bytes as
the student has, from the teacher's first shard, before and after. The ratio is the memory allowed,
1.5 times the student and 500 MB, over the peak.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig

from headstart.calibration.start import Calibration
from headstart.model.architecture import Architecture
from headstart.model.axes import shape_of
from headstart.model.checkpoint import Checkpoint
from headstart.model.rotary import head_channels
from headstart.model.spec import SubnetSpec
from headstart.runs.extraction import extract_student

GOAL = 1.0
SHARD_BYTES = 5_000_000_000
TEACHER = Architecture.of(
    GPTNeoXConfig(
        vocab_size=50_432,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=16_384,
        dtype="bfloat16",
    )
)
LAYERS, EMBED, HEADS, HEAD_DIM, NEURONS = 24, 1024, 16, 64, 4096


def make_teacher(folder: Path) -> None:
    """Write the shards one by one; their numbers do not matter to what cutting them costs."""
    folder.mkdir(parents=True)
    sizes = TEACHER.sizes
    names = {
        pattern.replace("{i}", str(layer)): shape_of(layout, sizes)
        for pattern, layout in TEACHER.layouts.items()
        for layer in (range(sizes["layers"]) if "{i}" in pattern else (0,))
    }
    numbers = torch.randn(1 << 20).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    index, held_bytes = {}, 0
    for name, shape in names.items():
        size = torch.Size(shape).numel()
        if held_bytes + 2 * size > SHARD_BYTES:
            write(folder, shards)
            held_bytes = 0
        repeated = numbers.repeat(size // len(numbers) + 1)[:size]
        shards[-1][name] = repeated.view(shape).contiguous()
        index[name] = f"model-{len(shards)}.safetensors"
        held_bytes += 2 * size
    write(folder, shards)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    TEACHER.config.save_pretrained(folder)


def write(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Write the last shard, and begin another."""
    save_file(shards[-1], folder / f"model-{len(shards)}.safetensors", {"format": "pt"})
    shards[-1] = {}
    shards.append({})


def spread(count: int, size: int) -> tuple[int, ...]:
    """So many of an axis' indices, at irregular distances over all of it."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return tuple(sorted(order[:count].tolist()))


def student_spec() -> SubnetSpec:
    sizes = TEACHER.sizes
    return SubnetSpec(
        layers=spread(LAYERS, sizes["layers"]),
        embed=spread(EMBED, sizes["embed"]),
        kv_groups=(spread(HEADS, sizes["kv_groups"]),) * LAYERS,
        mlp=(spread(NEURONS, sizes["mlp"]),) * LAYERS,
        head_dim=head_channels(TEACHER.config.rope_parameters, sizes["head_dim"], HEAD_DIM),
    )


def work(teacher: Path, out: Path) -> None:
    """Extract, and print what it took as JSON."""
    start = time.perf_counter()
    extract_student(Calibration(Checkpoint.open(teacher)), student_spec(), out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak * (1 if sys.platform == "darwin" else 1024)
    seconds = time.perf_counter() - start
    assert Checkpoint.open(teacher).hash
    hashing = time.perf_counter() - start - seconds
    print(json.dumps({"seconds": seconds, "hashing": hashing, "peak_bytes": peak_bytes}))


def seconds_of_dd(shard: Path, num_bytes: int) -> float:
    start = time.perf_counter()
    count = f"count={num_bytes // 1_000_000}"
    command = ["dd", f"if={shard}", "of=/dev/null", "bs=1000000", count, "status=none"]
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)
        teacher, out = folder / "teacher", folder / "student"
        if not teacher.is_dir():
            # In a process of its own: Linux counts a parent's memory to its children's peak.
            subprocess.run([sys.executable, __file__, "--make", str(teacher)], check=True)
        shutil.rmtree(out, ignore_errors=True)
        student_sizes = student_spec().sizes(TEACHER.sizes)
        student_bytes = 2 * TEACHER.amount(student_sizes, "parameters", 1)
        shard = teacher / "model-1.safetensors"
        dd = [seconds_of_dd(shard, student_bytes)]
        command = [sys.executable, __file__, "--work", str(teacher), str(out)]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        dd.append(seconds_of_dd(shard, student_bytes))
        took: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        written = (out / "model.safetensors").stat().st_size
        teacher_bytes = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
    allowed = 1.5 * student_bytes + 500e6
    print(f"teacher {teacher_bytes / 1e9:.1f} GB, student {written / 1e9:.3f} GB")
    print(f"peak {took['peak_bytes'] / 1e6:,.0f} MB of {allowed / 1e6:,.0f} MB")
    print(
        f"extraction {took['seconds']:.1f} s, dd of the student's bytes {min(dd):.1f} s: ", end=""
    )
    print(f"{took['seconds'] / min(dd):.1f} times; {took['hashing']:.1f} s are the teacher's hash")
    print(f"ratio: {allowed / took['peak_bytes']:.2f}x (goal {GOAL:.2f}x)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_teacher(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
