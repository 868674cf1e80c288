"""What training is charged is what torch counts while it happens, to the last operation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flop_oracle import counted_flops
from transformers import AutoModelForCausalLM

from headstart.losses.distillation import DistillationSettings
from headstart.model.checkpoint import Checkpoint
from headstart.runs.result import charged
from headstart.system.device import load_frozen
from headstart.text.blocks import TokenBlocks
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.cache import CacheIdentity
from headstart.training.cache_writer import write_cache
from headstart.training.order import Reads, Wanted
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.teacher import DistillationTeacher, Teacher

COSTS = {"calibration_flops": 1_000_000, "search_flops": 10_000_000}
NUM_BLOCKS = 40
CACHED = DistillationSettings(top_k=5, cache="cache")


@pytest.fixture
def inputs(
    student_checkpoint: Checkpoint, teacher_checkpoint: Checkpoint, blocks: TokenBlocks
) -> ArmInputs:
    settings = PretrainSettings(tokens=NUM_BLOCKS * 16, validation_tokens=80, evaluations=3)
    train = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    text = replace(blocks, manifest={**blocks.manifest, "fingerprint": "text"})
    return ArmInputs(student_checkpoint, teacher_checkpoint, text, settings, train)


def write_teacher_cache(kd: DistillationSettings, inputs: ArmInputs) -> None:
    teacher = Teacher(load_frozen(inputs.teacher.folder, torch.device("cpu")))
    identity = CacheIdentity.of(kd, inputs.teacher.hash)
    train, vocab = inputs.blocks.split("train"), teacher.model.config.vocab_size
    everything = Wanted("text", (Reads(42, 0, len(train)),))
    write_cache(kd.cache, identity, vocab, lambda: (teacher, 4), train, everything)


@pytest.mark.parametrize(
    ("arm", "asked_blocks"),
    [
        (Arm("scratch", init="random"), 0),
        (Arm("subnet"), 0),
        (Arm("subnet+kd", kd=DistillationSettings()), NUM_BLOCKS),
        (Arm("cached", kd=CACHED), 0),
        (
            Arm(
                "later",
                kd=DistillationSettings(schedule="switch", schedule_tokens=NUM_BLOCKS * 8),
            ),
            NUM_BLOCKS // 2,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Arm) else "",
)
def test_an_arm(arm: Arm, asked_blocks: int, inputs: ArmInputs, tmp_path: Path) -> None:
    if arm.kd and arm.kd.cache:
        arm = replace(arm, kd=replace(arm.kd, cache=str(tmp_path / "cache")))
        write_teacher_cache(arm.kd, inputs)  # type: ignore[arg-type]
    trained = dict[str, Any]()
    counted = counted_flops(lambda: trained.update(run_arm(arm, inputs, tmp_path / "arm")))
    curve, (budget,), ledger = charged(arm, trained, inputs, COSTS)
    assert budget["flops"] == curve[-1]["flops"] and budget["tokens"] == curve[-1]["tokens"]
    if arm.kd and arm.kd.cache:
        ledger["teacher"] = 0  # it was asked before
    # The last token of a block has no target. The teacher spares its logits, and the student the
    # two products of its backward pass.
    vocab, embed = (inputs.student.architecture.sizes[axis] for axis in ("vocab", "embed"))
    spared = 2 * NUM_BLOCKS * embed + asked_blocks * inputs.teacher.architecture.sizes["embed"]
    upfront = 0 if arm.init == "random" else sum(COSTS.values())
    assert ledger["calibration"] + ledger["search"] == upfront == curve[0]["flops"]
    assert sum(ledger.values()) - upfront - 2 * vocab * spared == counted
    if not (arm.kd and arm.kd.cache):
        assert curve[-1]["flops"] == sum(ledger.values()) - ledger["evaluation"]


def test_a_larger_teacher_of_the_arms_own(
    inputs: ArmInputs, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """It is charged for, and not the one that was cut: torch counts, and so does a sum by hand."""
    config = copy.deepcopy(inputs.teacher.architecture.config)
    config.num_hidden_layers, config.vocab_size = 6, 136
    model = AutoModelForCausalLM.from_config(config)
    large = DistillationTeacher(Checkpoint.open(saved(model)), shared_rows=128)
    arm = Arm("large", kd=DistillationSettings(teacher="large"))
    with_large = replace(inputs, teachers={"large": large})
    trained = dict[str, Any]()
    counted = counted_flops(lambda: trained.update(run_arm(arm, with_large, tmp_path / "arm")))
    *_, ledger = charged(arm, trained, with_large, COSTS)
    # Two for each weight of the layers' matrices and of the output matrix, and attention's
    # products of queries with keys and of these with values, over the block.
    embed, heads, groups, head_dim, mlp = 48, 6, 2, 16, 80
    matrices = embed * head_dim * (2 * heads + 2 * groups) + 3 * embed * mlp
    per_token = 6 * (2 * matrices + 4 * heads * head_dim * 16) + 2 * 136 * embed
    assert ledger["teacher"] == NUM_BLOCKS * 16 * per_token
    student = inputs.student.architecture.sizes
    spared = 2 * 2 * NUM_BLOCKS * student["vocab"] * student["embed"] + 2 * NUM_BLOCKS * 136 * embed
    assert sum(ledger.values()) - sum(COSTS.values()) - spared == counted


def test_a_teacher_cache(inputs: ArmInputs, tmp_path: Path) -> None:
    kd = replace(CACHED, cache=str(tmp_path / "cache"))
    counted = counted_flops(lambda: write_teacher_cache(kd, inputs))
    split, teacher = inputs.blocks.split("train"), inputs.teacher.architecture
    settings = replace(inputs.settings, tokens=split.size)
    points = [{"tokens": settings.tokens, "loss": 1.0}]
    trained = {"curve": points, "budgets": points, "tokens": settings.tokens}
    trained |= {"validation_tokens": 0, "test_tokens": 0}
    *_, ledger = charged(Arm("cached", kd=kd), trained, inputs, COSTS)
    spared = 2 * len(split) * teacher.sizes["vocab"] * teacher.sizes["embed"]
    assert ledger["teacher"] - spared == counted
