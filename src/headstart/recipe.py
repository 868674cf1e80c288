"""Recipes: YAML to frozen dataclasses, and back. Unknown keys fail and name the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headstart.data import DataSettings
from headstart.pretrain.arms import PretrainSettings
from headstart.search.run import SearchSettings


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of.

    Attributes:
        teacher: a folder with safetensors, or a hub id.
        output: the run folder.
        student: a folder that was extracted before; empty searches for one and extracts it.
        data: the text.
        search: space, bin and evolution.
        pretrain: token budget and arms.
        train: passed verbatim to transformers.TrainingArguments.
    """

    teacher: str = ""
    output: str = ""
    student: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, example in (
            ("teacher", "HuggingFaceTB/SmolLM2-135M"),
            ("output", "runs/first"),
        ):
            if not getattr(self, key):
                raise ValueError(f"the recipe has no {key}; set one, for example --{key} {example}")


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2; PyYAML reads it as text."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and set single keys of it.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: pairs of "--dotted.key" and "value", or single "--dotted.key=value".

    Raises:
        ValueError: the file is missing or malformed, a key is unknown, or a value does not fit.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.load(path.read_text(), RecipeLoader) or {}
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"recipe {path} does not exist or is not a file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise ValueError(f"recipe {path} is not valid YAML{place}; mend it there") from error
        if not isinstance(tree, dict):
            raise ValueError(f"recipe {path} holds no keys; write `key: value` lines")
    for key, value in _pairs(overrides):
        _set(tree, key, value)
    return recipe_from_dict(tree)


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested dictionaries, checking names and types.

    Raises:
        ValueError: a key is unknown, or a value does not fit.
    """
    recipe: Recipe = _build(tree, Recipe, "")
    return recipe


def _build(value: Any, kind: Any, key: str) -> Any:
    """Turn a plain value into the annotated type, or say which key does not fit and why."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(value, kind, key)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"{key} is {value!r}; choose one of {', '.join(arguments)}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key} is {value!r}; write a list")
        return tuple(
            _build(item, arguments[0], f"{key}[{position}]") for position, item in enumerate(value)
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key} is {value!r}; write keys and values below it")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{key} is {value!r}; write true or false")
    options = arguments or (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return _build_dataclass(value, option, key)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is not float and isinstance(value, option) and not isinstance(value, bool):
            return value
    names = {int: "a whole number", float: "a number", str: "text"}
    wanted = " or ".join(names[option] for option in options if option in names)
    raise ValueError(f"{key} is {value!r}; write {wanted}")


def _build_dataclass(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r}; write keys and values below it")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ValueError(f"unknown key {prefix}{name}; {advice}")
    for required in dataclasses.fields(kind):
        if (
            required.name not in value
            and required.default is dataclasses.MISSING
            and required.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{prefix}{required.name} is missing; set it")
    return kind(**{name: _build(v, hints[name], f"{prefix}{name}") for name, v in value.items()})


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries of plain values, every default written out."""
    return {key: _listed(value) for key, value in dataclasses.asdict(recipe).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    remaining = list(overrides)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is not an option; write the recipe first, then --key VALUE")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise ValueError(f"--{key} has no value; write --{key} VALUE")
            value = remaining.pop(0)
        try:
            parsed = yaml.load(value, RecipeLoader) if value else ""
        except yaml.YAMLError as error:
            raise ValueError(f"--{key} {value!r} is not valid YAML; quote or mend it") from error
        pairs.append(("data.source" if key == "data" else key, parsed))
    return pairs


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--{key} cannot be set: {parent} holds no keys in the recipe")
    tree[last] = value
