"""Layer-wise students in the clients that people use: they load, generate, train and save."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.conftest import DESCENDANTS, GATE, TEACHERS, extract, random_teacher
from tests.model.oracles import assert_same_tensors, random_layerwise_spec, random_spec
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from headstart.model import modeling
from headstart.model.architecture import Architecture
from headstart.model.cut import build_student
from headstart.model.families import FAMILIES
from headstart.model.layerwise import PREFIX

KINDS = [*TEACHERS, *DESCENDANTS]
ONE_OF_EACH = ["llama-tied-gqa", "gpt_neox-untied", "qwen3-tied", "gemma3_text-tied"]
"""For what does not depend on the family's details."""
PROMPT = torch.randint(1, 128, (2, 11), generator=torch.Generator().manual_seed(0))


def layerwise(model: PreTrainedModel) -> Any:
    return random_layerwise_spec(model, seed=1, layers=3, embed=36)


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, saved: Any, tmp_path: Path) -> Path:
    """A layer-wise student of each kind of teacher."""
    model = random_teacher(request.param)
    return extract(saved(model), layerwise(model), tmp_path / "student")


def greedy(model: PreTrainedModel, **options: Any) -> Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = PROMPT, **options: Any) -> Tensor:
    return model(tokens, **options).logits


def close(left: Tensor, right: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


def test_it_is_saved_loaded_and_saved_again_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    architecture = Architecture.read(folder)
    assert architecture.config.is_heterogeneous and isinstance(architecture.sizes["mlp"], tuple)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) in modeling.MODELS
    assert architecture.count(64).parameters == model.num_parameters()
    model.save_pretrained(tmp_path / "again")
    folders = (folder, tmp_path / "again")
    files = [load_file(path / "model.safetensors") for path in folders]
    assert_same_tensors(*files)
    texts = [json.loads((path / "config.json").read_text()) for path in folders]
    assert texts[0] == texts[1]
    codes = [(path / "modeling.py").read_text() for path in folders]
    assert codes[0] == codes[1] == Path(modeling.__file__).read_text()


def test_disk_and_memory_agree_and_every_way_to_generate_too(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = greedy(model, use_cache=False)
    assert torch.equal(greedy(model), expected)
    beams = {"num_beams": 3, "length_penalty": 0.0}
    assert torch.equal(greedy(model, **beams), greedy(model, **beams, use_cache=False))
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), PROMPT), dim=1)
    mask = (torch.arange(15) >= 4).long().expand(2, -1)
    left = model.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert torch.equal(left[:, 4:], expected)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    close(logits(eager), logits(model))
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model), logits(eager))


