import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import extract, random_teacher
from tests.model.oracles import random_layerwise_spec, random_spec
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig

from headstart.model.architecture import Architecture
from headstart.model.count import (
    bytes_per_number,
    inference_flops_per_token,
    kv_cache_bytes_per_token,
    non_embedding_parameters,
    parameters,
)
from headstart.model.cut import build_student

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
    counted = Architecture.of(config).count(context_length=16)
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
    counted = Architecture.of(pythia(*shape)).count(context_length=2048)
    assert (counted.parameters, counted.non_embedding_parameters) == (total, non_embedding)


def test_smollm2s_published_count():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    assert Architecture.of(config).count(context_length=2048).parameters == 134_515_008


@pytest.mark.parametrize("length", [1, 24])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_flops_are_those_that_torch_counts(kind, shape, length):
    teacher = random_teacher(kind)
    model = build_student(
        teacher.state_dict().items(), Architecture.of(teacher.config), random_spec(teacher, **shape)
    )
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    counted = Architecture.of(model.config).count(context_length=length)
    assert counted.inference_flops_per_token * length == counter.get_total_flops()
    assert counted.training_flops_per_token == 3 * counted.inference_flops_per_token


def test_training_flops_are_those_of_forward_and_backward():
    model = random_teacher("llama-untied-gqa")
    model.set_attn_implementation("eager")
    tokens = torch.zeros(1, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = Architecture.of(model.config).count(context_length=24).training_flops_per_token * 24
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("measure", [parameters, non_embedding_parameters, None])
def test_many_shapes_are_counted_at_once(measure):
    def measured(sizes):
        if measure is None:
            return inference_flops_per_token(layouts, sizes, 64)
        return measure(layouts, sizes)

    architecture = Architecture.of(random_teacher("llama-untied-gqa").config)
    layouts, sizes = architecture.layouts, architecture.sizes
    grid = np.arange(1, 6)
    for axis in ("layers", "embed", "kv_groups", "mlp"):
        at_once = measured(sizes | {axis: grid})
        assert at_once.tolist() == [measured(sizes | {axis: int(size)}) for size in grid]


# Layers of different sizes, and narrower heads

LAYERWISE = [
    (kind, cut, seed)
    for kind in SHAPES
    for seed, cut in enumerate([{}, {"layers": 3, "embed": 22}, {"layers": 2, "head_dim": 8}])
]
each_layerwise = pytest.mark.parametrize(("kind", "cut", "seed"), LAYERWISE)


def layerwise_student(kind, cut, seed):
    """A student whose layers differ, with the teacher's architecture and the student's sizes."""
    teacher = random_teacher(kind)
    architecture = Architecture.of(teacher.config)
    spec = random_layerwise_spec(teacher, seed, **cut)
    sizes = spec.sizes(architecture.sizes)
    assert isinstance(sizes["mlp"], tuple)
    return build_student(teacher.state_dict().items(), architecture, spec), architecture, sizes


@each_layerwise
def test_parameters_of_unlike_layers_are_those_of_the_model(kind, cut, seed):
    student, architecture, sizes = layerwise_student(kind, cut, seed)
    expected = sum(parameter.numel() for parameter in student.parameters())
    assert architecture.amount(sizes, "parameters", 16) == expected
    matrices = {p.data_ptr(): p.numel() for p in student.parameters() if len(p) == 128}
    body = expected - sum(matrices.values())
    assert non_embedding_parameters(architecture.layouts, sizes) == body
    for dtype, width in [("bfloat16", 2), ("float32", 4), (None, 2)]:
        architecture.config.dtype = dtype
        assert architecture.amount(sizes, "weight_bytes", 16) == expected * width


@each_layerwise
def test_flops_of_unlike_layers_are_those_that_torch_counts(kind, cut, seed):
    student, architecture, sizes = layerwise_student(kind, cut, seed)
    student.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student(torch.zeros(1, 24, dtype=torch.long), use_cache=False)
    counted = architecture.amount(sizes, "flops_per_token", 24)
    assert counted * 24 == counter.get_total_flops()


@each_layerwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kv_cache_takes_the_bytes_of_a_real_one(kind, cut, seed, dtype):
    student, architecture, sizes = layerwise_student(kind, cut, seed)
    tokens = torch.zeros(2, 12, dtype=torch.long)
    with torch.no_grad():
        cache = student.to(dtype)(tokens, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    architecture.config.dtype = dtype
    per_token = architecture.amount(sizes, "kv_cache_bytes_per_token", 16)
    assert per_token * tokens.numel() == held
    weight_bytes = sum(parameter.nbytes for parameter in student.parameters())
    assert architecture.amount(sizes, "weight_bytes", 16) == weight_bytes


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.bfloat16, 2),
        ("bfloat16", 2),
        ("float16", 2),
        (torch.float32, 4),
        ("float32", 4),
        ("float64", 8),
        (None, 2),
    ],
)
def test_bytes_are_those_of_the_configs_precision(dtype, width):
    assert bytes_per_number(LlamaConfig(dtype=dtype)) == width


def test_a_stock_size_counts_as_a_tuple_of_its_own(teacher):
    architecture = Architecture.of(teacher.config)
    sizes = architecture.sizes
    tuples = {axis: (sizes[axis],) * sizes["layers"] for axis in ("kv_groups", "mlp")}
    for measure in ("parameters", "flops_per_token", "kv_cache_bytes_per_token", "weight_bytes"):
        expected = architecture.amount(sizes, measure, 64)
        assert architecture.amount(sizes | tuples, measure, 64) == expected
    assert architecture.amount(sizes, "parameters", 64) == teacher.num_parameters()
    assert kv_cache_bytes_per_token(sizes, 2) == 2 * 2 * 4 * sizes["kv_groups"] * 16
