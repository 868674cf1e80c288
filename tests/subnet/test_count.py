import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import random_teacher
from tests.subnet.oracles import random_spec
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig

from headstart.subnet.count import (
    count,
    inference_flops_per_token,
    non_embedding_parameters,
    parameters,
)
from headstart.subnet.extract import build_student, extract
from headstart.subnet.rules import layouts_of, sizes_of

SHAPES = {
    "llama-tied-gqa": [{}, {"layers": 1, "embed": 9, "kv_groups": 1}, {"embed": 30, "mlp": 7}],
    "llama-untied-gqa": [{}, {"layers": 3, "kv_groups": 2}, {"embed": 18, "mlp": 79}],
    "llama-untied-mha-biases": [{}, {"kv_groups": 4, "mlp": 1}, {"layers": 2, "embed": 6}],
    "gpt_neox-untied": [{}, {"layers": 2, "mlp": 33}, {"embed": 48, "kv_groups": 3}],
    "gpt_neox-tied": [{}, {"embed": 16, "kv_groups": 1, "mlp": 5}],
    "gpt_neox-serial-no-attention-bias": [{}, {"layers": 3, "embed": 32, "kv_groups": 2}],
}
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_parameters_are_those_of_the_written_file(kind, shape, tmp_path):
    model = random_teacher(kind)
    model.save_pretrained(tmp_path / "teacher")
    folder = extract(tmp_path / "teacher", random_spec(model, **shape), tmp_path / "student")
    tensors = load_file(folder / "model.safetensors")
    config = type(model.config).from_pretrained(folder)
    counted = count(config, context_length=16)
    assert counted.parameters == sum(tensor.numel() for tensor in tensors.values())
    # a matrix with a row for each of the 128 tokens; no other axis has that size
    body = [tensor for tensor in tensors.values() if tensor.shape[0] != config.vocab_size]
    assert counted.non_embedding_parameters == sum(tensor.numel() for tensor in body)


def pythia(layers, width, heads):
    return GPTNeoXConfig(
        vocab_size=50304, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "total", "non_embedding"),
    [((24, 1024, 16), 405_334_016, 302_311_424), ((16, 2048, 8), 1_011_781_632, 805_736_448)],
    ids=["410m", "1b"],
)
def test_pythias_published_counts(shape, total, non_embedding):
    """Source: Pythia (arXiv 2304.01373), table 1, and the model cards."""
    counted = count(pythia(*shape), context_length=2048)
    assert (counted.parameters, counted.non_embedding_parameters) == (total, non_embedding)


def test_smollm2s_published_count():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    assert count(config, context_length=2048).parameters == 134_515_008


@pytest.mark.parametrize("length", [1, 24])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_flops_are_those_that_torch_counts(kind, shape, length):
    teacher = random_teacher(kind)
    model = build_student(teacher.state_dict(), teacher.config, random_spec(teacher, **shape))
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    counted = count(model.config, context_length=length)
    assert counted.inference_flops_per_token * length == counter.get_total_flops()
    assert counted.training_flops_per_token == 3 * counted.inference_flops_per_token


def test_training_flops_are_those_of_forward_and_backward():
    model = random_teacher("llama-untied-gqa")
    model.set_attn_implementation("eager")
    tokens = torch.zeros(1, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = count(model.config, context_length=24).training_flops_per_token * 24
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("measure", [parameters, non_embedding_parameters, None])
def test_many_shapes_are_counted_at_once(measure):
    def measured(sizes):
        if measure is None:
            return inference_flops_per_token(layouts, sizes, 64)
        return measure(layouts, sizes)

    config = random_teacher("llama-untied-gqa").config
    layouts, sizes = layouts_of(config), sizes_of(config)
    grid = np.arange(1, 6)
    for axis in ("layers", "embed", "kv_groups", "mlp"):
        at_once = measured(sizes | {axis: grid})
        assert at_once.tolist() == [measured(sizes | {axis: int(size)}) for size in grid]