@pytest.mark.parametrize("kind", KINDS)
def test_disk_computes_what_memory_does(kind: str, saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    spec = layerwise(teacher)
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    written = AutoModelForCausalLM.from_pretrained(extract(saved(teacher), spec, tmp_path / "out"))
    assert torch.equal(logits(written), logits(student))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_disable. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_it_trains_with_checkpointing_and_compiled(kind: str, saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    model = AutoModelForCausalLM.from_pretrained(
        extract(saved(teacher), layerwise(teacher), tmp_path / "student")
    )

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(PROMPT, labels=PROMPT).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    for left, right in zip(gradients(), plain, strict=True):
        close(left, right)
    model.gradient_checkpointing_disable()
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    close(logits(compiled), logits(model))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_attention(saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("qwen3-tied")
    folder = extract(saved(teacher), layerwise(teacher), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    flex = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flex_attention")
    close(logits(flex), logits(model), atol=1e-4)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_static_cache(kind: str, saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    folder = extract(saved(teacher), layerwise(teacher), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    is_renamed = "cache" in inspect.signature(model.forward).parameters  # since 5.24
    options = {
        "cache" if is_renamed else "past_key_values": StaticCache(model.config, max_cache_len=32)
    }
    first = logits(model, PROMPT[:, :6], **options)
    rest = logits(model, PROMPT[:, 6:], **options)
    close(torch.cat((first, rest), dim=1), logits(model))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_dtype_and_device_map(kind: str, saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    folder = extract(saved(teacher), layerwise(teacher), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", device_map={"": "cpu"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == teacher.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-untied"])
def test_random_weights_of_the_same_shape(kind: str) -> None:
    teacher = random_teacher(kind)
    architecture = Architecture.of(teacher.config)
    student = build_student(teacher.state_dict().items(), architecture, layerwise(teacher))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(student.config)
    for name, parameter in model.named_parameters():
        assert parameter.shape == student.get_parameter(name).shape
        if parameter.ndim == 2:
            expected = student.config.initializer_range
            assert parameter.std().item() == pytest.approx(expected, rel=0.2), name


ELSEWHERE = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor({tokens})
for folder in Path(sys.argv[1]).iterdir():
    trusts = {{"trust_remote_code": True}} if (folder / "modeling.py").exists() else {{}}
    model = AutoModelForCausalLM.from_pretrained(folder, **trusts)
    torch.save(model(tokens).logits.detach(), folder / "logits.pt")
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **trusts)
    assert torch.equal(again(tokens).logits, model(tokens).logits), folder
assert not any(name.split(".")[0] == "headstart" for name in sys.modules)
"""


def uniform(model: PreTrainedModel) -> Any:
    """Of a shape that every family's stock code can have."""
    spec = random_spec(model, layers=3, embed=64 if is_tied_to_heads(model) else 36, mlp=40)
    if is_tied_to_heads(model):
        sizes = Architecture.of(model.config).sizes
        num_groups = 64 // (sizes["head_dim"] * sizes["q_per_kv"])
        return replace(spec, kv_groups=(tuple(range(num_groups)),) * 3)
    return spec


def is_tied_to_heads(model: PreTrainedModel) -> bool:
    return model.config.model_type in ("gpt_neox", "phi3")


@pytest.mark.parametrize("kinds", [GATE, pytest.param(KINDS, marks=pytest.mark.exhaustive)])
def test_every_student_loads_where_headstart_is_not(
    kinds: Sequence[str], saved: Any, tmp_path: Path
) -> None:
    """In a fresh process: stock code alone for uniform ones, `modeling.py` for layer-wise ones."""
    students = tmp_path / "students"
    for kind in kinds:
        teacher = random_teacher(kind)
        folder = saved(teacher, kind)
        extract(folder, layerwise(teacher), students / f"{kind}-layerwise")
        out = extract(folder, uniform(teacher), students / f"{kind}-uniform")
        assert not (out / "modeling.py").exists(), kind
    script = ELSEWHERE.format(tokens=PROMPT.tolist())
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", script, str(students)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for folder in students.iterdir():
        expected = logits(AutoModelForCausalLM.from_pretrained(folder))
        assert torch.equal(torch.load(folder / "logits.pt"), expected), folder.name


def test_the_shipped_file_says_which_transformers_it_needs(monkeypatch: Any) -> None:
    needed = ".".join(map(str, modeling.NEEDED))
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={needed}",' in project
    source = Path(modeling.__file__).read_text()
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match=rf"needs transformers {needed} .* this is 4\.57\.6; "):
        exec(compile(source, "modeling.py", "exec"), {})


def test_the_shipped_file_imports_torch_and_transformers_only() -> None:
    tree = ast.parse(Path(modeling.__file__).read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules == {"__future__", "copy", "typing", "torch", "transformers"}
    types = {model.config_class.model_type for model in modeling.MODELS}
    assert types == {PREFIX + family for family in FAMILIES}


SLOWLY = [
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ("LlamaForCausalLM", "Trainer", "")
]


@pytest.mark.parametrize("first", ["AutoConfig", "AutoModelForCausalLM", *SLOWLY])
def test_importing_headstart_imports_no_transformers_and_still_registers(
    first: str, saved: Any, tmp_path: Path
) -> None:
    teacher = random_teacher("llama-tied-gqa")
    folder = extract(saved(teacher), layerwise(teacher), tmp_path / "student")
    script = (
        "import sys, headstart\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        + (f"from transformers import {first}\n" if first else "")
        + "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model).__module__ == 'headstart.model.modeling'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_headstart_imported_last_registers_too(saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("llama-tied-gqa")
    folder = extract(saved(teacher), layerwise(teacher), tmp_path / "student")
    script = (
        "from transformers import AutoConfig, Trainer, LlamaForCausalLM\n"
        "import headstart\n"
        f"assert AutoConfig.from_pretrained({str(folder)!r}).model_type == 'headstart_llama'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_gpt_neox_student_of_free_shape(saved: Any, tmp_path: Path) -> None:
    teacher = random_teacher("gpt_neox-untied")
    spec = random_spec(teacher, embed=40, kv_groups=3, layers=2)
    spec = replace(spec, kv_groups=(spec.kv_groups[0],) * 2, mlp=(spec.mlp[0],) * 2)
    folder = extract(saved(teacher), spec, tmp_path / "student")
    config = AutoConfig.from_pretrained(folder)
    assert not config.is_heterogeneous and config.head_dim == 16
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(greedy(model), greedy(model, use_cache=False))
    student = build_student(teacher.state_dict().items(), Architecture.of(teacher.config), spec)
    assert torch.equal(logits(model), logits(student))
