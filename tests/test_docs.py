"""The pages say what the code does."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import yaml

from headstart.cli import _parser
from headstart.recipe import Recipe, load_recipe
from headstart.training.arguments import RESERVED_ARGUMENTS
from headstart.training.settings import Arm

ROOT = Path(__file__).parents[1]


def test_recipe_page_lists_every_key() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()
    hints = get_type_hints(Recipe)
    for section in ("data", "teacher_correction", "search", "pretrain"):
        text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
        for field in dataclasses.fields(hints[section]):
            assert re.search(rf"`{field.name}[.`]", text), f"{section}.{field.name}"
    for name in [*hints, *(f"arms[].{field.name}" for field in dataclasses.fields(Arm))]:
        assert f"`{name}`" in page, name
    for key in RESERVED_ARGUMENTS:
        assert f"`{key}`" in page.split("\n## train\n")[1], key


def test_recipe_page_has_the_defaults() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()
    recipe = Recipe(teacher="t", output="o")
    for section, prefix, settings in (
        ("data", "", recipe.data),
        ("teacher_correction", "", recipe.teacher_correction),
        ("search", "", recipe.search),
        ("search", "evolution.", recipe.search.evolution),
        ("search", "racing.", recipe.search.racing),
        ("search", "finalists.", recipe.search.finalists),
        ("pretrain", "", recipe.pretrain),
    ):
        text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if isinstance(value, int | float | str) and value:
                row = re.search(rf"\| `{prefix}{field.name}` \| `?([^|`]*)`? \|", text)
                assert row and row[1].strip() in (str(value), json.dumps(value)), (
                    f"{section}.{prefix}{field.name}"
                )


def test_shipped_recipes_load() -> None:
    others = {"tasks", "cluster"}
    paths = (ROOT / "recipes").rglob("*.yaml")
    recipes = [path for path in paths if path.parent.name not in others]
    assert len(recipes) >= 2
    for path in recipes:
        recipe = load_recipe(path)
        assert recipe.pretrain.arms, path
        assert yaml.safe_load(path.read_text())


def test_the_design_names_every_module_in_its_room() -> None:
    page = (ROOT / "docs" / "design.md").read_text().split("\n## The rooms\n")[1].split("\n### ")[0]
    source = ROOT / "src" / "headstart"
    for room in (path for path in source.iterdir() if (path / "__init__.py").is_file()):
        section = page.split(f"**`{room.name}/`**")[1].split("\n**")[0]
        modules = {path.stem for path in room.glob("*.py")} - {"__init__"}
        assert set(re.findall(r"^- `(\w+)`:", section, re.MULTILINE)) == modules, room.name
    for module in {path.stem for path in source.glob("*.py")} - {"__init__"}:
        assert f"`{module}`" in page, module


def test_pages_link_to_files_that_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_readme_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    commands = set(re.findall(r"(?:^|`)headstart ([\w-]+)", readme, re.MULTILINE))
    assert commands >= {"run", "demo", "search", "extract", "pretrain", "evaluate", "report"}
    parser = _parser()
    known = next(a.choices for a in parser._actions if a.dest == "command")
    assert known and commands <= set(known), commands - set(known or ())


def test_readme_example_of_a_run_is_a_valid_recipe() -> None:
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^headstart run .*", readme, re.MULTILINE)
    _, _, recipe, *overrides = shlex.split(line)
    loaded = load_recipe(ROOT / recipe, overrides)
    bin = loaded.search.bin.resolve(loaded.data.block_length)
    assert (bin.low, bin.high) == (85_500_000, 94_500_000)
    assert loaded.pretrain.tokens == 50_000_000
