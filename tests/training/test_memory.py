"""What each part of a plan's memory depends on; `benchmarks/memory.py` measures the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.conftest import TEACHERS

from headstart.losses.distillation import DistillationSettings
from headstart.losses.next_token import next_token_loss
from headstart.model.architecture import Architecture
from headstart.training.activations import Batch, LiveBytes
from headstart.training.memory import FRAGMENTATION, Memory, Sharing, arm_memory

MODEL = TEACHERS["llama-untied-gqa"]()
STUDENT = Architecture.of(MODEL.config)
TEACHER = Architecture.of(TEACHERS["gpt_neox-untied"]().config)
BATCH = Batch(blocks=4, block_length=64)
KD = DistillationSettings()


def memory(
    kd: DistillationSettings | None = None, sharing: Sharing | None = None, **batch: Any
) -> Memory:
    return arm_memory(kd, TEACHER, STUDENT, replace(BATCH, **batch), sharing or Sharing())


def test_only_ddp_has_buckets_and_they_are_the_gradients_again():
    parameters = sum(parameter.nbytes for parameter in MODEL.parameters())
    alone, two = memory(), memory(sharing=Sharing(2))
    sharded = memory(sharing=Sharing(2, shards_student=True))
    assert (alone.buckets, two.buckets, sharded.buckets) == (0, parameters, 0)
    assert two.held == alone.held + parameters


def test_fsdp_divides_weights_gradients_and_moments():
    alone, four = memory(), memory(sharing=Sharing(4, shards_student=True))
    assert four.state == alone.state // 4
    assert (four.copies, alone.gathered) == (0, 0) and four.gathered > 0
    matrices = 2 * STUDENT.sizes["vocab"] * STUDENT.sizes["embed"]
    assert four.gathered > 2 * 2 * matrices  # whole, with their gradients, in bfloat16


def test_a_sharded_teacher_keeps_its_matrices_outside_of_layers():
    whole, four = (
        memory(DistillationSettings(shard_teacher=shards), Sharing(4)) for shards in (False, True)
    )
    count = TEACHER.count(1)
    outside = count.parameters - count.non_embedding_parameters
    assert whole.teacher == 2 * count.parameters
    assert four.teacher == pytest.approx(2 * (outside + count.non_embedding_parameters / 4), abs=2)
    assert memory(DistillationSettings(shard_teacher=True)).teacher == whole.teacher


def test_a_cache_needs_no_teacher():
    cached = memory(DistillationSettings(samples=5, cache="c"))
    assert (
        cached.teacher
        == cached.teacher_activations
        == cached.teacher_hidden
        == 0
        < memory(KD).teacher
    )


def test_gradients_are_there_during_the_forward_pass_if_they_accumulate():
    once, several = memory(), memory(accumulates=True)
    assert several.stages["loss"] == once.stages["loss"] + once.gradients


def test_the_peak_is_the_largest_moment_with_a_share_for_the_allocator():
    found = memory(KD)
    assert found.held == max(found.stages.values()) == found.stages[found.moment]
    assert found.peak == pytest.approx((1 + FRAGMENTATION) * found.held, abs=1)
    calibrated = replace(found, refit=2 * found.held)
    assert (calibrated.held, calibrated.moment) == (2 * found.held, "refit")
    assert replace(found, refit=1).held == found.held  # which is not at the same time


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16", "float32"])
def test_the_loss_holds_what_its_real_tensors_take(has_bf16):
    """On the CPU, with several chunks, from hidden states that are there."""
    tokens, embed, vocab = 2 * 512, 48, 40_000
    config = replace_config(hidden_size=embed, vocab_size=vocab)
    student = Architecture.of(config)
    hidden = torch.zeros(2, 513, embed, requires_grad=True)
    output = torch.nn.Linear(embed, vocab, bias=False)
    blocks = torch.zeros(2, 513, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=has_bf16)
    with LiveBytes(output) as live, autocast:
        total = next_token_loss(hidden, output.weight, blocks)
        most, now = live.peak, live.now
    batch = Batch(2, tokens // 2, has_bf16=has_bf16)
    found = arm_memory(None, student, student, batch, Sharing(kind="cpu"))
    assert found.loss == pytest.approx(most, rel=0.02)
    assert found.loss_gradients == pytest.approx(now, rel=0.05)
    assert total.requires_grad


def replace_config(**changes: Any) -> Any:
    return type(MODEL.config)(**{**MODEL.config.to_dict(), **changes})
