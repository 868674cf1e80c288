"""A teacher that was recorded gives the students that one computed beside them does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher
from tests.model.oracles import assert_same_tensors, random_layerwise_spec, random_spec
from torch import Tensor
from transformers import PreTrainedModel

from headstart.calibration.activations import TeacherActivations, TeacherPass, can_propagate
from headstart.calibration.layer_by_layer import LayerwiseForward
from headstart.calibration.propagate import refitted_student
from headstart.model.architecture import Architecture
from headstart.model.cut import build_student
from headstart.model.spec import SubnetSpec

FAMILIES = [*TEACHERS, *DESCENDANTS]


@pytest.fixture
def batches() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 128, (8, 20), generator=generator).split(3)


def state_of(teacher: PreTrainedModel) -> dict[str, Tensor]:
    """Its tensors, without an output matrix that is the embedding."""
    tied = {"lm_head.weight", "embed_out.weight"} if teacher.config.tie_word_embeddings else set()
    return {name: part for name, part in teacher.state_dict().items() if name not in tied}


def specs_of(teacher: PreTrainedModel) -> list[SubnetSpec]:
    """Removed layers between kept ones, layers that differ, and an uncut beginning."""
    whole = SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    some = (*whole.mlp[:2], *(layer[:-3] for layer in whole.mlp[2:]))
    return [
        random_spec(teacher, 0, layers=2, embed=32, kv_groups=1, mlp=40),
        random_layerwise_spec(teacher, 1, layers=3, embed=24, mlp=40),
        SubnetSpec(whole.layers, whole.embed, whole.kv_groups, some),
    ]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_student_is_the_one_that_a_pass_of_its_own_gives(
    kind: str, batches: tuple[Tensor, ...]
) -> None:
    teacher = random_teacher(kind)
    state, before = state_of(teacher), {k: v.clone() for k, v in teacher.state_dict().items()}
    recorded = TeacherActivations.record(teacher, batches)
    for spec in (*specs_of(teacher), specs_of(teacher)[0]):  # none leaves a trace for the next
        alone, shared = (
            refitted_student(source, state.items(), spec).state_dict()
            for source in (TeacherPass(teacher, batches), recorded)
        )
        assert alone.keys() == shared.keys()
        for name, tensor in alone.items():
            assert torch.equal(tensor, shared[name]), name
        sliced = build_student(state.items(), recorded.architecture, spec).state_dict()
        assert any(not torch.equal(tensor, shared[name]) for name, tensor in sliced.items())
    assert_same_tensors(teacher.state_dict(), before)


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-untied", "olmo2-tied"])
def test_the_teacher_runs_once(
    kind: str, batches: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, run = random_teacher(kind), LayerwiseForward.run
    layers = list[int]()

    def watched(self: LayerwiseForward, layer: int, *more: object, **others: object) -> None:
        if self.model is teacher:
            layers.append(layer)
        run(self, layer, *more, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerwiseForward, "run", watched)
    recorded, state = TeacherActivations.record(teacher, batches), state_of(teacher)
    for spec in specs_of(teacher):
        refitted_student(recorded, state.items(), spec)
    assert layers == list(range(teacher.config.num_hidden_layers))


def bytes_of(recorded: TeacherActivations) -> int:
    kept = [*recorded.streams.values(), *(x for seen in recorded.values for x in seen.values())]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_recorded_takes_no_more_memory_than_it_says(
    kind: str, batches: tuple[Tensor, ...]
) -> None:
    teacher = random_teacher(kind)
    recorded, sizes = TeacherActivations.record(teacher, batches), recorded_sizes(teacher)
    layers, embed = sizes["layers"], sizes["embed"]
    numbers = (5 * layers + 1) * embed if can_propagate(recorded.architecture) else embed
    assert bytes_of(recorded) == 4 * numbers * sum(batch.numel() for batch in batches)


def recorded_sizes(teacher: PreTrainedModel) -> dict[str, int]:
    return dict(Architecture.of(teacher.config).sizes)


@pytest.mark.parametrize("make", [TeacherPass, TeacherActivations.record])
@torch.no_grad()
def test_streams_are_the_models_hidden_states(
    make: Callable[..., TeacherPass | TeacherActivations], batches: tuple[Tensor, ...]
) -> None:
    teacher = random_teacher("llama-tied-gqa")
    wanted = teacher(torch.cat(batches), output_hidden_states=True).hidden_states
    source = make(teacher, batches)
    for layer, states in enumerate(wanted[:-1]):  # the last one is normed
        torch.testing.assert_close(source.stream(layer), states.flatten(0, 1))
