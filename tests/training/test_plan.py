"""What a plan promises, against models that are built and a step that is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.training.activations import Batch
from headstart.training.memory import Setup
from headstart.training.plan import Hardware, arms_table, misfits, plan_arm
from headstart.training.settings import Arm

TEACHER = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
)
STUDENT = LlamaConfig(
    **{
        **TEACHER.to_dict(),
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
HARDWARE = Hardware(gpus=4, peak_tflops=2.0, mfu=0.5)
BATCH = Batch(blocks=3, block_length=16)
KD = DistillationSettings(schedule="switch", schedule_tokens=400)
CACHED = DistillationSettings(top_k=10, cache="c")


def plan(kd: DistillationSettings | None = None, hardware: Hardware = HARDWARE, **batch: Any):
    setup = Setup(replace(BATCH, **batch))
    return planned(kd, setup, hardware)


def planned(kd: DistillationSettings | None, setup: Setup, hardware: Hardware = HARDWARE):
    teacher, student = Architecture.of(TEACHER), Architecture.of(STUDENT)
    return plan_arm(Arm("a", kd=kd), 960, teacher, student, setup, hardware)


def forward_flops(config: LlamaConfig) -> int:
    """Of one token: two for each weight of a product, and attention over the block."""
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    weights -= model.model.embed_tokens.weight.numel()
    heads = config.num_attention_heads * config.head_dim
    return 2 * weights + 4 * config.num_hidden_layers * heads * BATCH.block_length


@pytest.mark.parametrize(("kd", "asked"), [(None, 0), (KD, 400), (CACHED, 960)])
def test_flops_and_hours(kd, asked):
    found = plan(kd)
    assert found.student_flops == 3 * 960 * forward_flops(STUDENT)
    assert found.teacher_flops == asked * forward_flops(TEACHER)
    now = 0 if kd is CACHED else found.teacher_flops  # a cache is written before
    seconds = (found.student_flops + now) / (4 * 2e12 * 0.5)
    assert found.hours == pytest.approx(seconds / 3600)


@pytest.mark.parametrize(("kd", "teacher"), [(None, False), (KD, True), (CACHED, False)])
def test_state_is_what_a_step_of_adamw_holds(kd, teacher):
    model = LlamaForCausalLM(STUDENT)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    expected = sum(tensor.nbytes for tensor in held)
    if teacher:
        expected += sum(p.nbytes for p in LlamaForCausalLM(TEACHER).bfloat16().parameters())
    assert plan(kd).memory.state == expected


def test_checkpoints_keep_less_and_a_larger_batch_more():
    whole, less, more = plan().memory, plan(checkpoints=True).memory, plan(blocks=6).memory
    assert less.kept < whole.kept == pytest.approx(more.kept / 2, rel=0.01)
    assert less.state == whole.state == more.state


def test_logits_are_a_chunk_of_those_of_the_batch():
    kd, plain = (plan(kd, blocks=4096, block_length=2048) for kd in (KD, None))
    logits = torch.empty(4096, 2048, 300, dtype=torch.float32, device="meta")
    assert kd.dense_logits_bytes == 2 * logits.nbytes == 2 * plain.dense_logits_bytes
    assert plain.memory.loss < kd.memory.loss < kd.dense_logits_bytes / 4


def test_the_table_has_a_column_for_each_arm():
    console = Console(record=True, width=100)
    named = [replace(plan(kd), name=name) for name, kd in (("plain", None), ("cached", CACHED))]
    console.print(arms_table(named, HARDWARE, "a student"))
    text = console.export_text()
    assert "4 x 2 TFLOP/s at 50%" in text
    assert "plain" in text and "cached" in text


def test_activations_are_computed_again_only_where_memory_needs_it():
    batch = replace(BATCH, blocks=64, block_length=128)
    open_setup = Setup(batch, sets_checkpointing=False)
    plain, again = (
        plan(blocks=64, block_length=128),
        plan(blocks=64, block_length=128, checkpoints=True),
    )
    ample, tight, none = (
        replace(HARDWARE, memory_bytes=size)
        for size in (plain.memory.peak, plain.memory.peak - 1, again.memory.peak - 1)
    )
    found = [planned(None, open_setup, hardware) for hardware in (ample, tight, none)]
    assert [plan.checkpoints for plan in found] == [False, True, False]
    assert [plan.memory for plan in found] == [plain.memory, again.memory, plain.memory]
    assert [
        plan.fits(hardware) for plan, hardware in zip(found, (ample, tight, none), strict=True)
    ] == [True, True, False]
    assert found[2].least_peak == again.memory.peak
    as_said = planned(None, Setup(batch), tight)
    assert not as_said.checkpoints and "train.activation_checkpointing: true" in as_said.remedies


def test_what_does_not_fit_is_told_what_would():
    setup = Setup(replace(BATCH, blocks=64, block_length=128, checkpoints=True), accumulation=3)
    peak = planned(KD, setup).memory.peak
    hardware = replace(HARDWARE, memory_bytes=0.8 * peak)
    found = planned(KD, setup, hardware)
    (sentence,) = misfits([found], hardware)
    assert sentence.startswith("arm a needs ") and ": set train.per_device_train" in sentence
    blocks = int(found.remedies[0].split(": ")[1].split(" ")[0])
    assert f"accumulation_steps: {3 * 64 // blocks}" in found.remedies[0]
    smaller = replace(setup, batch=replace(setup.batch, blocks=blocks, accumulates=True))
    assert planned(KD, smaller, hardware).fits(hardware)
    assert misfits([planned(KD, setup)], HARDWARE) == []
    hopeless = replace(HARDWARE, memory_bytes=1.0)
    assert "a smaller bin" in misfits([planned(KD, setup, hopeless)], hopeless)[0]


def test_the_table_says_what_fits():
    console = Console(record=True, width=100)
    console.print(arms_table([plan(), plan(KD)], HARDWARE, "a student"))
    lines = {line.strip()[:18].strip(): line.split() for line in console.export_text().splitlines()}
    assert lines["fits 80 GB"][-2:] == ["yes", "yes"]
    assert lines["checkpointing"][-2:] == ["no", "no"]
    assert "DDP's buckets" in lines and "(refit before)" not in lines


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Hardware(gpus=0), "--gpus is 0; use at least 1"),
        (lambda: Hardware(peak_tflops=-1.0), "--peak-tflops is -1.0; write a number above 0"),
        (lambda: Hardware(mfu=1.5), "--mfu is 1.5; it must be above 0 and at most 1"),
        (lambda: Hardware(memory_bytes=0.0), "--gpu-memory is 0.0; write a size such as 80GB"),
    ],
)
def test_settings_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
