"""What a student computes, against its teacher."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import DESCENDANTS, TEACHERS, extract, random_teacher
from tests.model.oracles import (
    assert_same_tensors,
    masked_parent,
    random_layerwise_spec,
    random_model,
    random_spec,
    reference_logits,
    with_rope,
)
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from headstart.model.architecture import Architecture
from headstart.model.cut import build_student, slice_tensors
from headstart.model.rotary import head_sizes, rotary_pairs
from headstart.model.spec import SubnetSpec

LLAMAS = [kind for kind in TEACHERS if kind.startswith("llama")]
NEOXES = [kind for kind in TEACHERS if kind.startswith("gpt_neox")]


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(0))


def in_memory(model, spec):
    return build_student(model.state_dict().items(), Architecture.of(model.config), spec)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


# What is kept whole


def test_identity_is_bit_exact_on_disk(teacher, saved, tokens, tmp_path):
    folder = saved(teacher)
    whole = SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    out = extract(folder, whole, tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert_same_tensors(written, load_file(folder / "model.safetensors"))
    student = AutoModelForCausalLM.from_pretrained(out)
    assert_same_tensors(student.state_dict(), teacher.state_dict())
    assert torch.equal(logits(student, tokens), logits(teacher, tokens))


def test_identity_is_bit_exact_in_memory(teacher, tokens):
    student = in_memory(teacher, SubnetSpec.identity(Architecture.of(teacher.config).sizes))
    assert_same_tensors(student.state_dict(), teacher.state_dict())
    assert torch.equal(logits(student, tokens), logits(teacher, tokens))
    for name, parameter in student.named_parameters():
        assert parameter.data_ptr() == teacher.get_parameter(name).data_ptr(), name


# What is cut


@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in TEACHERS for cut in (
        {"layers": 2}, {"mlp": 40}, {"layers": 3, "mlp": 7}
    )] + [(kind, cut) for kind in LLAMAS for cut in (
        {"kv_groups": 1}, {"layers": 3, "kv_groups": 2, "mlp": 7}
    )],
)  # fmt: skip
def test_a_student_is_its_masked_parent(kind, cut, tokens):
    model = random_teacher(kind)
    spec = random_spec(model, **cut)
    expected = logits(masked_parent(model, spec), tokens)
    torch.testing.assert_close(logits(in_memory(model, spec), tokens), expected, atol=1e-5, rtol=0)


def test_the_reference_is_the_whole_parent(teacher, tokens):
    spec = SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    expected = reference_logits(teacher, tokens, spec)
    torch.testing.assert_close(logits(teacher, tokens).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in LLAMAS for cut in (
        {"embed": 36},
        {"embed": 18, "layers": 2, "kv_groups": 1, "mlp": 40},
    )] + [(kind, cut) for kind in NEOXES for cut in (
        {"embed": 48, "kv_groups": 3},
        {"embed": 32, "kv_groups": 2, "layers": 3, "mlp": 40},
    )],
)  # fmt: skip
def test_a_narrower_student_is_the_reference_over_kept_channels(kind, cut, tokens, saved, tmp_path):
    model = random_teacher(kind)
    spec = random_spec(model, **cut)
    expected = reference_logits(model, tokens, spec)
    student = in_memory(model, spec)
    torch.testing.assert_close(logits(student, tokens).double(), expected, atol=1e-5, rtol=0)
    written = AutoModelForCausalLM.from_pretrained(extract(saved(model), spec, tmp_path / "out"))
    assert torch.equal(logits(written, tokens), logits(student, tokens))


@pytest.mark.parametrize("kind", DESCENDANTS)
def test_llamas_descendants_are_their_references(kind, tokens):
    """Whole, cut along each axis, and along all of them with layers of different sizes."""
    model = random_teacher(kind)
    cuts = [{}, {"layers": 2}, {"mlp": 7}, {"kv_groups": 1}, {"embed": 36}, {"head_dim": 8}]
    specs = [random_spec(model, **cut) for cut in cuts if cut.keys() <= axes_that_narrow(model)]
    specs.append(random_layerwise_spec(model, 0, layers=3, embed=30))
    for spec in specs:
        expected = reference_logits(model, tokens, spec)
        student = in_memory(model, spec)
        torch.testing.assert_close(logits(student, tokens).double(), expected, atol=5e-5, rtol=0)


def axes_that_narrow(model):
    heads_narrow = "rope_type" in model.config.rope_parameters
    return {"layers", "mlp", "kv_groups", "embed"} | ({"head_dim"} if heads_narrow else set())


@pytest.mark.parametrize("kind", DESCENDANTS)
def test_a_descendant_on_disk_is_the_one_in_memory(kind, tokens, saved, tmp_path):
    model = random_teacher(kind)
    whole = SubnetSpec.identity(Architecture.of(model.config).sizes)
    same = AutoModelForCausalLM.from_pretrained(extract(saved(model), whole, tmp_path / "same"))
    assert_same_tensors(same.state_dict(), model.state_dict())
    assert torch.equal(logits(same, tokens), logits(model, tokens))
    width = 64 if kind.startswith("phi3") else 36  # that of its heads together
    spec = random_spec(model, layers=3, embed=width, kv_groups=2, mlp=40)
    out = extract(tmp_path / "teacher", spec, tmp_path / "out")
    assert not (out / "modeling.py").exists()
    written = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(written, tokens), logits(in_memory(model, spec), tokens))
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        written.generate(tokens, **greedy), written.generate(tokens, **greedy, use_cache=False)
    )


@pytest.mark.parametrize("kind", ["gemma3_text-tied"])
def test_heads_stay_whole_where_layers_turn_differently(kind):
    model = random_teacher(kind)
    assert head_sizes(model.config.rope_parameters, 16) == [16]
    spec = replace(SubnetSpec.identity(Architecture.of(model.config).sizes), head_dim=(0, 8))
    with pytest.raises(ValueError, match="kinds of layers turn by different frequencies"):
        in_memory(model, spec)


@pytest.mark.parametrize("seed", range(2))
def test_layers_of_different_sizes_are_the_reference(teacher, seed, tokens):
    spec = random_layerwise_spec(teacher, seed, layers=3, embed=36)
    assert any(len(set(map(len, sizes))) > 1 for sizes in (spec.kv_groups, spec.mlp))
    expected = reference_logits(teacher, tokens, spec)
    student = in_memory(teacher, spec)
    torch.testing.assert_close(logits(student, tokens).double(), expected, atol=1e-5, rtol=0)


# Narrower heads

SHAPE = {
    "vocab_size": 128, "intermediate_size": 48, "num_hidden_layers": 3, "bos_token_id": None,
    "eos_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip
WITH_HEADS = {
    "llama": LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=16,
        attention_bias=True, **SHAPE,
    ),
    "gpt_neox": GPTNeoXConfig(hidden_size=96, num_attention_heads=3, **SHAPE),
}  # fmt: skip
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
HEAD_SIZES = {"llama": (2, 4, 8, 12), "gpt_neox": (8, 16, 24)}
STOCK_SIZES = {"llama": {"embed": 36, "kv_groups": 2}, "gpt_neox": {"kv_groups": 2}}
each_kind_and_size = pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, size) for kind, sizes in HEAD_SIZES.items() for size in sizes],
)
each_kind = pytest.mark.parametrize("kind", WITH_HEADS)


def turning_pairs(config):
    return rotary_pairs(config.rope_parameters, Architecture.of(config).sizes["head_dim"])


def any_channels(config, seed):
    """Any rotary pairs, and any of the channels that do not turn, in the teacher's shares."""
    generator, head_dim = random.Random(seed), Architecture.of(config).sizes["head_dim"]
    pairs, rest = turning_pairs(config), range(2 * turning_pairs(config), head_dim)
    kept = generator.randint(1, pairs - 1)
    firsts = generator.sample(range(pairs), kept)
    others = generator.sample(rest, kept * len(rest) // pairs)
    return tuple(sorted([*firsts, *(first + pairs for first in firsts), *others]))


def stock_spec(model, size, **cut):
    """A spec with narrower heads that a stock checkpoint can hold."""
    cut = STOCK_SIZES[model.config.model_type] | cut
    if model.config.model_type == "gpt_neox":
        cut["embed"] = cut["kv_groups"] * size
    return random_spec(model, head_dim=size, **cut)


@each_kind_and_size
def test_a_narrower_head_is_the_masked_parents(kind, size, tokens):
    model = random_model(WITH_HEADS[kind])
    head_dim = Architecture.of(model.config).sizes["head_dim"]
    assert size in head_sizes(model.config.rope_parameters, head_dim)
    spec = random_spec(model, head_dim=size, kv_groups=2 if kind == "llama" else 3, mlp=20)
    expected = logits(masked_parent(model, spec), tokens)
    torch.testing.assert_close(logits(in_memory(model, spec), tokens), expected, atol=1e-5, rtol=0)


@each_kind
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("seed", range(2))
def test_any_pairs_may_be_kept_in_memory(kind, rope, seed, tokens):
    model = with_rope(random_model(WITH_HEADS[kind]), **ROPES[rope])
    spec = replace(random_spec(model, mlp=20), head_dim=any_channels(model.config, seed))
    expected = logits(masked_parent(model, spec), tokens)
    torch.testing.assert_close(logits(in_memory(model, spec), tokens), expected, atol=1e-5, rtol=0)


@each_kind
@pytest.mark.parametrize("seed", range(4))
def test_narrower_heads_in_layers_of_different_sizes_are_the_reference(kind, seed, tokens):
    """Also where no stock checkpoint exists: width is not groups times head size."""
    model = random_model(WITH_HEADS[kind])
    spec = random_layerwise_spec(model, seed, layers=2, embed=37)
    spec = replace(spec, head_dim=any_channels(model.config, seed))
    expected = reference_logits(model, tokens, spec)
    student = in_memory(model, spec)
    torch.testing.assert_close(logits(student, tokens).double(), expected, atol=1e-5, rtol=0)


@each_kind_and_size
@pytest.mark.parametrize("rope", ROPES)
def test_stock_code_derives_the_kept_frequencies(kind, size, rope, tokens, saved, tmp_path):
    model = with_rope(random_model(WITH_HEADS[kind]), **ROPES[rope])
    spec = stock_spec(model, size, layers=2)
    written = AutoModelForCausalLM.from_pretrained(extract(saved(model), spec, tmp_path / "out"))
    pairs = [channel for channel in spec.head_dim if channel < turning_pairs(model.config)]
    ours, teachers = (side.base_model.rotary_emb.inv_freq for side in (written, model))
    torch.testing.assert_close(ours, teachers[pairs], rtol=1e-5, atol=0)
    student = in_memory(model, spec)
    torch.testing.assert_close(logits(written, tokens), logits(student, tokens), atol=1e-5, rtol=0)
    assert_same_tensors(written.state_dict(), student.state_dict())
    if rope == "default":
        expected = reference_logits(model, tokens, spec)
        torch.testing.assert_close(logits(written, tokens).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "size"), [("llama", 12), ("gpt_neox", 24)])
