"""The one hash of all that is found again by its content: 128 bits of xxh3, in hex digits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

PIECE_BYTES = 1 << 20


def hash_bytes(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def hash_json(value: Any) -> str:
    """The hash of a value that JSON can write, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hash_bytes(text.encode())


def hash_files(files: Iterable[Path]) -> str:
    """The hash of the names and contents of files, read once, in constant memory."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The hash of the names, types, shapes and bytes of tensors, in the order given."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
