"""Every family's students, trained arms and padded exports in other people's tools.

Part of `python benchmarks/clients.py`, which prints its table. Teachers have random weights, rotary
positions by no default, and the tokenizer of the demo's teacher. A cell is the largest difference
of a client's logits from those of transformers 5, or whether a greedy text is the same, or the
sentence in which it is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from headstart.demo import demo_teacher
from headstart.model.checkpoint import Checkpoint, copy_files
from headstart.model.export import export_gguf, export_stock
from headstart.model.spec import parse_indices
from headstart.recipe import recipe_from_dict
from headstart.runs.extraction import extract_found
from headstart.runs.stages import run_pretrain
from headstart.system.errors import UserError
from headstart.system.files import write_json
from peers.environment import ask, llama_cpp_python, peft_python, transformers_4_python
from tiny import write_text

WIDTH, HEAD_DIM, NEURONS = 64, 16, 96
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {**ROPE, "rope_type": "linear", "factor": 2.0}
LLAMA_3 = {
    **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KEPT = "0-1,3"
"""Of four layers."""
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", KEPT, {"rope_parameters": LLAMA_3, "head_dim": HEAD_DIM}),
    "mistral": ("Mistral", KEPT, {"rope_parameters": ROPE, "sliding_window": None}),
    "qwen2": ("Qwen2", KEPT, {"rope_parameters": ROPE}),
    "qwen3": ("Qwen3", KEPT, {"rope_parameters": LINEAR, "head_dim": HEAD_DIM}),
    "gemma3_text": (
        "Gemma3",
        KEPT,
        {
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL_ROPE},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "head_dim": HEAD_DIM,
        },
    ),
    "gemma3_text, runs of six": (
        "Gemma3",
        "0-5",
        {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {**LOCAL_ROPE, "rope_theta": 10_000.0},
            },
            "sliding_window": 8,
            "head_dim": HEAD_DIM,
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
    "olmo2": ("Olmo2", KEPT, {"rope_parameters": LINEAR, "tie_word_embeddings": False}),
    "phi3": ("Phi3", KEPT, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gpt_neox": ("GPTNeoX", KEPT, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
}
"""Family -> its classes' name, the layers that students keep, and what of its config matters."""
TOKENS = list(range(100, 200))
PROMPT, NUM_TOKENS = "The river flows through the old town and the", 32
SHORT = ("same text", "as exported")
"""What stands in the table itself."""
TOLERANCE = 1e-4
"""Within which float32 logits are equal."""


@dataclass(frozen=True)
class Artefact:
    """A folder that headstart wrote, or the sentence in which it refused to.

    `reference` is the folder that must compute the same.
    """

    kind: str
    folder: Path
    reference: Path
    is_layerwise: bool = False
    refusal: str = ""


def write_family_teacher(folder: Path, family: str) -> Path:
    """A small teacher of a family whose norms and biases are random too."""
    name, _, entries = FAMILIES[family]
    shape = {
        "vocab_size": 49_152, "hidden_size": WIDTH, "intermediate_size": NEURONS,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    of_config = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{of_config}Config")(**shape | entries)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.save_pretrained(folder)
    copy_files(demo_teacher(), folder)
    # Under a name that it has in both versions, as tokenizers on the hub have.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(
        folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    )
    return folder


def write_spec(teacher: Checkpoint, layers: str, path: Path, is_uniform: bool) -> Path:
    """A spec of some layers: all half as wide, or of different sizes in the teacher's width."""
    groups = teacher.architecture.sizes["kv_groups"]
    number = len(parse_indices(layers))
    width, heads, mlp = WIDTH, [f"0-{groups - 1}", "0"], ["0-95", "0-63"]
    if is_uniform:
        width, heads, mlp = WIDTH // 2, [f"0-{groups // 2 - 1}"] * 2, ["0-63"] * 2
    spec = {
        "layers": layers,
        "embed": f"0-{width - 1}",
        "kv_groups": (heads * number)[:number],
        "mlp": (mlp * number)[:number],
    }
    write_json(path, spec)
    return path


def artefacts_of(family: str, text: Path, folder: Path) -> list[Artefact]:
    """Cut, train and export what one row of the table is about."""
    teacher = Checkpoint.open(write_family_teacher(folder / "teacher", family))
    layers = FAMILIES[family][1]
    blocks = torch.randint(3, 49_152, (16, 32), generator=torch.Generator().manual_seed(0))
    uniform = extract_found(
        teacher,
        write_spec(teacher, layers, folder / "uniform.json", is_uniform=True),
        folder / "student",
        init="least_squares",
        calibration_blocks=blocks,
    )
    layerwise = extract_found(
        teacher,
        write_spec(teacher, layers, folder / "layerwise.json", is_uniform=False),
        folder / "layerwise",
    )
    recipe = {
        "teacher": str(teacher.folder),
        "student": str(uniform),
        "output": str(folder / "run"),
        "data": {"source": str(text), "block_length": 32},
        "pretrain": {
            "tokens": 640, "validation_tokens": 256, "test_tokens": 256, "evaluations": 2,
            "arms": [{"name": "subnet+kd", "kd": {"alpha": 0.5}}],
        },
        "train": {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4},
    }  # fmt: skip
    run_pretrain(recipe_from_dict(recipe))
    arm = folder / "run" / "arms" / "subnet+kd" / "model"
    export, refusal = folder / "export", ""
    try:
        export_stock(layerwise, export, pads=True)
    except UserError as error:
        refusal = str(error)
    return [
        Artefact("student", uniform, uniform),
        Artefact("trained arm", arm, arm),
        Artefact("layer-wise student", layerwise, layerwise, is_layerwise=True),
        Artefact("padded export", export, layerwise, refusal=refusal),
    ]


