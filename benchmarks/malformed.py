"""Malformed inputs of every kind, as command lines.

Of recipes, every key of every level is given what it cannot mean.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import shutil
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from headstart.calibration.start import Calibration
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import SubnetSpec
from headstart.recipe import Recipe
from headstart.runs.extraction import extract_student
from tiny import small_recipe, write_teacher, write_text


@dataclass(frozen=True)
class Case:
    """One malformed input: its kind, what is wrong with it, and the command line that gives it."""

    kind: str
    name: str
    command: list[str]


@dataclass(frozen=True)
class World:
    """Good inputs, and a place for bad ones."""

    folder: Path
    teacher: Path
    text: Path
    student: Path

    def recipe(self, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        """A recipe file in which something was changed."""
        tree = small_recipe(self.teacher, self.text, self.folder / "run")
        change(tree)
        return self.file(f"recipes/{name}.yaml", yaml.safe_dump(tree))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, **changes: Any) -> list[str]:
        """`headstart run` with the good recipe but for some keys, whose dots are underscores."""
        good = str(self.folder / "good.yaml")
        flags = [
            part
            for key, value in changes.items()
            for part in (f"--{key.replace('__', '.')}", str(value))
        ]
        return ["run", good, *flags]

    def damaged(self, name: str, change: Callable[[Path], None]) -> Path:
        """A copy of the teacher in which something was changed."""
        folder = self.folder / "teachers" / name
        shutil.copytree(self.teacher, folder)
        change(folder)
        return folder


def make_world(folder: Path) -> World:
    text = write_text(folder / "text")
    teacher = write_teacher(folder / "teacher", text)
    opened = Checkpoint.open(teacher)
    student = folder / "student"
    spec = dataclasses.replace(SubnetSpec.identity(opened.architecture.sizes), layers=(0, 1))
    spec = dataclasses.replace(spec, kv_groups=spec.kv_groups[:2], mlp=spec.mlp[:2])
    extract_student(Calibration(opened), spec, student)
    world = World(folder, teacher, text, student)
    world.file("good.yaml", yaml.safe_dump(small_recipe(teacher, text, folder / "run")))
    return world


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


WRONG = {
    int: {
        "text": "many",
        "a fraction": 1.5,
        "a list": [1],
        "keys": {"a": 1},
        "infinite": float("inf"),
    },
    float: {"text": "many", "a list": [1], "no number": float("nan"), "infinite": float("inf")},
    str: {"a list": ["a"], "keys": {"a": 1}, "a number": 3},
    bool: {"text": "maybe", "a number": 3, "a list": [True]},
}
"""What no key of a type can mean; by type."""


def leaves(kind: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a settings class and of those below it, with its type."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, here = hints[field.name], (*keys, field.name)
        options = [hint, *typing.get_args(hint)]
        inner = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if inner is not None and typing.get_origin(hint) is not tuple:
            yield from leaves(inner, here)
        else:
            yield here, hint


def set_key(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def recipes(world: World) -> Iterator[Case]:
    def given(name: str, change: Callable[[dict[str, Any]], None]) -> Case:
        path = world.recipe(hashlib.md5(name.encode()).hexdigest(), change)
        return Case("recipe", name, ["run", str(path)])

    def keyed(keys: tuple[str, ...], problem: str, value: Any) -> Case:
        return given(f"{'.'.join(keys)}: {problem}", lambda tree: set_key(tree, keys, value))

    for keys, hint in leaves(Recipe):
        options = set(typing.get_args(hint)) or {hint}
        if typing.get_origin(hint) is typing.Literal:
            yield keyed(keys, "no such choice", "unheard of")
            yield keyed(keys, "a list", ["a"])
        elif typing.get_origin(hint) in (tuple, dict):
            yield keyed(keys, "a word", "words")
            yield keyed(keys, "a number", 3)
        else:
            kinds = options - {type(None)}
            problems = set.intersection(*(set(WRONG[kind]) for kind in kinds if kind in WRONG))
            for problem in sorted(problems):
                values = [WRONG[kind][problem] for kind in kinds]
                yield keyed(keys, problem, values[0])
    levels = {keys[:-1] for keys, _ in leaves(Recipe)}
    for level in sorted(levels):
        yield keyed((*level, "unheard_of"), "an unknown key", 1)
        if level:
            yield keyed(level, "a word instead of keys", "words")

    def arm(**entries: Any) -> Callable[[dict[str, Any]], None]:
        return lambda tree: tree["pretrain"]["arms"].append({"name": "bad", **entries})

    def kd(**entries: Any) -> Callable[[dict[str, Any]], None]:
        return arm(kd=entries)

    values: dict[str, dict[tuple[str, ...], Any]] = {
        "0": dict.fromkeys(
            [
                ("data", "block_length"),
                ("search", "tokens"),
                ("search", "calibration_tokens"),
                ("search", "evolution", "population"),
                ("search", "evolution", "generations"),
                ("search", "evolution", "elites"),
                ("search", "evolution", "screening"),
                ("search", "racing", "rungs"),
                ("search", "racing", "factor"),
                ("search", "finalists", "steps"),
                ("search", "finalists", "batch_size"),
                ("search", "finalists", "learning_rate"),
                ("pretrain", "tokens"),
                ("pretrain", "validation_tokens"),
                ("pretrain", "evaluations"),
                ("data", "validation_fraction"),
                ("data", "search_fraction"),
                ("train", "per_device_train_batch_size"),
                ("train", "gradient_accumulation_steps"),
                ("train", "save_minutes"),
            ],
            0,
        ),
        "-1": dict.fromkeys(
            [
                ("data", "max_tokens"),
                ("search", "batch_size"),
                ("search", "unit_noise"),
                ("search", "racing", "keep"),
                ("search", "finalists", "count"),
                ("search", "evolution", "mutation"),
                ("search", "evolution", "crossover"),
                ("pretrain", "peak_tflops"),
                ("train", "save_minutes"),
                ("train", "per_device_eval_batch_size"),
            ],
            -1,
        ),
        "too large": {
            ("data", "block_length"): 513,
            ("data", "validation_fraction"): 1.5,
            ("data", "search_fraction"): 0.95,
            ("search", "unit_noise"): 2,
            ("search", "evolution", "elites"): 5,
            ("search", "evolution", "mutation"): 0.9,
            ("search", "grid", "layers_min"): 99,
            ("search", "grid", "embed_min"): 999,
            ("train", "per_device_train_batch_size"): 10**6,
        },
        "empty": {
            ("teacher",): "",
            ("output",): "",
            ("data", "source"): "",
            ("pretrain", "arms"): [],
        },
        "absent": {("teacher",): None, ("output",): None},
        "a bin": {("search", "bin"): {}},
        "a bin with a low end alone": {("search", "bin"): {"low": 30_000}},
        "a bin upside down": {("search", "bin"): {"low": 45_000, "high": 30_000}},
        "a bin that nothing meets": {("search", "bin"): {"low": 1, "high": 2}},
        "a bin beyond the teacher": {("search", "bin"): {"low": "1B", "high": "2B"}},
        "a bin in words": {("search", "bin"): {"low": "few", "high": "many"}},
        "a bin both ways": {("search", "bin"): {"low": 1, "high": 2, "around": "40K"}},
        "a bin around nothing": {("search", "bin"): {"around": "no/such-model-xyz"}},
        "a bin below 0": {("search", "bin"): {"low": -2, "high": -1}},
        "a bin and bins": {("search", "bins"): [{"around": "40K"}]},
        "several gradients": {("train", "label_smoothing_factor"): 0.1},
        "found batch sizes": {("train", "auto_find_batch_size"): True},
        "the best at the end": {("train", "load_best_model_at_end"): True},
        "another place": {("train", "output_dir"): "elsewhere"},
        "two learning rates": {("train", "learning_rate"): 0.1},
        "an unknown argument": {("train", "unheard_of"): 1},
        "an optimizer of no name": {("train", "optim"): "unheard_of"},
        "a schedule of no name": {("train", "lr_scheduler_type"): "unheard_of"},
        "no number in a dictionary": {("train", "lr_scheduler_kwargs"): {"a": [float("nan")]}},
        "no decay": {("train", "weight_decay"): float("nan")},
        "a rate in words": {("train", "weight_decay"): "little"},
    }
    for problem, entries in values.items():
        for keys, value in entries.items():
            yield keyed(keys, problem, value)
    lists: dict[str, Callable[[dict[str, Any]], None]] = {
        "an arm without a name": lambda tree: tree["pretrain"]["arms"].append({"init": "subnet"}),
        "an arm that is a word": lambda tree: tree["pretrain"]["arms"].append("subnet"),
        "an arm twice": arm(name="scratch"),
        "an arm that leaves its folder": arm(name="../out"),
        "an arm with a slash": arm(name="a/b"),
        "an arm without letters": arm(name=""),
        "an arm of no such start": arm(init="unheard of"),
        "an arm at rate 0": arm(learning_rate=0),
        "an arm at an infinite rate": arm(learning_rate=float("inf")),
        "an arm at a rate below 0": arm(learning_rates=[1e-3, -1e-3]),
        "an arm at one rate twice": arm(learning_rates=[1e-3, 1e-3]),
        "an arm of no such optimizer": arm(optimizer="unheard of"),
        "an arm with an unknown key": arm(unheard_of=1),
        "an arm with a batch of 0": arm(train={"per_device_train_batch_size": 0}),
        "alpha that is no number": kd(alpha=float("nan")),
        "alpha below 0": kd(alpha=-0.5),
        "alpha and beta 0": kd(alpha=0, beta=0),
        "a temperature of 0": kd(temperature=0),
        "a temperature without end": kd(temperature=float("inf")),
        "no such divergence": kd(divergence="unheard of"),
        "a mixture of 1": kd(mixture=1.0),
        "a top k below 0": kd(top_k=-1),
        "a top k and samples": kd(top_k=3, samples=3),
        "a divergence of a top k": kd(top_k=3, divergence="reverse_kl"),
        "a cache of everything": kd(cache="somewhere"),
        "a cache that is not there": kd(cache=str(world.folder / "no-cache"), top_k=3),
        "a schedule without tokens": kd(schedule="linear"),
        "an unknown key of kd": kd(unheard_of=1),
        "seeds twice": lambda tree: tree["pretrain"].update(seeds=[1, 1]),
        "seeds in words": lambda tree: tree["pretrain"].update(seeds=["one"]),
        "a baseline that is not there": lambda tree: tree["pretrain"].update(
            baselines=[str(world.folder / "nowhere")]
        ),
        "a mixture and a source": lambda tree: tree["data"].update(
            mixture=[{"source": str(world.text), "weight": 1}]
        ),
        "a mixture of weight 0": lambda tree: tree["data"].update(
            source="", mixture=[{"source": str(world.text), "weight": 0}]
        ),
        "a mixture of weight -1": lambda tree: tree["data"].update(
            source="", mixture=[{"source": str(world.text), "weight": -1}]
        ),
        "a mixture without a weight": lambda tree: tree["data"].update(
            source="", mixture=[{"source": str(world.text)}]
        ),
        "bins of one name": lambda tree: tree["search"].update(
            bin={}, bins=[{"around": "40K"}, {"around": "40K"}]
        ),
        "a tradeoff with races": lambda tree: tree["search"]["evolution"].update(
            tradeoff="parameters"
        ),
        "a student that is none": lambda tree: tree.update(student=str(world.teacher)),
    }
    for problem, change in lists.items():
        yield given(problem, change)
    for problem, content in {
        "not YAML": "teacher: [t\n",
        "tabs": "teacher:\n\tname: t\n",
        "a list": "- teacher\n",
        "a word": "teacher\n",
        "nothing": "",
        "binary": b"\xff\xfe\x00\x01",
    }.items():
        yield Case("recipe", problem, ["run", str(world.file(f"recipes/{problem}.yaml", content))])
    yield Case("recipe", "a folder", ["run", str(world.folder)])
    yield Case("recipe", "not there", ["run", str(world.folder / "nowhere.yaml")])


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


def folders(world: World) -> Iterator[Case]:
    taken = world.file("taken/notes.txt", "mine").parent
    a_file = world.file("a-file", "mine")
    other = world.folder / "other-run"
    recipe = world.recipe(
        "other-run", lambda tree: tree.update(output=str(other), teacher="another")
    )
    world.file("other-run/recipe.yaml", recipe.read_text())
    teacher, student = str(world.teacher), str(world.student)
    spec = str(world.student / "subnet.json")
    extract = ["extract", "--teacher", teacher, "--spec", spec, "--init", "slice", "--out"]
    new = str(world.folder / "x")
    commands = {
        "an output that is a file": world.run(output=a_file),
        "an output that holds something else": world.run(output=taken),
        "an output of another run": world.run(output=other),
        "a student's folder that is there": [*extract, str(taken)],
        "a student's folder that is a file": [*extract, str(a_file)],
        "a report of no run": ["report", str(taken)],
        "a report of nothing": ["report", str(world.folder / "nowhere")],
        "a search to go on with that is none": ["search", "--resume", str(taken)],
        "no student to pretrain": ["pretrain", str(world.folder / "good.yaml")],
        "an export over a folder": ["export", student, "--to", "hf", "--out", str(taken)],
        "an export of nothing": ["export", str(taken), "--to", "hf", "--out", new],
        "no cache in the recipe": ["cache-teacher", str(world.folder / "good.yaml")],
        "results that are garbage": [
            "report", str(world.file("garbage/result.json", "{").parent)
        ],
        "results of another format": [
            "report", str(world.file("format/result.json", '{"format": "x/9"}').parent)
        ],
    }  # fmt: skip
    for problem, command in commands.items():
        yield Case("folder", problem, command)


def arguments(world: World) -> Iterator[Case]:
    good, teacher, text = str(world.folder / "good.yaml"), str(world.teacher), str(world.text)
    evaluate = ["evaluate", teacher]
    extract = ["extract", "--teacher", teacher, "--spec", str(world.student / "subnet.json")]
    extract += ["--out", str(world.folder / "cut")]
    commands = [
        [], ["unheard-of"], ["run", "--unheard-of", "1"], ["run", good, "--pretrain.tokens"],
        ["run", good, "stray"], ["run", good, "--search.bin", "{low: 1M"],
        ["run", good, "--data.source.deep", "1"], ["run", good, "--teacher", ""],
        ["search", "--resume"], ["search", good, "--dry-run", "--search.bin", "{low: 1, high: 2}"],
        ["extract"], ["extract", "--teacher", teacher], [*extract, "--init", "unheard_of"],
        [*extract, "--init", "slice", "--data", text], [*extract, "--init", "least_squares"],
        [*extract, "--data", text, "--calibration-tokens", "0"],
        [*extract, "--data", text, "--block-length", "4"],
        [*extract, "--data", text, "--block-length", "9999"],
        ["evaluate"], evaluate, [*evaluate, "--data", text, "--tokens", "0"],
        [*evaluate, "--data", text, "--tokens", "many"], [*evaluate, "--limit", "3"],
        [*evaluate, "--data", text, "--limit", "3"], [*evaluate, "--whole-text"],
        [*evaluate, "--tasks", "unheard_of", "--task-data", text], [*evaluate, "--task-data", text],
        [*evaluate, "--tasks", "piqa,piqa", "--task-data", text],
        ["evaluate", "nowhere/at-all-xyz", "--data", text],
        ["plan", good, "--gpus", "0"], ["plan", good, "--gpus", "-8"], ["plan", good, "--mfu", "2"],
        ["plan", good, "--mfu", "0"], ["plan", good, "--peak-tflops", "0"],
        ["plan", good, "--peak-tflops", "nan"], ["plan", good, "--mfu", "nan"],
        ["export", teacher, "--to", "unheard-of", "--out", "x"], ["export", teacher, "--to", "hf"],
        ["export", teacher, "--to", "hf", "--out", str(world.folder / "x"), "--precision", "int3"],
        ["export", teacher, "--to", "hf", "--out", str(world.folder / "x"), "--converter", good],
        ["export", teacher, "--to", "gguf", "--out", str(world.folder / "x.gguf"), "--converter",
         str(world.folder / "nowhere.py")],
        ["report"],
    ]  # fmt: skip
    for command in commands:
        name = " ".join(Path(part).name if "/" in part else part for part in command)
        yield Case("argument", name or "nothing", command)


KINDS = (teachers, texts, recipes, specs, folders, arguments)
