"""Planned against measured memory of training.

    python benchmarks/memory.py

Each case trains a real arm of random weights for two or three steps in a process of its own, and
reads by how much the most memory that it held (VmHWM) exceeds what it held before the model was
loaded. Two processes of torchrun are a case too, of which the first is measured. What `headstart
plan` counts stands beside it: in the precision and with the chunks of this machine's CPU, and
without the share for a GPU's allocator, which a CPU does not have. Every case begins with a tiny
arm, so that libraries are loaded and count for neither side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from headstart.losses.distillation import DistillationSettings
from headstart.model.checkpoint import Checkpoint
from headstart.system.device import has_fast_bf16, release_memory
from headstart.system.distributed import is_main, process_group, world_size
from headstart.text.blocks import TokenBlocks
from headstart.training.activations import Batch
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.memory import Memory, Sharing, arm_memory
from headstart.training.settings import Arm, PretrainSettings

VOCAB, BLOCK_LENGTH = 8192, 512
SPLITS = {"train": 64, "search": 2, "validation": 2, "test": 2}
SIZES = {
    "tiny": (64, 1, 2),
    "student": (512, 6, 8),
    "teacher": (768, 8, 12),
}
"""Width, layers and heads."""


@dataclass(frozen=True)
class Case:
    """A training whose memory is measured; `blocks` are in a batch."""

    family: str
    learns: bool = False
    checkpoints: bool = False
    accumulation: int = 1
    blocks: int = 4
    processes: int = 1
    temperature: float = 1.0

    @property
    def name(self) -> str:
        parts = [self.family]
        parts += [f"{self.blocks} block"] * (self.blocks == 1)
        parts += ["with teacher"] * self.learns + ["checkpointing"] * self.checkpoints
        parts += [f"{self.accumulation} batches a step"] * (self.accumulation > 1)
        parts += [f"temperature {self.temperature:g}"] * (self.temperature != 1)
        parts += [f"{self.processes} processes"] * (self.processes > 1)
        return ", ".join(parts)


CASES = (
    Case("llama"),
    Case("llama", checkpoints=True),
    Case("llama", blocks=1),
    Case("llama", accumulation=2),
    Case("llama", learns=True),
    Case("llama", learns=True, checkpoints=True),
    Case("llama", learns=True, temperature=2.0),
    Case("gpt_neox"),
    Case("gpt_neox", checkpoints=True),
    Case("gpt_neox", learns=True),
    Case("llama", processes=2),
    Case("llama", learns=True, checkpoints=True, processes=2),
)


def main() -> None:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_blocks(root / "blocks")
        for family in ("llama", "gpt_neox"):
            for name in SIZES:
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config_of(family, name))
                model.save_pretrained(root / f"{family}-{name}")
        print(f"{'case':55} {'planned':>9} {'measured':>9} {'ratio':>6}  most at")
        for number, case in enumerate(CASES):
            result = run_in_process(case, root, number)
            planned, measured = result["planned"], result["measured"]
            ratios.append(min(planned, measured) / max(planned, measured))
            line = f"{case.name:55} {planned / 1e6:6,.0f} MB {measured / 1e6:6,.0f} MB"
            print(f"{line} {planned / measured:6.2f}  {result['moment']}", flush=True)
    print(f"ratio: {min(ratios):.2f}")


def config_of(family: str, name: str) -> PreTrainedConfig:
    width, layers, heads = SIZES[name]
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if family == "llama":
        return LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            head_dim=64, max_position_embeddings=BLOCK_LENGTH, **tokens,
        )  # fmt: skip
    return GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=BLOCK_LENGTH, **tokens,
    )  # fmt: skip


def write_blocks(folder: Path) -> None:
    """Random tokens, as `headstart.text.prepare` leaves them."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in SPLITS.items():
        tokens = generator.integers(0, VOCAB, (count, BLOCK_LENGTH), dtype=np.uint16)
        (folder / f"{name}.bin").write_bytes(tokens.tobytes())
    manifest = {
        "dtype": "uint16",
        "settings": {"block_length": BLOCK_LENGTH},
        "splits": {name: {"blocks": count} for name, count in SPLITS.items()},
        "fingerprint": "random",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_in_process(case: Case, root: Path, number: int) -> dict[str, float | str]:
    """What a case comes to: bytes planned and measured, and the moment that holds most."""
    result = root / f"{number}.json"
    launcher = [sys.executable]
    if case.processes > 1:
        count = str(case.processes)
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    # Everything large is given back to the kernel as soon as it is freed.
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [*launcher, __file__, json.dumps(asdict(case)), str(root), str(result)]
    done = subprocess.run(command, env=os.environ | returning, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case.name} failed:\n{done.stderr}")
    found: dict[str, float | str] = json.loads(result.read_text())
    return found


def measure(case: Case, root: Path, result: Path) -> None:
    """Train, and write what was planned and what was held."""
    torch.set_num_threads(1)
    scratch = root / result.stem
    with process_group():
        train_arm(case, "tiny", root, scratch / "warm")
        release_memory()
        before = memory_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is held now
        train_arm(case, "student", root, scratch / "arm")
        measured = memory_of("VmHWM") - before
        if is_main():
            memory = planned(case, root)
            content = {"planned": memory.held, "measured": measured, "moment": memory.moment}
            result.write_text(json.dumps(content))


def train_arm(case: Case, size: str, root: Path, folder: Path) -> None:
    blocks = TokenBlocks(root / "blocks", json.loads((root / "blocks/manifest.json").read_text()))
    step_tokens = case.blocks * case.accumulation * world_size() * BLOCK_LENGTH
    # DDP lays its buckets anew after the first step, and memory counts once it is written to.
    num_steps = 2 if case.processes == 1 else 3
    settings = PretrainSettings(
        num_steps * step_tokens, validation_tokens=1, test_tokens=1, evaluations=1
    )
    train = {
        "per_device_train_batch_size": case.blocks,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_checkpointing": case.checkpoints,
        "save_strategy": "no",
        "report_to": "none",
    }
    student, teacher = (
        Checkpoint.open(root / f"{case.family}-{name}")
        for name in (size, "tiny" if size == "tiny" else "teacher")
    )
    run_arm(arm_of(case), ArmInputs(student, teacher, blocks, settings, train), folder)


def arm_of(case: Case) -> Arm:
    kd = DistillationSettings(temperature=case.temperature) if case.learns else None
    return Arm("measured", kd=kd)


def planned(case: Case, root: Path) -> Memory:
    teacher, student = (
        Checkpoint.open(root / f"{case.family}-{name}").architecture
        for name in ("teacher", "student")
    )
    has_bf16 = has_fast_bf16(torch.device("cpu"))
    batch = Batch(
        case.blocks, BLOCK_LENGTH, case.checkpoints, has_bf16, accumulates=case.accumulation > 1
    )
    sharing = Sharing(case.processes, kind="cpu")
    return arm_memory(arm_of(case).kd, teacher, student, batch, sharing)


def memory_of(kind: str) -> int:
    """Bytes that this process holds, or has held at most, as the kernel says."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{kind}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
