"""Imports point down only, through the rooms and inside each of them."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "headstart"

FLOORS = [
    {"cli", "api"},
    {"runs"},
    {"recipe"},
    {"evaluation", "reports", "searching", "training"},
    {"calibration"},
    {"losses"},
    {"model"},
    {"text"},
    {"demo"},
    {"system"},
]
"""From the top down. A room may import from the floors below it; rooms of one floor know nothing of
each other."""


def room_of(module: str) -> str:
    """The package or top-level module that a dotted name below headstart belongs to."""
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """Modules of headstart that a file imports, anywhere in it, by their names below headstart."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "headstart":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headstart."):
            base = (node.module or "").removeprefix("headstart.")
            inner = {f"{base}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if path_of(name).is_file()}
            found |= modules or {base}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            found |= {n.removeprefix("headstart.") for n in names if n.startswith("headstart.")}
    return {name for name in found if path_of(name).is_file()}


def path_of(module: str) -> Path:
    return SOURCE / f"{module.replace('.', '/')}.py"


def test_imports_point_down() -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    modules = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__init__.py"
    }
    assert {room_of(module) for module in modules} == set(floor_of)
    inside: dict[str, set[str]] = {}
    for module, path in modules.items():
        room = room_of(module)
        for imported in imports_of(path):
            other = room_of(imported)
            if other == room:
                inside.setdefault(module, set()).add(imported)
            else:
                assert floor_of[other] > floor_of[room], f"{module} imports {imported}"
    assert_no_circle(inside)


def assert_no_circle(imports: dict[str, set[str]]) -> None:
    """Within a room, too, no file imports one that imports it in turn."""
    remaining = {module: set(imported) for module, imported in imports.items()}
    while remaining:
        free = {m for m, imported in remaining.items() if not imported & remaining.keys()}
        assert free, f"these import each other in a circle: {sorted(remaining)}"
        remaining = {m: imported for m, imported in remaining.items() if m not in free}


def test_the_package_and_the_command_import_little_at_their_top() -> None:
    """So that `import headstart` and `headstart --help` are instant."""
    allowed = {"cli": {"system.errors"}, "__init__": {"model.layerwise"}}
    for name, light in allowed.items():
        tree = ast.parse((SOURCE / f"{name}.py").read_text())
        top = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        ours = {module.removeprefix("headstart.") for module in top if "headstart." in module}
        assert ours <= light, name


def test_packages_share_no_name_with_a_function() -> None:
    import headstart
    import headstart.searching.run as run  # which a function of that name would stand in the way of
    from headstart import api

    packages = {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not packages & set(api.__all__)
    assert run.search is headstart.searching.run.search
