"""Files that appear whole or not at all, so that a kill leaves nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
