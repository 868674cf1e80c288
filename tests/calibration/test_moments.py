"""The moments of activations, against those of explicit activations in float64."""

import copy

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher

from headstart.calibration.moments import (
    Statistics,
    collect_statistics,
    products,
    rms_norms_of,
    sources_of,
)
from headstart.model.architecture import Architecture


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def activations(model, tokens):
    """Every module's input and output in one whole forward pass, in float64, one token a row."""
    model, seen = copy.deepcopy(model).double(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: (
                seen.update({name: (inputs[0].flatten(0, -2), output.flatten(0, -2))})
                if inputs and isinstance(output, torch.Tensor) and inputs[0].is_floating_point()
                else None
            )
        )
    model(tokens)
    return seen


@pytest.mark.parametrize("kind", [*TEACHERS, *DESCENDANTS])
def test_moments_are_those_of_explicit_activations(kind, tokens, tmp_path):
    """Layer by layer in uneven batches, as in one pass over everything."""
    model = random_teacher(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect_statistics(model, tokens.split(2), tmp_path)
    statistics, seen = Statistics(tmp_path), activations(model, tokens)
    architecture = Architecture.of(model.config)
    for pattern, source in sources_of(architecture).items():
        for layer in range(architecture.sizes["layers"]):
            inputs, _ = seen[pattern.format(i=layer).removesuffix(".weight")]
            gram, mean = (of(source.format(i=layer)) for of in (statistics.gram, statistics.mean))
            assert gram.dtype == mean.dtype == torch.float64
            expected = inputs.T @ inputs / tokens.numel()
            torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-4 * expected.max())
            torch.testing.assert_close(mean, inputs.mean(dim=0), rtol=1e-4, atol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(tokens[:1]).logits, random_teacher(kind)(tokens[:1]).logits)


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "qwen3-tied", "gemma3_text-tied"])
def test_shares_and_the_pooled_stream_are_those_of_explicit_inputs(kind, tokens, tmp_path):
    model = random_teacher(kind)
    collect_statistics(model, tokens.split(2), tmp_path)
    statistics, seen = Statistics(tmp_path), activations(model, tokens)
    architecture = Architecture.of(model.config)
    for pattern in rms_norms_of(architecture):
        for layer in range(architecture.sizes["layers"]):
            name = pattern.format(i=layer)
            inputs, _ = seen[name.removesuffix(".weight")]
            expected = (inputs**2 / (inputs**2).mean(dim=1, keepdim=True)).mean(dim=0)
            torch.testing.assert_close(statistics.share(name), expected, rtol=1e-4, atol=1e-5)
    before_mlp = "pre_feedforward" if "gemma" in kind else "post_attention"
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(4) for n in ("input", before_mlp)]
    pooled = torch.zeros(48, 48, dtype=torch.float64)
    for name in [*norms, "model.norm"]:
        inputs, _ = seen[name]
        unit = inputs / (inputs**2).mean(dim=1, keepdim=True).sqrt()
        pooled += unit.T @ unit / tokens.numel()
    torch.testing.assert_close(statistics.residual(), pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*TEACHERS, *DESCENDANTS])
def test_layers_that_share_a_source_read_the_same(kind, tokens):
    model = random_teacher(kind)
    seen = activations(model, tokens)
    for pattern, source in sources_of(Architecture.of(model.config)).items():
        inputs, _ = seen[pattern.format(i=1).removesuffix(".weight")]
        if source != pattern:
            _, written = seen[source.format(i=1).removesuffix(".weight")]
            assert torch.equal(inputs, written)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one block"):
        collect_statistics(random_teacher("llama-tied-gqa"), (), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_short_numbers_lose_nothing(dtype):
    generator = torch.Generator().manual_seed(0)
    some, others = (torch.randn(4, 100, units, generator=generator) for units in (40, 30))
    some, others = some.to(dtype), others.to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision
    found = products(some, others)
    wanted = some.flatten(0, 1).double().T @ others.flatten(0, 1).double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-6)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
