"""What a plan promises, against models that are built and a step that is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.training.plan import (
    Batch,
    Hardware,
    activation_bytes_per_token,
    arms_table,
    plan_arm,
)
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


def plan(kd: DistillationSettings | None = None, **batch: Any):
    arm = Arm("a", kd=kd)
    teacher, student = Architecture.of(TEACHER), Architecture.of(STUDENT)
    return plan_arm(arm, 960, teacher, student.sizes, replace(BATCH, **batch), HARDWARE)


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
    seconds = (found.student_flops + found.teacher_flops) / (4 * 2e12 * 0.5)
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
    assert plan(kd).state_bytes == expected


@pytest.mark.parametrize("width", [32, 128])
def test_activations_are_about_those_of_a_forward_pass(width):
    """The trunk's tensors that autograd keeps, without weights, at two bytes a number."""
    config = LlamaConfig(**{**STUDENT.to_dict(), "hidden_size": width, "intermediate_size": 384})
    model, kept = LlamaForCausalLM(config), dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(torch.zeros(4, 64, dtype=torch.long), use_cache=False)
    measured = 2 * sum(kept.values()) / (4 * 64)
    assert output.last_hidden_state.requires_grad
    estimate = activation_bytes_per_token(Architecture.of(config).sizes, checkpoints=False)
    assert 0.5 < estimate / measured < 2


def test_checkpoints_keep_less_and_a_larger_batch_more():
    whole, less, more = plan(), plan(checkpoints=True), plan(blocks=6)
    assert less.activation_bytes < whole.activation_bytes == more.activation_bytes / 2
    assert less.state_bytes == whole.state_bytes == more.state_bytes


def test_layers_may_differ():
    sizes = {**Architecture.of(STUDENT).sizes, "mlp": (32, 96, 160), "kv_groups": (1, 2, 3)}
    found, even = activation_bytes_per_token(sizes, False), plan().activation_bytes
    assert found * 3 * 16 == even


def test_logits_are_a_chunk_of_those_of_the_batch():
    kd, plain = (plan(kd, blocks=4096, block_length=2048) for kd in (KD, None))
    logits = torch.empty(4096, 2048, 300, dtype=torch.float32, device="meta")
    assert kd.dense_logits_bytes == 2 * logits.nbytes == 2 * plain.dense_logits_bytes
    assert plain.chunk_bytes < kd.chunk_bytes < kd.dense_logits_bytes / 4
    small = plan(None)
    assert small.chunk_bytes == 2 * small.dense_logits_bytes  # with their gradient


def test_a_cache_takes_its_ids_numbers_and_tail():
    assert plan(CACHED).cache_bytes == 960 * (10 * (2 + 2) + 2)
    assert plan(KD).cache_bytes == 0


def test_the_table_has_a_column_for_each_arm():
    console = Console(record=True, width=100)
    named = [replace(plan(kd), name=name) for name, kd in (("plain", None), ("cached", CACHED))]
    console.print(arms_table(named, HARDWARE, "a student"))
    text = console.export_text()
    assert "4 x 2 TFLOP/s at 50%" in text
    (caches,) = [line.split() for line in text.splitlines() if "teacher cache" in line]
    assert caches[-3:] == ["–", "40.3", "kB"]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Hardware(gpus=0), "--gpus is 0; use at least 1"),
        (lambda: Hardware(peak_tflops=-1.0), "--peak-tflops is -1.0; write a number above 0"),
        (lambda: Hardware(mfu=1.5), "--mfu is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
