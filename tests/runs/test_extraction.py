"""The folders that extraction writes, and the tensors that it reads."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import extract, random_teacher
from tests.model.oracles import assert_same_tensors, random_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

import headstart
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import build_student, slice_tensors
from headstart.model.spec import SubnetSpec, load_spec
from headstart.runs.extraction import extract_found
from headstart.system.errors import UserError

# The written folder

ELSEWHERE = """
import sys

class NoHeadstart:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "headstart":
            raise ImportError(name)

sys.meta_path.insert(0, NoHeadstart())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = AutoTokenizer.from_pretrained(folder)("abc de fgh", return_tensors="pt").input_ids
generated = [
    model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
    for cached in (True, False)
]
assert torch.equal(*generated)
assert generated[0].shape[1] > tokens.shape[1]
torch.save({"tokens": tokens, "logits": model(tokens).logits.detach()}, out)
assert "headstart" not in sys.modules
"""


def test_a_uniform_student_loads_where_headstart_is_not(teacher_folder, tmp_path):
    model = random_teacher("llama-tied-gqa")
    spec = random_spec(model, layers=3, embed=36, kv_groups=1, mlp=40)
    folder = extract(teacher_folder, spec, tmp_path / "student")
    command = [sys.executable, "-I", "-c", ELSEWHERE, folder, tmp_path / "seen.pt"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    seen = torch.load(tmp_path / "seen.pt")
    student = build_student(model.state_dict().items(), Architecture.of(model.config), spec)
    expected = student(seen["tokens"]).logits.detach()
    torch.testing.assert_close(seen["logits"], expected, atol=1e-5, rtol=0)


def test_the_tokenizer_travels_along(teacher_folder, tokenizer, tmp_path):
    spec = random_spec(random_teacher("llama-tied-gqa"), mlp=40)
    folder = extract(teacher_folder, spec, tmp_path / "student")
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, saved, tmp_path):
    model = random_teacher("llama-tied-gqa").to(dtype)
    source, spec = saved(model), random_spec(model, embed=36)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # outdated
    folder = extract(source, spec, tmp_path / "student")
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {dtype}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["LlamaForCausalLM"]
    student = build_student(model.state_dict().items(), Architecture.of(model.config), spec)
    assert student.dtype == dtype


def test_subnet_json_says_where_the_student_came_from(saved, tmp_path):
    model = random_teacher("gpt_neox-untied")
    folder, spec = saved(model), random_spec(model, layers=2, mlp=40)
    out = extract(folder, spec, tmp_path / "student", provenance={"score": 3.5})
    description = json.loads((out / "subnet.json").read_text())
    assert SubnetSpec.from_json(description["spec"]) == spec
    assert description["teacher"] == str(folder)
    assert description["score"] == 3.5
    assert description["teacher_hash"] == Checkpoint.open(folder).hash


def test_each_teacher_tensor_is_reported(teacher, saved, tmp_path):
    reported = []
    folder, spec = saved(teacher), random_spec(teacher, layers=1)
    extract(folder, spec, tmp_path / "out", on_tensor=lambda: reported.append(1))
    assert len(reported) == len(load_file(folder / "model.safetensors"))


# The teacher's tensors


def test_one_teacher_tensor_is_in_memory_at_a_time(saved, tmp_path, monkeypatch):
    model = random_teacher("llama-untied-mha-biases")
    folder = saved(model)
    tensors = load_file(folder / "model.safetensors")
    references = []

    def watched(_):
        for name, tensor in tensors.items():
            assert all(earlier() is None for earlier in references), name
            handed_over = [tensor.clone()]
            references.append(weakref.ref(handed_over[0]))
            yield name, handed_over.pop()

    monkeypatch.setattr(Checkpoint, "tensors", watched)
    spec = random_spec(model, layers=3, embed=36, kv_groups=3, mlp=40)
    extract(folder, spec, tmp_path / "out")
    assert len(references) == len(tensors)


@pytest.mark.parametrize(
    ("kind", "buffers", "tied"),
    [
        ("llama-tied-gqa", ["self_attn.rotary_emb.inv_freq"], "lm_head.weight"),
        (
            "gpt_neox-tied",
            ["attention.rotary_emb.inv_freq", "attention.masked_bias", "attention.bias"],
            "embed_out.weight",
        ),
    ],
)
def test_old_buffers_and_tied_copies_are_dropped_silently(kind, buffers, tied, saved, tmp_path):
    model = random_teacher(kind)
    layers = f"{model.base_model_prefix}.layers"
    names = [tied, *(f"{layers}.{i}.{buffer}" for i in range(4) for buffer in buffers)]
    file = saved(model) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: torch.ones(3) for name in names}, file, {"format": "pt"})
    spec = random_spec(model, layers=3, mlp=40)
    folder = extract(file.parent, spec, tmp_path / "out")
    expected = dict(slice_tensors(tensors.items(), Architecture.of(model.config), spec))
    assert_same_tensors(load_file(folder / "model.safetensors"), expected)


# What is left alone


def test_an_existing_folder_is_left_untouched(teacher_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    spec = random_spec(random_teacher("llama-tied-gqa"))
    with pytest.raises(ValueError, match="exists already"):
        extract(teacher_folder, spec, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize("step", ["huggingface_hub.save_torch_state_dict", "shutil.copyfile"])
def test_a_failure_midway_leaves_no_folder(step, teacher_folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    spec, out = random_spec(random_teacher("llama-tied-gqa"), mlp=40), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(step, full)
        extract(teacher_folder, spec, out)
    assert not out.exists()
    AutoModelForCausalLM.from_pretrained(extract(teacher_folder, spec, out))
    assert list(tmp_path.iterdir()) == [out]


def test_a_spec_of_another_teacher_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    teacher = Checkpoint.open(teacher_folder)
    spec = SubnetSpec.identity(teacher.architecture.sizes)
    files = {
        "search.json": {"spec": spec.to_json(), "teacher": {"name": "t", "hash": "abc"}},
        "subnet.json": {"spec": spec.to_json(), "teacher": "t", "teacher_hash": "abc"},
        "bare.json": spec.to_json(),
        "own.json": {"spec": spec.to_json(), "teacher_hash": teacher.hash},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name in ("search.json", "subnet.json"):
        message = rf"{name} was found in another teacher \(hash abc\) than .*{teacher.hash}"
        with pytest.raises(UserError, match=message):
            extract_found(teacher, tmp_path / name, tmp_path / "student")
        with pytest.raises(UserError, match="the spec was found in another teacher"):
            headstart.extract(teacher_folder, load_spec(tmp_path / name))
    for name in ("bare.json", "own.json"):
        assert extract_found(teacher, tmp_path / name, tmp_path / f"student of {name}").is_dir()


def test_a_student_of_two_precisions_says_so(saved, tmp_path):
    """Loaded in the precision of its config, its norms would be rounded."""
    model = random_teacher("llama-tied-gqa")
    folder = saved(model)
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: part if part.ndim == 1 else part.half() for name, part in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    student = extract(folder, random_spec(model, layers=2, mlp=40), tmp_path / "student")
    written = load_file(student / "model.safetensors")
    num_wide = sum(part.numel() for part in written.values() if part.dtype == torch.float32)
    assert num_wide and json.loads((student / "config.json").read_text())["dtype"] == "float16"
    origin = json.loads((student / "subnet.json").read_text())
    assert origin["other_precisions"] == {"float32": num_wide}
    assert (
        f"another precision than most: {num_wide:,} in float32"
        in (student / "README.md").read_text()
    )
