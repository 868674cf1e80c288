"""What a plan takes activations for, against what autograd keeps of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher
from tests.model.oracles import random_layerwise_spec
from torch import Tensor
from transformers import PreTrainedModel

from headstart.losses.distillation import DistillationSettings
from headstart.model.architecture import Architecture
from headstart.training.activations import (
    Batch,
    chunk_bytes_per_logit,
    inference_bytes,
    training_activations,
)

KINDS = pytest.mark.parametrize("kind", TEACHERS | DESCENDANTS)
BATCH = Batch(blocks=3, block_length=96)


def kept_by_autograd(model: PreTrainedModel, batch: Batch) -> int:
    """Bytes of all that a forward pass saves or returns, besides weights, buffers and tokens."""
    blocks = torch.zeros(batch.blocks, batch.block_length, dtype=torch.long)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), blocks]}
    known |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=batch.has_bf16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        keep(model.train().base_model(blocks, use_cache=False).last_hidden_state)
    storages = {at: tensor.untyped_storage().nbytes() for at, tensor in saved.items()}
    return sum(size for at, size in storages.items() if at not in known)


@KINDS
@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16", "float32"])
def test_activations_are_what_autograd_keeps(kind, has_bf16):
    model, batch = (TEACHERS | DESCENDANTS)[kind](), replace(BATCH, has_bf16=has_bf16)
    found = training_activations(Architecture.of(model.config), batch)
    kept = kept_by_autograd(model, batch)
    # Where some layers have windows, all are taken to have masks.
    most = 1.1 if getattr(model.config, "sliding_window", None) else 1.01
    assert 0.99 * kept < found.kept + found.copies < most * kept
    assert (found.copies > 0) is has_bf16


@KINDS
def test_copies_are_the_linear_layers_weights_in_half_their_bytes(kind):
    model = (TEACHERS | DESCENDANTS)[kind]()
    linear = [module for module in model.base_model.modules() if type(module) is torch.nn.Linear]
    expected = 2 * sum(module.weight.numel() for module in linear)
    copies = training_activations(Architecture.of(model.config), BATCH).copies
    assert copies == expected


@KINDS
def test_checkpoints_keep_the_layers_inputs_and_hold_one_layer_while_it_goes_back(kind):
    architecture = Architecture.of((TEACHERS | DESCENDANTS)[kind]().config)
    plain = training_activations(architecture, BATCH)
    again = training_activations(architecture, replace(BATCH, checkpoints=True))
    layers = architecture.sizes["layers"]
    inputs = 4 * layers * architecture.sizes["embed"] * BATCH.blocks * BATCH.block_length
    last_norm = inputs * 3 / layers
    assert inputs < again.kept < 1.1 * (inputs + 2 * last_norm) + 4 * 3 * BATCH.block_length**2
    assert again.copies == 0
    of_layer = (plain.kept + plain.copies - again.kept) / layers
    assert of_layer < again.backward


def test_layers_that_differ_are_counted_one_by_one():
    teacher = random_teacher("llama-untied-gqa")
    architecture = Architecture.of(teacher.config)
    spec = random_layerwise_spec(teacher, seed=1, layers=3, embed=36)
    student = architecture.student(spec)
    assert student.is_layerwise
    found = training_activations(student, BATCH)
    whole = training_activations(architecture, BATCH)
    assert 0 < found.kept < whole.kept and 0 < found.copies < whole.copies


def test_documents_apart_have_masks():
    architecture = Architecture.of(TEACHERS["llama-untied-gqa"]().config)
    joined, apart = (
        training_activations(architecture, replace(BATCH, separates=separates)).kept
        for separates in (False, True)
    )
    assert joined < apart


def test_a_teacher_holds_its_hidden_states_and_a_layer_at_most():
    architecture = Architecture.of(TEACHERS["gpt_neox-untied"]().config)
    most, hidden = inference_bytes(architecture, BATCH)
    tokens, sizes = BATCH.blocks * BATCH.block_length, architecture.sizes
    assert hidden == 2 * tokens * sizes["embed"]
    assert hidden < most < 2 * tokens * (8 * sizes["embed"] + 3 * sizes["mlp"])


@pytest.mark.parametrize(
    ("kd", "has_bf16", "expected"),
    [
        # Logits, their float32 copy and log-probabilities.
        (None, True, 2 + 4 + 4),
        (None, False, 4 + 4),
        # Both sides' logits; log-probabilities of both, the teacher's probabilities, the gradient.
        (DistillationSettings(), True, 2 + 2 + 4 + 4 + 4 + 2),
        (DistillationSettings(), False, 4 + 4 + 4 + 4 + 4),
        # And the student's own log-probabilities at temperature 1, with the float32 copy.
        (DistillationSettings(temperature=2.0), True, 2 + 2 + 4 + 4 + 4 + 4 + 4),
    ],
)
def test_bytes_of_a_chunk_for_each_logit(kd, has_bf16, expected):
    assert chunk_bytes_per_logit(kd, has_bf16) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("divergence", ["reverse_kl", "symmetric_kl", "jensen_shannon"])
def test_what_autograd_differentiates_holds_more(divergence):
    kd = DistillationSettings(divergence=divergence)
    closed = chunk_bytes_per_logit(DistillationSettings(), True)
    assert chunk_bytes_per_logit(kd, True) > closed
    for of_few in ({"top_k": 5}, {"samples": 5}):
        online = chunk_bytes_per_logit(DistillationSettings(**of_few), True)
        cached = chunk_bytes_per_logit(DistillationSettings(cache="c", **of_few), True)
        assert online > cached  # which has no logits of a teacher


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_teacher_of_other_rows_makes_a_chunk_hold_what_a_temperature_does(has_bf16):
    """The closed form keeps both losses' probabilities apart in either case."""
    padded = chunk_bytes_per_logit(DistillationSettings(), has_bf16, is_padded=True)
    hot = chunk_bytes_per_logit(DistillationSettings(temperature=2.0), has_bf16)
    assert chunk_bytes_per_logit(DistillationSettings(), has_bf16) < padded
    assert padded == pytest.approx(hot, rel=0.15)
