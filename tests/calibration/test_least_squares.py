"""Refitted students, against least squares on explicit activations in float64."""

import numpy as np
import pytest
import torch
from tests.calibration.test_moments import activations
from tests.conftest import DESCENDANTS, TEACHERS, extract, random_teacher
from tests.model.oracles import assert_same_tensors, random_layerwise_spec, random_spec
from transformers import AutoModelForCausalLM

from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics, collect_statistics, rms_norms_of, sources_of
from headstart.model.architecture import Architecture
from headstart.model.axes import kept_indices
from headstart.model.cut import build_student, slice_tensors
from headstart.model.spec import SubnetSpec

KINDS = [*TEACHERS, *DESCENDANTS]
CUTS = {
    "all": {"layers": 3, "embed": 36, "kv_groups": 1, "mlp": 40},
    "neurons": {"mlp": 7},
    "groups": {"kv_groups": 1},
    "channels": {"embed": 36},
}


@pytest.fixture
def tokens():
    """More of them than any layer has inputs, so that least squares has one answer."""
    return torch.randint(1, 128, (16, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def measured(tokens, tmp_path):
    """The statistics of a model over the tokens."""

    def measure(model):
        (tmp_path / "statistics").mkdir()
        collect_statistics(model, tokens.split(8), tmp_path / "statistics")
        return Statistics(tmp_path / "statistics")

    return measure


def refitted_student(model, spec, statistics):
    """The student in memory, cut out of refitted tensors."""
    architecture = Architecture.of(model.config)
    tensors = refitted(model.state_dict().items(), architecture, spec, statistics)
    return build_student(tensors, architecture, spec)


def kept_rows_and_units(model, pattern, kept):
    """Flat indices along both dimensions of a linear layer, or along a norm's one."""
    architecture = Architecture.of(model.config)
    indices = kept_indices(architecture.layouts[pattern], architecture.sizes, kept)
    return [along.tolist() for along in indices]


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_returns_the_teachers_own_weights(kind, measured):
    model = random_teacher(kind)
    spec = SubnetSpec.identity(Architecture.of(model.config).sizes)
    student = refitted_student(model, spec, measured(model))
    assert_same_tensors(student.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_layers_alone_changes_no_weight(kind, measured):
    model = random_teacher(kind)
    spec = random_spec(model, layers=2)
    refit = refitted_student(model, spec, measured(model))
    plain = build_student(model.state_dict().items(), Architecture.of(model.config), spec)
    assert_same_tensors(refit.state_dict(), plain.state_dict())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["llama-tied-gqa", "llama-untied-mha-biases", "qwen2-tied"])
def test_linear_layers_are_least_squares_fits_to_the_whole_outputs(kind, cut, measured, tokens):
    check_fits(random_teacher(kind), measured, tokens, CUTS[cut])


@pytest.mark.parametrize("kind", [kind for kind in TEACHERS if "neox" in kind])
def test_fused_and_biased_layers_are_fitted_too(kind, measured, tokens):
    check_fits(random_teacher(kind), measured, tokens, {"embed": 48, "kv_groups": 3, "mlp": 40})


@pytest.mark.parametrize(
    "kind", ["gemma3_text-untied", "olmo2-untied-biases", "qwen3-untied-biases", "phi3-untied"]
)
def test_other_norms_and_places_of_norms_are_served(kind, measured, tokens):
    check_fits(random_teacher(kind), measured, tokens, CUTS["all"])


@pytest.mark.parametrize("kind", ["llama-untied-gqa", "gpt_neox-untied"])
def test_layers_of_different_sizes_are_fitted(kind, measured, tokens):
    model = random_teacher(kind)
    check_fits(model, measured, tokens, {}, random_layerwise_spec(model, 0, layers=3, embed=32))


def test_narrower_heads_are_fitted_from_their_kept_channels(measured, tokens):
    check_fits(random_teacher("llama-untied-gqa"), measured, tokens, {"head_dim": 8})


def check_fits(model, measured, tokens, cut, spec=None):
    """Each linear layer is the best fit of the teacher's outputs from kept inputs, by numpy."""
    spec = spec or random_spec(model, **cut)
    seen, statistics = activations(model, tokens), measured(model)
    architecture = Architecture.of(model.config)
    tensors = {k: v for k, v in model.state_dict().items() if k not in tied(model)}
    changed = dict(refitted(tensors.items(), architecture, spec, statistics, ridge=0.0))
    assert changed.keys() == tensors.keys()
    for pattern in sources_of(architecture):
        stem = pattern.removesuffix(".weight")
        for position, layer in enumerate(spec.layers):
            name = stem.format(i=layer)
            rows, kept = kept_rows_and_units(model, pattern, spec.kept_in_layer(position))
            inputs = seen[name][0].numpy()
            wanted = inputs @ tensors[f"{name}.weight"].double().numpy()[rows].T
            known = inputs[:, kept]
            has_bias = f"{stem}.bias" in architecture.layouts
            if has_bias:
                known = np.hstack([known, np.ones((len(known), 1))])
            best, *_ = np.linalg.lstsq(known, wanted, rcond=None)
            fitted = (
                known[:, : len(kept)] @ changed[f"{name}.weight"][rows][:, kept].double().T.numpy()
            )
            if has_bias:
                before, after = (state[f"{name}.bias"][rows] for state in (tensors, changed))
                fitted = fitted + (after - before).double().numpy()
            # Of outputs, as weights of nearly parallel inputs are hardly determined.
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(fitted, known @ best, rtol=0, atol=2e-3 * scale)
            least = ((known @ best - wanted) ** 2).mean()
            assert ((fitted - wanted) ** 2).mean() <= 1.0001 * least + 1e-9 * scale**2


def tied(model):
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()


def test_a_ridge_shrinks_the_correction_and_not_the_weights(measured):
    model = random_teacher("llama-untied-gqa")
    spec, statistics = random_spec(model, mlp=40, embed=36), measured(model)
    parts = (model.state_dict().items(), Architecture.of(model.config), spec, statistics)
    stiff = dict(refitted(*parts, ridge=1e9))
    for name, tensor in model.state_dict().items():
        if "norm" not in name:
            torch.testing.assert_close(stiff[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_scaled_by_what_their_kept_channels_hold(kind, measured, tokens):
    model = random_teacher(kind)
    narrow = {"embed": 48, "kv_groups": 3} if "neox" in kind else {"embed": 36, "kv_groups": 1}
    spec, architecture = random_spec(model, **narrow), Architecture.of(model.config)
    statistics, seen = measured(model), activations(model, tokens)
    tensors = {k: v for k, v in model.state_dict().items() if k not in tied(model)}
    changed = dict(refitted(tensors.items(), architecture, spec, statistics))
    offset = architecture.family.norm_offset
    for pattern in rms_norms_of(architecture):
        name = pattern.format(i=spec.layers[1])
        (kept,) = kept_rows_and_units(model, pattern, spec.kept_in_layer(1))
        inputs = seen[name.removesuffix(".weight")][0]
        mean_square = (inputs**2).mean(dim=1)
        ratio = ((inputs[:, kept] ** 2).mean(dim=1) / mean_square).mean().sqrt()
        expected = (tensors[name].double() + offset) * ratio - offset
        torch.testing.assert_close(changed[name].double(), expected, rtol=1e-4, atol=1e-5)
    for name, tensor in changed.items():
        if "norm" in name and "neox" in kind:
            assert torch.equal(tensor, tensors[name]), "a LayerNorm stays as it is"


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-untied", "gemma3_text-tied"])
def test_a_refitted_student_on_disk_is_the_one_in_memory(kind, measured, saved, tmp_path, tokens):
    model = random_teacher(kind)
    cut = {"embed": 48, "kv_groups": 3} if "neox" in kind else {"embed": 36, "kv_groups": 2}
    spec, statistics = random_spec(model, layers=3, mlp=40, **cut), measured(model)
    out = extract(saved(model), spec, tmp_path / "out", statistics=statistics)
    assert not (out / "modeling.py").exists()
    written = AutoModelForCausalLM.from_pretrained(out)
    student = refitted_student(model, spec, statistics)
    assert_same_tensors(written.state_dict(), student.state_dict())
    plain = build_student(model.state_dict().items(), Architecture.of(model.config), spec)
    assert not torch.equal(written(tokens).logits, plain(tokens).logits)


def test_a_missing_bias_is_named(measured):
    model = random_teacher("gpt_neox-untied")
    spec, statistics = random_spec(model, mlp=40), measured(model)
    architecture, state = Architecture.of(model.config), model.state_dict()
    del state["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]
    with pytest.raises(ValueError, match=r"lacks .gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.bias."):
        tensors = refitted(state.items(), architecture, spec, statistics)
        dict(slice_tensors(tensors, architecture, spec))
