"""Layer by layer over all tokens, against whole forward passes."""

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher

from headstart.calibration.layer_by_layer import TOKENS_PER_BATCH, LayerwiseForward, batches_of
from headstart.calibration.moments import sources_of
from headstart.model.architecture import Architecture


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [*TEACHERS, *DESCENDANTS])
@torch.no_grad()
def test_it_computes_what_a_whole_forward_pass_does(kind, tokens):
    """In uneven batches; what linear layers read is the same whether or not the layer goes on."""
    model, seen = random_teacher(kind), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
    whole = model(tokens, output_hidden_states=True)
    wanted = {name: (x.flatten(0, 1), y.flatten(0, 1)) for name, (x, y) in seen.items()}
    states = LayerwiseForward(model, tokens.split(2))
    architecture = Architecture.of(model.config)
    patterns = [pattern for pattern in sources_of(architecture) if "{i}" in pattern]
    num_tokens = []
    for layer in range(len(states.layers)):
        torch.testing.assert_close(states.hidden, whole.hidden_states[layer].flatten(0, 1))
        caught = {pattern: [] for pattern in patterns}
        read = {pattern: states.inputs(pattern, layer) for pattern in patterns}
        see = {
            name: lambda x, y, pairs=pairs: pairs.append((x.clone(), y))
            for name, pairs in caught.items()
        }
        states.run(layer, see, num_tokens.append)
        for pattern, pairs in caught.items():
            x, y = wanted[pattern.format(i=layer).removesuffix(".weight")]
            inputs, outputs = (torch.cat(all).flatten(0, 1) for all in zip(*pairs, strict=True))
            torch.testing.assert_close(read[pattern], x)
            torch.testing.assert_close(inputs, x)
            torch.testing.assert_close(outputs, y)
    assert num_tokens == [24, 24, 12] * len(states.layers)
    norm = next(norm for norm in architecture.family.readers if "{i}" not in norm)
    normed = torch.cat(list(states.normed(norm)))
    torch.testing.assert_close(normed, whole.hidden_states[-1])


def test_batches_are_about_as_many_tokens_each():
    blocks = torch.arange(TOKENS_PER_BATCH * 5).view(-1, 512)
    assert [len(batch) for batch in batches_of(blocks)] == [4] * 5
    assert [len(batch) for batch in batches_of(blocks[:6])] == [4, 2]
    assert torch.equal(torch.cat(batches_of(blocks)), blocks)
    long = torch.zeros(3, TOKENS_PER_BATCH + 1)
    assert [len(batch) for batch in batches_of(long)] == [1, 1, 1]
