"""What whole searches start from: a small teacher, its text, and the shape of a larger one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from headstart.model.checkpoint import Checkpoint
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
)
"""Of a teacher that is only counted, or scored by a formula."""
BLOCK_LENGTH = 32
"""Of `blocks`."""


@pytest.fixture
def checkpoint(teacher_folder: Path) -> Checkpoint:
    """The teacher on disk."""
    return Checkpoint.open(teacher_folder)


@pytest.fixture(scope="module")
def blocks(
    corpus: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TokenBlocks:
    """The corpus, in the teacher's tokens."""
    settings = DataSettings(str(corpus), block_length=BLOCK_LENGTH, search_fraction=0.2)
    return prepare(settings, teacher_folder, tmp_path_factory.mktemp("data"))