def asked(client: str, python: Path, artefacts: list[Artefact]) -> dict[Path, dict[str, Any]]:
    """What one client says of the folders, by folder."""
    models = [
        {
            "folder": str(artefact.folder),
            "trusts": artefact.is_layerwise,
            "logits": str(logits_file(client, python, artefact.folder)),
        }
        for artefact in artefacts
    ]
    request = {"models": models, "tokens": TOKENS, "prompt": PROMPT, "num_tokens": NUM_TOKENS}
    answers = ask(python, "matrix_worker.py", client, **request)
    return {artefact.folder: answer for artefact, answer in zip(artefacts, answers, strict=True)}


def logits_file(client: str, python: Path, folder: Path) -> Path:
    return folder.parent / f"{folder.name}-{client}-{python.parents[1].name}.pt"


def llama_cpp_cell(artefact: Artefact, expected: Mapping[str, Any]) -> str:
    """Whether llama.cpp goes on with the same text, or why not."""
    out = artefact.folder.parent / f"{artefact.folder.name}.gguf"
    try:
        export_gguf(artefact.folder, out, pads=True, precision="float32")
        (text,) = ask(
            llama_cpp_python(),
            "llama_cpp_worker.py",
            str(out),
            prompts=[expected["prompt"]],
            num_tokens=NUM_TOKENS,
        )
    except (UserError, RuntimeError) as error:
        return str(error)
    tokenizer = transformers.AutoTokenizer.from_pretrained(artefact.folder)
    ours = tokenizer.decode(expected["text"][len(expected["prompt"]) :])
    return "same text" if text == ours else f"ANOTHER TEXT: {text[:30]!r}, not {ours[:30]!r}"


def print_matrix(folder: Path) -> bool:
    """Print the table; whether every cell is equal or a refusal that was meant."""
    text = write_text(folder / "text")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    artefacts = {}
    for family in FAMILIES:
        print(f"cutting, training and exporting {family}", file=sys.stderr)
        artefacts[family] = artefacts_of(family, text, folder / family)
    written = [one for of_family in artefacts.values() for one in of_family if not one.refusal]
    here = Path(sys.executable)
    clients: dict[str, tuple[str, Callable[[], Path]]] = {
        f"transformers {transformers.__version__}": ("transformers", lambda: here),
        "transformers 4.57": ("transformers", transformers_4_python),
        "lm-eval": ("lm_eval", lambda: here),
        "PEFT": ("peft", peft_python),
    }
    expected = asked("transformers", here, written)
    is_well = True
    for column, (client, python_of) in clients.items():
        python = python_of()
        found = asked(client, python, written)
        for family, of_family in artefacts.items():
            for one in of_family:
                cell = one.refusal or found[one.folder].get("error", "")
                if not cell:
                    logits = torch.load(logits_file(client, python, one.folder))
                    right = torch.load(logits_file("transformers", here, one.reference))
                    difference = (logits - right).abs().max().item()
                    same = found[one.folder]["text"] == expected[one.reference]["text"]
                    cell = f"{difference:.1e}" if difference else "0"
                    cell += "" if same else ", ANOTHER TEXT"
                    is_well &= same and difference < TOLERANCE
                rows.setdefault((family, one.kind), {})[column] = cell
    for family, of_family in artefacts.items():
        for one in of_family:
            cell = one.refusal or "as exported"
            if not one.refusal and not one.is_layerwise:
                cell = llama_cpp_cell(one, expected[one.reference])
            is_well &= "ANOTHER TEXT" not in cell
            rows[family, one.kind]["llama.cpp"] = cell
    _print_table(rows, folder)
    return is_well


def _print_table(rows: Mapping[tuple[str, str], Mapping[str, str]], folder: Path) -> None:
    """As Markdown, with the sentences below it, which name no places in the scratch folder."""
    columns = list(next(iter(rows.values())))
    sentences: list[str] = []
    print(f"| family | folder | {' | '.join(columns)} |")
    print("| :-- | :-- |" + " --: |" * len(columns))
    for (family, kind), cells in rows.items():
        texts = []
        for column in columns:
            cell = re.sub(rf"{re.escape(str(folder))}[^\s)]*", "FOLDER", cells[column])
            if " " in cell and cell not in SHORT:
                if cell not in sentences:
                    sentences.append(cell)
                cell = f"({sentences.index(cell) + 1})"
            texts.append(cell)
        print(f"| {family} | {kind} | {' | '.join(texts)} |")
    print()
    for number, sentence in enumerate(sentences, 1):
        print(f"{number}. {sentence}")
