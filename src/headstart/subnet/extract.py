"""Cuts a sub-network out of its teacher, from memory or shard by shard from disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor

import headstart
from headstart.subnet.card import CARD, licence_of, write_card
from headstart.subnet.cut import slice_tensors
from headstart.subnet.propagate import refit_on_itself
from headstart.subnet.rules import family_of, is_layerwise, read_config
from headstart.subnet.spec import SubnetSpec, student_config
from headstart.subnet.statistics import Statistics

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip


def resolve_teacher(teacher: str | Path) -> Path:
    """The local folder of a teacher; a hub id is downloaded into the hub's cache first.

    Raises:
        ValueError: the folder or hub id does not exist, or holds no safetensors.
    """
    folder = Path(teacher)
    if not folder.is_dir():
        folder = _download(str(teacher))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a model folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has no .safetensors files; headstart reads no pickles, so convert the "
            "teacher once with model.save_pretrained(folder)"
        )
    return folder


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                repo_id, allow_patterns=["*.safetensors", "*.json", "*.txt", CARD, *TOKENIZER_FILES]
            )
        )
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"teacher {repo_id!r} is neither a folder nor a model that can be fetched from the hub "
            f"({str(error).splitlines()[0]})"
        ) from error


def open_shard(file: Path) -> Any:
    """Open one safetensors file.

    Raises:
        ValueError: it is cut short, or no safetensors file at all.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    Raises:
        ValueError: the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is no index of shards; fetch the model again") from error
        files = {name: folder / file for name, file in names.items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ValueError(f"{index} names {file.name}, which is missing; fetch it again")
            with open_shard(file) as shard:
                held = set(shard.keys())
            if lost := [
                name for name, place in files.items() if place == file and name not in held
            ]:
                raise ValueError(
                    f"{file} lacks {lost[0]!r}, which {index} says it has; fetch both again"
                )
        return files
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_shard(file) as shard:
            files.update(dict.fromkeys(shard.keys(), file))
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors one at a time, shard by shard, memory-mapped."""
    files = checkpoint_files(folder)
    for name, file in sorted(files.items(), key=lambda named: named[1]):
        # Opened for each, since what was read of an open shard stays mapped.
        with open_shard(file) as shard:
            tensor = shard.get_tensor(name)
        yield name, tensor
        del tensor


def extract(
    teacher: str | Path,
    spec: SubnetSpec,
    out_folder: str | Path,
    provenance: Mapping[str, Any] | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
    statistics: Statistics | None = None,
    blocks: Int[Tensor, "blocks tokens"] | None = None,
) -> Path:
    """Cut a sub-network out of a checkpoint and write it as an ordinary Hugging Face folder.

    Where the family's stock code cannot express the shape, the folder carries `modeling.py`. One
    teacher tensor is in memory at a time; the folder appears whole or not at all.

    Args:
        teacher: a folder with safetensors, or a hub id.
        spec: what to keep.
        out_folder: where the student goes; must not exist yet.
        provenance: more entries for `subnet.json`, such as the bin and the score.
        on_tensor: called with each teacher tensor's name, for progress.
        statistics: as for `slice_tensors`.
        blocks: token ids on which the student is refitted layer by layer; None leaves it.

    Raises:
        ValueError: the teacher cannot be read, the spec does not fit it, or the folder exists.
    """
    from huggingface_hub import save_torch_state_dict

    out_folder = Path(out_folder)
    if out_folder.exists():
        raise ValueError(f"{out_folder} exists already; choose another folder or remove it")
    folder = resolve_teacher(teacher)
    config = read_config(folder)
    output_config = student_config(config, spec)

    def reported(named_tensor: tuple[str, Tensor]) -> tuple[str, Tensor]:
        on_tensor(named_tensor[0])
        return named_tensor

    tensors = map(reported, read_tensors(folder))  # a loop would hold on to its last tensor
    parts = slice_tensors(tensors, config, spec, statistics)
    if blocks is None:
        sliced = dict(map(_alone, parts))
    else:
        sliced = refit_on_itself(folder, parts, spec, blocks)
    if is_layerwise(output_config):  # whose loading knows no other names than the model's own
        aliases = family_of(config).aliases
        sliced = {aliases.get(name, name): tensor for name, tensor in sliced.items()}
    else:
        output_config.architectures = config.architectures
    output_config.dtype = next(iter(sliced.values())).dtype

    unfinished = out_folder.with_name(out_folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_torch_state_dict(sliced, unfinished, metadata={"format": "pt"})
    output_config.save_pretrained(unfinished)
    for pattern in TOKENIZER_FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, unfinished / file.name)
    description = {
        "headstart": headstart.__version__,
        "torch": str(torch.__version__),
        "teacher": str(teacher),
        "teacher_hash": hash_checkpoint(folder),
        "teacher_licence": licence_of(folder),
        **(provenance or {}),
        "spec": spec.to_json(),
    }
    (unfinished / "subnet.json").write_text(json.dumps(description, indent=2) + "\n")
    write_card(unfinished)
    unfinished.rename(out_folder)
    return out_folder


def _alone(named_tensor: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """A tensor that is no view of a larger one, which it would keep in memory."""
    name, tensor = named_tensor
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return name, tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def hash_checkpoint(folder: Path) -> str:
    """A hash of a checkpoint's config and weights, read in pieces of 1 MiB."""
    digest = xxhash.xxh3_128()  # as fast as the disk
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
