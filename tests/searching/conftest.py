"""The small teacher that whole searches start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from headstart.model.checkpoint import Checkpoint


@pytest.fixture
def checkpoint(teacher_folder: Path) -> Checkpoint:
    """The teacher on disk."""
    return Checkpoint.open(teacher_folder)
