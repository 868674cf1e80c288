"""Frozen dataclasses of settings, from plain trees of dictionaries and lists, and back.

Unknown keys fail and name the nearest one. A tree that an earlier version wrote lacks the keys that
came later; these stand at their defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from headstart.system.errors import UserError

FREE_KEYS = ("output", "report")
"""Of a recipe: they say nothing of what a run finds. A folder may be moved, and a report made
anew."""


def settings_from_tree(tree: Any, kind: Any, key: str = "") -> Any:
    """Turn a plain value into a settings class, or any annotated type.

    Args:
        tree: dictionaries, lists, numbers, text.
        kind: the type to build.
        key: where the tree stands in a larger one, for messages.

    Raises:
        UserError: a key is unknown or missing, or a value does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(tree, float):
        _refuse_endless(tree, key)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(tree, kind, key)
    if origin is typing.Literal:
        if tree in arguments:
            return tree
        raise UserError(f"{key} is {tree!r}; choose one of {', '.join(arguments)}")
    if origin is tuple:
        if not isinstance(tree, list | tuple):
            raise UserError(f"{key} is {tree!r}; write a list")
        return tuple(
            settings_from_tree(item, arguments[0], f"{key}[{position}]")
            for position, item in enumerate(tree)
        )
    if origin is dict:
        if not isinstance(tree, dict):
            raise UserError(f"{key} is {tree!r}; write keys and values below it")
        _refuse_endless(tree, key)
        return tree
    if kind is bool:
        if isinstance(tree, bool):
            return tree
        raise UserError(f"{key} is {tree!r}; write true or false")
    options = arguments or (kind,)
    if tree is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return _build_dataclass(tree, option, key)
        if option is float and isinstance(tree, int | float) and not isinstance(tree, bool):
            return float(tree)
        if option is not float and isinstance(tree, option) and not isinstance(tree, bool):
            if isinstance(tree, str) and "\0" in tree:
                raise UserError(f"{key} is {tree!r}; remove the zero byte")
            return tree
    names = {int: "a whole number", float: "a number", str: "text"}
    wanted = " or ".join(names[option] for option in options if option in names)
    raise UserError(f"{key} is {tree!r}; write {wanted}")


def _refuse_endless(tree: Any, key: str) -> None:
    """Raise a UserError if there is NaN or infinity anywhere in a tree."""
    if isinstance(tree, float) and not math.isfinite(tree):
        raise UserError(f"{key} is {tree}; write a finite number")
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            _refuse_endless(value, f"{key}.{name}")
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            _refuse_endless(value, f"{key}[{place}]")


def _build_dataclass(tree: Any, kind: Any, key: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{key} is {tree!r}; write keys and values below it")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in tree:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise UserError(f"unknown key {prefix}{name}; {advice}")
    for required in dataclasses.fields(kind):
        if (
            required.name not in tree
            and required.default is dataclasses.MISSING
            and required.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"{prefix}{required.name} is missing; set it")
    return kind(
        **{name: settings_from_tree(v, hints[name], f"{prefix}{name}") for name, v in tree.items()}
    )


def check_least(settings: Any, prefix: str, **least: int) -> None:
    """Raise a UserError if a field is below its least value; the prefix leads to it in messages."""
    for name, bound in least.items():
        if (value := getattr(settings, name)) is not None and value < bound:
            raise UserError(f"{prefix}{name} is {value}; use at least {bound}")


def tree_of(settings: Any) -> Any:
    """Nested dictionaries and lists of plain values, every default written out."""
    if dataclasses.is_dataclass(settings):
        fields = dataclasses.fields(settings)
        return {field.name: tree_of(getattr(settings, field.name)) for field in fields}
    if isinstance(settings, dict):
        return {key: tree_of(inner) for key, inner in settings.items()}
    return (
        [tree_of(inner) for inner in settings] if isinstance(settings, list | tuple) else settings
    )


def with_defaults(tree: Any, kind: Any) -> Any:
    """A tree of settings with the keys that were added since it was written, at their defaults.

    One that this version does not understand comes back as it is.
    """
    try:
        return tree_of(settings_from_tree(tree, kind))
    except UserError:
        return tree


def differences(ours: Any, theirs: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two trees differ: dotted key -> (our value, their value).

    >>> differences({"bin": {"low": 1}, "seed": 0}, {"bin": {"low": 2}, "seed": 0})
    {'bin.low': (1, 2)}
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**ours, **theirs}:
            inner = f"{key}.{name}" if key else name
            found |= differences(ours.get(name), theirs.get(name), inner)
        return found
    return {} if ours == theirs else {key: (ours, theirs)}
