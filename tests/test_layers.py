"""Imports point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "headstart"

LAYERS = [
    {"cli", "api"},
    {"scoreboard", "plans", "export"},
    {"pipeline"},
    {"extraction"},
    {"result", "run_folder"},
    {"recipe"},
    {"search", "pretrain", "report", "report_page", "report_search"},
    {"zero_shot"},
    {"evaluation"},
    {"held_out"},
    {"pretrain.chunked"},
    {"pretrain.losses"},
    {"subnet", "prepare"},
    {"data"},
    {"tokenise"},
    {"corpus"},
    {"assets", "files", "mixture", "progress"},
    {"distributed"},
    {"device"},
]
"""From the top down; a module may import from lower layers, and inside its own package."""
REPORT = {"report", "report_page", "report_search"}
"""Modules that may import each other as those of a package may."""


def layer_of(module: str) -> int:
    """The layer of the longest listed prefix of a module's name."""
    prefixes = [module.rsplit(".", dots)[0] for dots in range(module.count(".") + 1)]
    for prefix in prefixes:
        for layer, names in enumerate(LAYERS):
            if prefix in names:
                return layer
    raise AssertionError(f"{module} is in no layer: add it to LAYERS")


def imports_of(path: Path) -> set[str]:
    """Modules of headstart that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headstart."):
            found.add(node.module.removeprefix("headstart."))
        if isinstance(node, ast.ImportFrom) and node.module == "headstart":
            names = [alias.name for alias in node.names]
            found |= {n for n in names if (SOURCE / f"{n}.py").exists() or (SOURCE / n).is_dir()}
    return found


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for imported in imports_of(path):
        same_package = imported.split(".")[0] == module.split(".")[0]
        if not same_package and layer_of(imported) == layer_of(module):
            assert {module, imported} <= REPORT, (module, imported)
        assert layer_of(imported) >= layer_of(module) or same_package, (module, imported)


def test_modeling_free_modules_stay_light() -> None:
    """`cli` imports nothing of headstart at its top, so that --help is instant."""
    tree = ast.parse((SOURCE / "cli.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in top if (node.module or "").startswith("headstart.")]
