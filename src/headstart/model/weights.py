"""Which files of a folder are a model's weights, and what they hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.system.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_KINDS = ("F64", "F32", "F16", "BF16")
"""Of numbers, as safetensors names them, that are weights as they are, with no scales beside."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load, in order, and no others.

    Raises:
        UserError: there are none; there is a whole file beside a whole set of shards; or an index
            cannot be read or names a file that is missing.
    """
    whole, index = folder / WHOLE, folder / INDEX
    if not index.is_file():
        if whole.is_file():
            return [whole]
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        found = f"; {others} have names that transformers does not load" if others else ""
        raise UserError(
            f"{folder} has neither {WHOLE} nor {INDEX}{found}; headstart reads no pickles, so "
            "convert the teacher once with model.save_pretrained(folder)"
        )
    shards = [folder / name for name in shard_names(index)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if whole.is_file() and missing:
        return [whole]
    if whole.is_file() and whole not in shards:
        raise UserError(
            f"{folder} has {WHOLE} and all the shards of {INDEX}, which may be two models; remove "
            f"one of them (transformers loads {WHOLE})"
        )
    if missing:
        raise UserError(f"{index} names {missing[0]}, which is missing; fetch it again")
    return shards


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it.

    Raises:
        UserError: as `weight_files`; a file is cut short, or is not what the index says; or two
            hold a tensor of one name.
    """
    names_in: dict[Path, list[str]] = {}
    for file in weight_files(folder):
        with open_shard(file) as shard:
            names_in[file] = list(shard.keys())
    if folder / WHOLE not in names_in:
        for name, shard_name in _weight_map(folder / INDEX).items():
            if name not in names_in[folder / shard_name]:
                raise UserError(
                    f"{folder / shard_name} lacks {name!r}, which {folder / INDEX} says it has; "
                    "fetch both again"
                )
    files: dict[str, Path] = {}
    for file, names in names_in.items():
        for name in names:
            if name in files:
                raise UserError(
                    f"{files[name]} and {file.name} both hold {name!r}; fetch both again"
                )
            files[name] = file
    return files


def open_shard(file: Path) -> Any:
    """A safetensors file, opened by its header.

    Raises:
        UserError: it is cut short, or no such file.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def refuse_other_kinds(file: Path, name: str, kind: str) -> None:
    """Raise a UserError if a tensor's numbers are not plain ones, such as those of fp8 weights."""
    if kind not in PLAIN_KINDS:
        raise UserError(
            f"{file} holds {name!r} as {kind}, and headstart cuts weights of "
            f"{', '.join(PLAIN_KINDS)}; give the original checkpoint, or dequantize() and save it"
        )


def refuse_not_finite(file: Path, name: str, tensor: Tensor) -> None:
    """Raise a UserError if a tensor holds NaN or infinity."""
    # Ten times as fast as torch.isfinite for bfloat16, and NaN comes out of it.
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"{file} holds {name!r} with {count:,} of {tensor.numel():,} numbers that are NaN or "
            "infinite; fetch the teacher again, or choose another"
        )


def shard_names(index: Path) -> list[str]:
    """The files that an index names, in order; errors as in `weight_files`."""
    return sorted(set(_weight_map(index).values()))


def precisions(tensors: Iterable[Tensor]) -> dict[torch.dtype, int]:
    """How many numbers there are of each precision, the most frequent first."""
    counts = Counter[torch.dtype]()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.numel()
    return dict(counts.most_common())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        entries: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) for file in entries.values()) and entries:
            return entries
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} is no index of shards; fetch the model again")
