"""Malformed recipes: every key of every level is given what it cannot mean."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Iterator
from typing import Any

from headstart.recipe import Recipe
from malformed.world import Case, World

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
                ("search", "refit_tokens"),
                ("search", "evolution", "population"),
                ("search", "evolution", "generations"),
                ("search", "evolution", "elites"),
                ("search", "evolution", "screening"),
                ("search", "racing", "rungs"),
                ("search", "racing", "factor"),
                ("search", "finalists", "batch_size"),
                ("search", "finalists", "learning_rate"),
                ("pretrain", "tokens"),
                ("pretrain", "validation_tokens"),
                ("pretrain", "test_tokens"),
                ("pretrain", "decay"),
                ("pretrain", "evaluations"),
                ("data", "test_fraction"),
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
                ("search", "finalists", "steps"),
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
        "an arm of blanks": arm(name=" "),
        "an arm of two lines": arm(name="a\nb"),
        "an arm with a zero byte": arm(name="a\0b"),
        "an arm of 300 letters": arm(name="a" * 300),
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
        "a top k of more than all tokens": kd(top_k=10**6),
        "a sampling temperature of 0": kd(samples=3, sampling_temperature=0),
        "a cache of no known place": kd(cache="unheard-of://place", top_k=3),
        "a top k and samples": kd(top_k=3, samples=3),
        "a divergence of a top k": kd(top_k=3, divergence="reverse_kl"),
        "a cache of everything": kd(cache="somewhere"),
        "a cache that is not there": kd(cache=str(world.folder / "no-cache"), top_k=3),
        "a schedule without tokens": kd(schedule="linear"),
        "an unknown key of kd": kd(unheard_of=1),
        "seeds twice": lambda tree: tree["pretrain"].update(seeds=[1, 1]),
        "a seed below 0": lambda tree: tree["pretrain"].update(seeds=[-1]),
        "a seed beyond 32 bits": lambda tree: tree["pretrain"].update(seeds=[2**32]),
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
        "a mixture of weights without end": lambda tree: tree["data"].update(
            source="", mixture=[{"source": str(world.text), "weight": 1e308}] * 2
        ),
        "a mixture of nothing": lambda tree: tree["data"].update(source="", mixture=[]),
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
        "a key twice": "teacher: t\nteacher: u\n",
        "a key twice, deep": "data:\n  seed: 1\n  seed: 2\n",
        "a day that no calendar has": "teacher: 2024-13-45\n",
        "a number of 5000 digits": f"teacher: {'9' * 5000}\n",
        "brackets without end": "teacher: " + "[" * 3000,
        "an alias of itself": "train: &t\n  lr_scheduler_kwargs: *t\n",
        "a tag of Python's": "teacher: !!python/object:os.system x\n",
        "two documents": "teacher: t\n---\nteacher: t\n",
        "tabs": "teacher:\n\tname: t\n",
        "a list": "- teacher\n",
        "a word": "teacher\n",
        "nothing": "",
        "binary": b"\xff\xfe\x00\x01",
    }.items():
        yield Case("recipe", problem, ["run", str(world.file(f"recipes/{problem}.yaml", content))])
    yield Case("recipe", "a folder", ["run", str(world.folder)])
    yield Case("recipe", "not there", ["run", str(world.folder / "nowhere.yaml")])
