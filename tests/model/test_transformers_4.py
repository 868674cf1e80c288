"""What is written has the keys that transformers 4.57 reads; here is how that goes by them.

`python benchmarks/clients.py` asks transformers 4.57 itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import DESCENDANTS, TEACHERS, extract, random_teacher
from tests.model.oracles import random_layerwise_spec, random_spec, with_rope
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headstart.model.checkpoint import write_checkpoint
from headstart.model.transformers_4 import old_entries

HALF = [1.0 + i for i in range(4)]
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "short_factor": HALF, "long_factor": HALF},
}


def frequencies(config: dict[str, Any], theta: float, scaling: Any) -> Tensor:
    """As transformers 4.57 derives them, of the kinds above."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = config["rotary_pct"] if "rotary_pct" in config else config.get("partial_rotary_factor")
    width = int(head_dim * (1.0 if share is None else share))
    turns = 1 / theta ** (torch.arange(0, width, 2) / width)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
    if kind == "longrope":
        return turns / torch.tensor(scaling["short_factor"])
    assert kind in (None, "linear")
    return turns / scaling["factor"] if scaling else turns


def assert_turns_alike(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """That the old keys of a folder alone give a model's frequencies; returns all of them."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    rotary: Any = model.base_model.rotary_emb
    theta = config["rotary_emb_base"] if "rotary_emb_base" in config else config["rope_theta"]
    found = frequencies(config, theta, config["rope_scaling"])
    if "rope_local_base_freq" in config:
        torch.testing.assert_close(found, rotary.full_attention_inv_freq)
        local = frequencies(config, config["rope_local_base_freq"], None)
        torch.testing.assert_close(local, rotary.sliding_attention_inv_freq)
    else:
        torch.testing.assert_close(found, rotary.inv_freq)
    return config


def turning(kind: str, **rope: Any) -> PreTrainedModel:
    """A teacher that turns by no default."""
    model = random_teacher(kind)
    if "gemma3" not in kind:
        return with_rope(model, rope_theta=5e5, **rope)
    kinds = model.config.rope_parameters
    return with_rope(
        model,
        full_attention=kinds["full_attention"] | {"rope_theta": 5e5} | rope,
        sliding_attention=kinds["sliding_attention"] | {"rope_theta": 300.0},
    )


@pytest.mark.parametrize("kind", [*TEACHERS, *DESCENDANTS])
def test_students_turn_alike_by_the_old_keys(kind: str, saved: Any, tmp_path: Path) -> None:
    teacher = turning(kind)
    folder = extract(saved(teacher), random_spec(teacher, layers=3, mlp=40), tmp_path / "student")
    config = assert_turns_alike(folder, AutoModelForCausalLM.from_pretrained(folder))
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config.get("rope_local_base_freq") == (300.0 if "gemma3" in kind else None)
    assert len(config.get("layer_types") or [None] * 3) == 3


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("llama-tied-gqa", "linear"),
        ("gpt_neox-tied", "linear"),
        ("gemma3_text-tied", "linear"),
        ("olmo2-tied", "linear"),
        ("phi3-tied-partial", "longrope"),
    ],
)
def test_scaled_positions_too(kind: str, scaling: str, saved: Any, tmp_path: Path) -> None:
    teacher = turning(kind, **SCALED[scaling])
    folder = extract(saved(teacher), random_spec(teacher, mlp=40), tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert_turns_alike(folder, student)
    # transformers 4.57 counts the entries of these two.
    entries = {"olmo2-tied": 2, "phi3-tied-partial": 3}
    config = json.loads((folder / "config.json").read_text())
    assert len(config["rope_scaling"]) == entries.get(kind, 2)
    read = AutoConfig.from_pretrained(folder)
    assert old_entries(read.to_dict() | {"dtype": "float32"}).items() <= config.items()


def test_narrower_heads_have_a_theta_of_their_own_in_both(saved: Any, tmp_path: Path) -> None:
    """Again where the teacher's config has old keys already."""
    teacher, thetas = turning("llama-tied-gqa"), []
    folder = saved(teacher)
    for head_dim in (12, 8):
        spec = random_spec(AutoModelForCausalLM.from_pretrained(folder), head_dim=head_dim)
        folder = extract(folder, spec, tmp_path / str(head_dim))
        config = assert_turns_alike(folder, AutoModelForCausalLM.from_pretrained(folder))
        thetas.append(config["rope_theta"])
    assert len({5e5, *thetas}) == 3


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_files_name_tensors_as_transformers_4_does(name: str, tmp_path: Path) -> None:
    model = random_teacher("gpt_neox-untied")
    tensors = dict(model.state_dict())
    tensors[name] = tensors.pop("lm_head.weight")
    write_checkpoint(tmp_path, tensors, model.config)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "embed_out.weight" in names and "lm_head.weight" not in names


def test_a_layer_wise_student_has_no_old_keys(saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("llama-tied-gqa")
    folder = extract(saved(teacher), random_layerwise_spec(teacher, 1), tmp_path / "student")
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())


def test_no_period_of_windows_stands_beside_the_kinds_of_layers(saved: Any, tmp_path: Path) -> None:
    """Gemma 3's config has one of six by default, whatever the layers are."""
    teacher = random_teacher("gemma3_text-tied")
    folder = extract(saved(teacher), random_spec(teacher, layers=3), tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    assert len(config["layer_types"]) == 3
    assert not [key for key in config if "pattern" in key]
    read = AutoConfig.from_pretrained(folder)
    assert read.layer_types == config["layer_types"]
