"""Checkpoint folders: how they are found, read and hashed, and which are refused."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import extract, random_teacher
from tests.model.oracles import (
    assert_same_tensors,
    random_model,
    random_spec,
    reference_logits,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from headstart.model.checkpoint import Checkpoint
from headstart.system.errors import UserError


def test_a_changed_weight_changes_the_hash(saved):
    model = random_teacher("llama-tied-gqa")
    first, same = (Checkpoint.open(saved(model, name)).hash for name in ("teacher", "again"))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert first == same != Checkpoint.open(saved(model, "other")).hash


def test_a_sharded_teacher_gives_the_same_student(teacher, saved, tmp_path):
    spec = random_spec(teacher, layers=2, mlp=40)
    shards = saved(teacher, "sharded", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    sharded = extract(shards, spec, tmp_path / "from-sharded")
    single = extract(saved(teacher), spec, tmp_path / "from-single")
    assert_same_tensors(*(load_file(out / "model.safetensors") for out in (sharded, single)))


def test_a_llama_of_any_width_is_the_stock_model_without_its_silent_heads(saved, tmp_path):
    """Kanana's width is no multiple of its heads; stock code computes it, and its config is shy."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=40, head_dim=8, num_attention_heads=5, num_key_value_heads=5,
        intermediate_size=96, num_hidden_layers=2,
    )  # fmt: skip
    model = random_model(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 24:] = 0  # what heads 3 and 4 say
    folder = saved(model)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "self_attn" in name:
            kept = tensor[:, :24] if "o_proj" in name else tensor[:24]
            tensors[name] = kept.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    entries = json.loads((folder / "config.json").read_text())
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    (folder / "config.json").write_text(json.dumps(entries | heads))

    teacher = Checkpoint.open_whole(folder)
    assert (teacher.architecture.sizes["embed"], teacher.architecture.sizes["kv_groups"]) == (40, 3)
    assert pickle.loads(pickle.dumps(teacher)).architecture.sizes == teacher.architecture.sizes
    tokens = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    for width, is_stock in ((36, True), (38, False)):
        spec = random_spec(loaded, embed=width, mlp=40)
        student = Checkpoint.open(extract(folder, spec, tmp_path / str(width)))
        assert (student.architecture.config.model_type == "llama") is is_stock
        cut = AutoModelForCausalLM.from_pretrained(student.folder)
        expected = reference_logits(loaded, tokens, spec)
        torch.testing.assert_close(cut(tokens).logits.double(), expected, atol=1e-5, rtol=0)


# What is refused


@pytest.fixture
def refused(tmp_path):
    """Check that a teacher is refused in one sentence, and that nothing is written."""

    def check(teacher, message):
        spec = random_spec(random_teacher("llama-tied-gqa"))
        with pytest.raises(UserError, match=message) as caught:
            extract(teacher, spec, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*"))

    return check


def test_a_missing_shard_is_named(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"), max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"names {shard.name}, which is missing")


def test_a_shard_that_was_cut_short_is_named_before_anything_is_read(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"), max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(UserError, match=f"{shard.name} is not a whole safetensors file"):
        _ = Checkpoint.open(folder).files
    refused(folder, f"{shard.name} is not a whole safetensors file .*; fetch it again")


def test_a_shard_of_another_download_is_named(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"), max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.write_bytes(second.read_bytes())
    refused(folder, f"{first.name} lacks .*, which .*index.json says it has; fetch both again")


def test_rows_that_the_config_does_not_know_are_named(saved, refused):
    """As in a checkpoint whose vocabulary was padded without its config."""
    folder = saved(random_teacher("llama-tied-gqa"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 120}))
    refused(folder, r"embed_tokens.weight' has shape \(128, 48\), and the config says \(120, 48\)")


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def refused_whole(folder, message):
    """Check that a teacher is refused in one sentence before anything else is done."""
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.open_whole(folder)
    assert "\n" not in str(caught.value)


def write_weights(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name, metadata={"format": "pt"})


def test_files_that_transformers_does_not_load_are_no_weights(saved):
    folder = saved(random_teacher("llama-tied-gqa"))
    before = Checkpoint.open_whole(folder)
    tensors = {name: tensor * 0 for name, tensor in weights_of(folder).items()}
    write_weights(folder, tensors, "model_old.safetensors")
    write_weights(
        folder, {"layers.0.attention.wk.weight": torch.ones(2)}, "consolidated.safetensors"
    )
    after = Checkpoint.open_whole(folder)
    assert after.hash == before.hash
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in after.tensors():
        torch.testing.assert_close(tensor, loaded[name], rtol=0, atol=0)


def test_other_names_alone_are_told(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, "weights.safetensors have names that transformers does not load")


def test_a_whole_file_beside_whole_shards_is_refused(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"))
    whole = (folder / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").write_bytes(whole)
    refused(folder, "has model.safetensors and all the shards of .*; remove one of them")


def test_an_index_whose_shards_are_gone_is_passed_over(saved):
    folder = saved(random_teacher("llama-tied-gqa"), max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    index = (folder / "model.safetensors.index.json").read_text()
    model.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert set(Checkpoint.open_whole(folder).files.values()) == {folder / "model.safetensors"}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_counted(number, dtype, saved):
    folder = saved(random_teacher("llama-tied-gqa"))
    tensors = {name: tensor.to(dtype) for name, tensor in weights_of(folder).items()}
    tensors["model.norm.weight"][3] = number
    write_weights(folder, tensors)
    refused_whole(folder, "'model.norm.weight' with 1 of 48 numbers that are NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_numbers_that_need_scales_are_refused(dtype, saved):
    folder = saved(random_teacher("llama-tied-gqa"))
    tensors = weights_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    write_weights(folder, tensors)
    refused_whole(
        folder, "holds 'model.norm.weight' as .*8.*, and headstart cuts weights of F64, F32"
    )


def test_an_output_matrix_that_is_not_tied_is_refused(saved):
    folder = saved(random_teacher("llama-tied-gqa"))
    tensors = weights_of(folder)
    embedding = tensors["model.embed_tokens.weight"]
    write_weights(folder, {**tensors, "lm_head.weight": embedding.clone()})
    Checkpoint.open_whole(folder)  # the same numbers twice are one matrix
    write_weights(folder, {**tensors, "lm_head.weight": embedding + 1})
    refused_whole(
        folder, "holds 'lm_head.weight' and another 'model.embed_tokens.weight', and .* ties"
    )


def test_pickles_are_not_read(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json; ")


def test_a_folder_without_config_is_no_model(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"))
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/no-such-model", "no-such-model"])
def test_a_teacher_that_is_nowhere_is_named(name, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(name, f"'{name}' is neither a folder nor a model")


def test_an_unknown_family_is_told_the_known_ones(saved, refused):
    folder = saved(random_teacher("llama-tied-gqa"))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    refused(folder, r"'gpt2' is not .* \(gemma3_text, gpt_neox, llama, ")