def test_frequencies_of_the_new_size_would_be_seen(kind, size, tokens):
    """A stock student whose theta is the teacher's, as a plain slice of the weights would be."""
    model = random_model(WITH_HEADS[kind])
    spec = stock_spec(model, size)
    expected = reference_logits(model, tokens, spec)
    config = Architecture.of(model.config).student(spec).config
    naive = AutoModelForCausalLM.from_config(config).eval()
    naive.load_state_dict(in_memory(model, spec).state_dict())
    torch.testing.assert_close(logits(naive, tokens).double(), expected, atol=1e-5, rtol=0)
    config.rope_parameters = model.config.rope_parameters
    naive = AutoModelForCausalLM.from_config(config).eval()
    naive.load_state_dict(in_memory(model, spec).state_dict())
    assert (logits(naive, tokens) - expected).abs().max() > 0.01


@each_kind
def test_a_head_that_stock_code_cannot_turn_is_not_written(kind, saved, tmp_path):
    model = random_model(WITH_HEADS[kind])
    folder, spec, pairs = saved(model), stock_spec(model, 8), turning_pairs(model.config)
    torn = replace(spec, head_dim=(0, *range(pairs + 1, pairs + 8)))
    scaled = with_rope(model, rope_type="dynamic", factor=2.0)
    for source, refused, message in [
        (folder, torn, f"channel 0 without its rotary partner {pairs}"),
        (saved(scaled, "scaled"), spec, "of kind 'dynamic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            extract(source, refused, tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            in_memory(AutoModelForCausalLM.from_pretrained(source), refused)
    assert not list(tmp_path.glob("out*"))


# The teacher's tensors


def sliced(tensors, model, layers=2):
    spec = random_spec(model, layers=layers)
    return dict(slice_tensors(tensors.items(), Architecture.of(model.config), spec))


def test_the_output_matrix_of_gpt_neox_has_two_names(saved):
    model = random_teacher("gpt_neox-untied")
    on_disk = load_file(saved(model) / "model.safetensors")
    assert "embed_out.weight" in on_disk
    spec = SubnetSpec.identity(Architecture.of(model.config).sizes)
    for tensors in (on_disk, model.state_dict()):
        assert_same_tensors(sliced(tensors, model, layers=4), tensors)
        student = build_student(tensors.items(), Architecture.of(model.config), spec)
        assert torch.equal(student.lm_head.weight, model.lm_head.weight)


def test_an_unknown_tensor_is_named():
    model = random_teacher("llama-tied-gqa")
    name = "model.layers.0.self_attn.q_norm.weight"
    with pytest.raises(ValueError, match=f"'{name}' matches no rule"):
        sliced(model.state_dict() | {name: torch.ones(16)}, model)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(name):
    model = random_teacher("llama-untied-gqa")
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        sliced(tensors, model, layers=4)


def test_an_unexpected_bias_is_named():
    model = random_teacher("llama-untied-gqa")
    name = "model.layers.0.self_attn.o_proj.bias"
    with pytest.raises(ValueError, match=f"'{name}' .* attention_bias=False"):
        sliced(model.state_dict() | {name: torch.ones(48)}, model)
