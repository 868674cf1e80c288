"""A small student and blocks of counting tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headstart.model.checkpoint import Checkpoint
from headstart.text.blocks import TokenBlocks


@pytest.fixture(scope="session")
def student_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the teacher's vocabulary and half its depth; its weights are its own."""
    folder = tmp_path_factory.mktemp("student")
    config = AutoConfig.from_pretrained(teacher_folder, num_hidden_layers=2)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_checkpoint(student_folder: Path) -> Checkpoint:
    """The student on disk."""
    return Checkpoint.open(student_folder)


@pytest.fixture(scope="session")
def teacher_checkpoint(teacher_folder: Path) -> Checkpoint:
    """The teacher on disk."""
    return Checkpoint.open(teacher_folder)


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> TokenBlocks:
    """48 training, 7 validation and 5 test blocks of 16 tokens, counting in steps of 1 to 5."""
    folder = tmp_path_factory.mktemp("blocks")
    generator = np.random.default_rng(0)
    splits = {"train": 48, "search": 4, "validation": 7, "test": 5}
    for name, num_blocks in splits.items():
        start, stride = generator.integers(0, 128, num_blocks), generator.integers(1, 6, num_blocks)
        tokens = (start[:, None] + stride[:, None] * np.arange(16)) % 128
        (folder / f"{name}.bin").write_bytes(tokens.astype(np.uint16).tobytes())
    manifest = {
        "dtype": "uint16",
        "settings": {"block_length": 16},
        "splits": {name: {"blocks": num_blocks} for name, num_blocks in splits.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenBlocks(folder, manifest)
