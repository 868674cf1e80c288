"""Cuts a sub-network out of its teacher, from memory or shard by shard from disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import headstart
from headstart.subnet.axes import slice_tensor
from headstart.subnet.families import DROPPED
from headstart.subnet.rules import family_of, layouts_of, match_tensor, read_config, sizes_of
from headstart.subnet.spec import SubnetSpec, student_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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
                repo_id, allow_patterns=["*.safetensors", "*.json", "*.txt", *TOKENIZER_FILES]
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
        for file in set(files.values()):
            if not file.is_file():
                raise ValueError(f"{index} names {file.name}, which is missing; fetch it again")
        return files
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_shard(file) as shard:
            files.update(dict.fromkeys(shard.keys(), file))
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors one at a time, shard by shard, memory-mapped."""
    files = checkpoint_files(folder)
    for file in sorted(set(files.values())):
        with open_shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if files.get(name) == file:
                    yield name, shard.get_tensor(name)


def slice_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, spec: SubnetSpec
) -> Iterator[tuple[str, Tensor]]:
    """Cut each of a teacher's tensors down to the sub-network, and renumber the kept layers.

    Args:
        tensors: (name, tensor) pairs of the whole teacher, in any order.
        config: the teacher's config.
        spec: what to keep.

    Raises:
        ValueError: a tensor matches no rule, or one that the table names is not there.
    """
    sizes = sizes_of(config)
    positions = {layer: position for position, layer in enumerate(spec.layers)}
    missing = {
        (pattern, layer if "{i}" in pattern else None)
        for pattern in layouts_of(config)
        for layer in spec.layers
    }
    for name, tensor in tensors:
        rule, layer = match_tensor(name, config)
        missing.discard((rule.pattern, layer))
        part = None
        if rule.layout != DROPPED and layer is None:
            part = slice_tensor(tensor, rule.layout, sizes, {"embed": spec.embed})
        elif rule.layout != DROPPED and layer in positions:
            position = positions[layer]
            name = name.replace(f".{layer}.", f".{position}.", 1)
            part = slice_tensor(tensor, rule.layout, sizes, spec.kept_in_layer(position))
        del tensor  # or it would stay until the next one is read
        if part is not None:
            yield name, part
    if missing:
        pattern, layer = min(missing, key=str)
        raise ValueError(
            f"the checkpoint lacks {pattern.replace('{i}', str(layer))!r}, which the "
            f"{family_of(config).name} table expects; fetch the teacher again"
        )


def build_student(
    state: Mapping[str, Tensor], config: PreTrainedConfig, spec: SubnetSpec
) -> PreTrainedModel:
    """Cut a sub-network out of a teacher in memory, without touching disk.

    Args:
        state: the teacher's state dict.
        config: the teacher's config.
        spec: what to keep.

    Returns:
        A stock model in eval mode; tensors that are kept whole are shared with the teacher.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    family = family_of(config)
    output_config = student_config(config, spec)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            output_config, dtype=next(iter(state.values())).dtype
        )
    sliced = {
        family.aliases.get(name, name): tensor
        for name, tensor in slice_tensors(state.items(), config, spec)
    }
    loaded = model.load_state_dict(sliced, strict=False, assign=True)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(loaded.missing_keys) <= tied and not loaded.unexpected_keys, loaded
    return model.eval()


def extract(
    teacher: str | Path,
    spec: SubnetSpec,
    out_folder: str | Path,
    provenance: Mapping[str, Any] | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Path:
    """Cut a sub-network out of a checkpoint and write it as an ordinary Hugging Face folder.

    One teacher tensor is in memory at a time; the folder appears whole or not at all.

    Args:
        teacher: a folder with safetensors, or a hub id.
        spec: what to keep.
        out_folder: where the student goes; must not exist yet.
        provenance: more entries for `subnet.json`, such as the bin and the score.
        on_tensor: called with each teacher tensor's name, for progress.

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
    sliced = {name: t.contiguous() for name, t in slice_tensors(tensors, config, spec)}
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
        **(provenance or {}),
        "spec": spec.to_json(),
    }
    (unfinished / "subnet.json").write_text(json.dumps(description, indent=2) + "\n")
    unfinished.rename(out_folder)
    return out_folder


def hash_checkpoint(folder: Path) -> str:
    """A hash of a checkpoint's config and weights, read in pieces of 1 MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
