"""Recipes: YAML to frozen dataclasses, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headstart.evaluation.settings import ReportSettings
from headstart.searching.settings import SearchSettings
from headstart.system.errors import UserError
from headstart.system.settings import settings_from_tree, tree_of
from headstart.text.settings import DataSettings, VocabularySettings
from headstart.training.settings import CorrectionSettings, PretrainSettings


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of.

    Attributes:
        teacher: a folder with safetensors, or a hub id.
        output: the run folder.
        student: a folder that was extracted before; empty searches for one and extracts it.
        data: the text.
        vocabulary: what is left of the teacher's, before all else.
        teacher_correction: how the teacher is tuned on the text, before it is searched.
        search: space, bin and evolution.
        pretrain: token budget and arms.
        train: passed verbatim to transformers.TrainingArguments.
        report: what is shown of the models once they are trained.
    """

    teacher: str = ""
    output: str = ""
    student: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    vocabulary: VocabularySettings = field(default_factory=VocabularySettings)
    teacher_correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    train: dict[str, Any] = field(default_factory=dict)
    report: ReportSettings = field(default_factory=ReportSettings)

    def __post_init__(self) -> None:
        for key, example in (
            ("teacher", "HuggingFaceTB/SmolLM2-135M"),
            ("output", "runs/first"),
        ):
            if not getattr(self, key):
                raise UserError(f"the recipe has no {key}; set one, for example --{key} {example}")


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, while PyYAML reads it as text; and in which a
    key stands once, while PyYAML keeps the last of several."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of a day that no calendar has, or of thousands of digits
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and set single keys of it.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: pairs of "--dotted.key" and "value", or single "--dotted.key=value".

    Raises:
        UserError: the file is missing or malformed, a key is unknown, or a value does not fit.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.load(path.read_text(), RecipeLoader) or {}
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"recipe {path} does not exist or is not a file") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            place += f" ({problem})" if problem else ""
            raise UserError(f"recipe {path} is not valid YAML{place}; mend it there") from error
        if not isinstance(tree, dict):
            raise UserError(f"recipe {path} holds no keys; write `key: value` lines")
    for key, value in _pairs(overrides):
        _set(tree, key, value)
    try:
        return recipe_from_dict(tree)
    except RecursionError as error:
        raise UserError(f"recipe {path} holds an alias of itself; write it out") from error


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested dictionaries, checking names and types.

    Raises:
        UserError: a key is unknown, or a value does not fit.
    """
    recipe: Recipe = settings_from_tree(tree, Recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries of plain values, every default written out."""
    tree: dict[str, Any] = tree_of(recipe)
    return tree


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    remaining = list(overrides)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag!r} is not an option; write the recipe first, then --key VALUE")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{key} has no value; write --{key} VALUE")
            value = remaining.pop(0)
        try:
            parsed = yaml.load(value, RecipeLoader) if value else ""
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"--{key} {value!r} is not valid YAML; quote or mend it") from error
        pairs.append(("data.source" if key == "data" else key, parsed))
    return pairs


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{key} cannot be set: {parent} holds no keys in the recipe")
    tree[last] = value
