"""Malformed teachers, tokenizers, texts and specs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from malformed.world import Case, World


def teachers(world: World) -> Iterator[Case]:
    def config(**entries: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            path = folder / "config.json"
            found = json.loads(path.read_text()) | entries
            kept = {key: value for key, value in found.items() if value is not ...}
            path.write_text(json.dumps(kept))

        return change

    def text_of(file: str, content: str | bytes) -> Callable[[Path], None]:
        data = content.encode() if isinstance(content, str) else content
        return lambda folder: (folder / file).write_bytes(data) and None

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            found = load_file(folder / "model.safetensors")
            change(found)
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

        return apply

    def index(weight_map: Any) -> Callable[[Path], None]:
        return text_of("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))

    quantised = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "compressed-tensors": {"quant_method": "compressed-tensors"},
        "mxfp4": {"quant_method": "mxfp4"},
    }
    name = "model.layers.1.mlp.down_proj.weight"
    changes: dict[str, Callable[[Path], None]] = {
        "weights cut short": cut,
        "weights that are text": text_of("model.safetensors", "version https://git-lfs"),
        "empty weights": text_of("model.safetensors", ""),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "pickled weights": lambda folder: (
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None
        ),
        "a tensor missing": tensors(lambda found: found.pop(name)),
        "a tensor too many": tensors(lambda found: found.update(extra=torch.ones(2))),
        "a tensor of another shape": tensors(lambda found: found.update({name: torch.ones(48, 9)})),
        "an index that is garbage": text_of("model.safetensors.index.json", "{"),
        "an index without a map": text_of("model.safetensors.index.json", "{}"),
        "an index of a missing shard": index({name: "model-00002.safetensors"}),
        "an index of a missing tensor": index({"nothing.weight": "model.safetensors"}),
        "config.json missing": lambda folder: (folder / "config.json").unlink(),
        "config.json garbage": text_of("config.json", "{"),
        "config.json empty": text_of("config.json", ""),
        "config.json a list": text_of("config.json", "[]"),
        "config.json of binary": text_of("config.json", b"\xff\xfe\x00"),
        "no model_type": config(model_type=...),
        "an unknown model_type": config(model_type="unheard_of"),
        "a model_type that is a number": config(model_type=3),
        "an encoder": config(model_type="bert"),
        "0 heads": config(num_attention_heads=0),
        "-6 heads": config(num_attention_heads=-6),
        "heads that groups do not divide": config(num_key_value_heads=4),
        "0 groups": config(num_key_value_heads=0),
        "0 layers": config(num_hidden_layers=0),
        "more layers than weights": config(num_hidden_layers=7),
        "fewer layers than weights": config(num_hidden_layers=3),
        "another width": config(hidden_size=50),
        "a width of 0": config(hidden_size=0),
        "a width in words": config(hidden_size="wide"),
        "neurons in words": config(intermediate_size="many"),
        "another vocabulary": config(vocab_size=64),
        "an unknown activation": config(hidden_act="unheard_of"),
        "an unknown rope": config(rope_parameters={"rope_type": "unheard_of", "rope_theta": 1e4}),
        "a context of 8": config(max_position_embeddings=8),
        "a context in words": config(max_position_embeddings="long"),
        "a fraction of a layer": config(num_hidden_layers=2.5),
        "a vocabulary below 0": config(vocab_size=-1),
        "an epsilon in words": config(rms_norm_eps="small"),
        "an unknown precision": config(dtype="float99"),
        "a quantisation that is a word": config(quantization_config="gptq"),
        "an index that is a list": text_of("model.safetensors.index.json", "[]"),
        "an index of files that are lists": index({name: ["model.safetensors"]}),
        "tokenizer.json garbage": text_of("tokenizer.json", "{"),
        "tokenizer.json empty": text_of("tokenizer.json", ""),
        "no tokenizer": lambda folder: (
            [(folder / file).unlink() for file in ("tokenizer.json", "tokenizer_config.json")]
            and None
        ),
        "a tokenizer without an end": text_of(
            "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        ),
        "tokenizer_config.json garbage": text_of("tokenizer_config.json", "{"),
        **{
            f"quantised by {kind}": config(quantization_config=entry)
            for kind, entry in quantised.items()
        },
    }
    for number, (problem, change) in enumerate(changes.items()):
        folder = world.damaged(f"{number}", change)
        kind = "tokenizer" if "tokenizer" in problem else "teacher"
        yield Case(kind, problem, world.run(teacher=folder))
        if "tokenizer" in problem or "context" in problem:  # which other commands do without
            continue
        model, out = str(folder), str(world.folder / "new")
        spec = str(world.student / "subnet.json")
        commands = {
            "evaluated": ["evaluate", model, "--data", str(world.text), "--block-length", "32"],
            "exported": ["export", model, "--to", "hf", "--out", out],
            "cut": ["extract", "--teacher", model, "--spec", spec, "--out", out, "--init", "slice"],
        }
        for purpose, command in commands.items():
            yield Case(kind, f"{problem}, {purpose}", command)
    for problem, value in {
        "a folder that is not there": world.folder / "nowhere",
        "an empty folder": world.file("empty/.keep", "").parent,
        "a file": world.folder / "good.yaml",
        "a name no hub has": "no-such-owner-xyz/no-such-model",
        "a name no hub can have": "a b//c",
    }.items():
        yield Case("teacher", problem, world.run(teacher=value))


def texts(world: World) -> Iterator[Case]:
    good = (world.text / "0.jsonl").read_bytes()
    sources: dict[str, tuple[str, str | bytes]] = {
        "an empty file": ("empty.txt", ""),
        "only blanks": ("blank.txt", " \n\n \n"),
        "only empty documents": ("empty.jsonl", '{"text": ""}\n' * 5),
        "too little for a block": ("short.jsonl", '{"text": "ab cd"}\n'),
        "a book in one .txt": ("book.txt", "ab cd ef\n\n" * 500),
        "binary as .txt": ("binary.txt", bytes(range(256)) * 20),
        "binary as .jsonl": ("binary.jsonl", bytes(range(128, 256)) * 20),
        "binary as .parquet": ("binary.parquet", bytes(range(256)) * 20),
        "text as .parquet": ("text.parquet", "PAR1 but not really"),
        "text as .gz": ("text.jsonl.gz", good),
        "a cut .gz": ("cut.jsonl.gz", gzip.compress(good)[:-200]),
        "a cut .json": ("cut.json", '[{"text": "ab"'),
        "another column": ("other.jsonl", '{"body": "ab cd"}\n' * 50),
        "a column of numbers": ("numbers.jsonl", '{"text": 17}\n' * 50),
        "a column of lists": ("lists.jsonl", '{"text": ["ab"]}\n' * 50),
        "no JSON at all": ("words.jsonl", "ab cd\n" * 50),
        "an unknown suffix": ("text.csv", "text\nab\n"),
        "no suffix": ("text", "ab cd"),
    }
    for problem, (name, content) in sources.items():
        yield Case("text", problem, world.run(data=world.file(f"texts/{name}", content)))
    cut_line = good.replace(b'"text"', b'"text', 1)
    strict = world.file("texts/strict.jsonl", cut_line)
    yield Case("text", "a corrupt line, strictly", world.run(data=strict, data__strict="true"))
    yield Case("text", "a folder without files", world.run(data=world.file("none/a.md", "").parent))
    yield Case("text", "nothing there", world.run(data=world.folder / "nowhere.txt"))
    yield Case("text", "another column's name", world.run(data__text_column="body"))
    yield Case("text", "a dataset no hub has", world.run(data="no-such-owner-xyz/no-such-data"))


def specs(world: World) -> Iterator[Case]:
    good = json.loads((world.student / "subnet.json").read_text())["spec"]
    contents: dict[str, Any] = {
        "garbage": "{",
        "empty": "",
        "a list": [],
        "nothing in it": {},
        "no layers": {**good, "layers": ""},
        "a layer beyond the teacher": {**good, "layers": "0,9"},
        "a channel beyond the teacher": {**good, "embed": "0-48"},
        "a neuron beyond the teacher": {**good, "mlp": ["0-80"] * 2},
        "a group beyond the teacher": {**good, "kv_groups": ["0-3"] * 2},
        "indices that are words": {**good, "embed": "all"},
        "indices that are numbers": {**good, "embed": 3},
        "indices without end": {**good, "embed": "0-99999999999"},
        "indices of 5000 digits": {**good, "embed": "9" * 5000},
        "indices twice": {**good, "embed": "0,0,1"},
        "indices downwards": {**good, "embed": "9-3"},
        "fewer groups than layers": {**good, "kv_groups": ["0-2"]},
        "no neurons": {**good, "mlp": ["", ""]},
        "of another teacher": {"spec": good, "teacher_hash": "0" * 32},
        "a spec that is a word": {"spec": "words"},
    }
    for number, (problem, content) in enumerate(contents.items()):
        text = content if isinstance(content, str) else json.dumps(content)
        spec = world.file(f"specs/{number}.json", text)
        out = str(world.folder / "cut")
        command = ["extract", "--teacher", str(world.teacher), "--spec", str(spec), "--out", out]
        yield Case("spec", problem, [*command, "--init", "slice"])
    for problem, path in {
        "not there": world.folder / "nowhere.json",
        "a folder": world.folder,
        "binary": world.file("specs/binary.json", b"\xff\xfe"),
    }.items():
        command = ["extract", "--teacher", str(world.teacher), "--spec", str(path), "--out", out]
        yield Case("spec", problem, [*command, "--init", "slice"])
