"""What malformed inputs are made of: good ones, and where to put those that were changed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headstart.calibration.start import Calibration
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import SubnetSpec
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
