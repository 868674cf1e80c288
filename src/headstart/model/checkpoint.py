"""Checkpoint folders: found by what a user calls them, read, hashed, and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.demo import DEMO, demo_teacher
from headstart.model.architecture import Architecture
from headstart.model.card import CARD
from headstart.system.errors import UserError
from headstart.system.hashing import hash_files
from headstart.system.hub import HubName

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, with what was read of it.

    Attributes:
        folder: on this machine.
        architecture: from its config.
    """

    folder: Path
    architecture: Architecture = field(compare=False)

    @staticmethod
    def open(model: str | Path) -> Checkpoint:
        """Find a model and read its config; errors as in `find_model` and `Architecture.read`."""
        folder = find_model(model)
        return Checkpoint(folder, Architecture.read(folder))

    @staticmethod
    def open_whole(model: str | Path) -> Checkpoint:
        """Find a model whose weights shall be read; errors as in `open` and `check`."""
        checkpoint = Checkpoint.open(model)
        checkpoint.check()
        return checkpoint

    @cached_property
    def hash(self) -> str:
        """Of config and weights, which are read to their end when this is first asked for."""
        weights = sorted(self.folder.glob("*.safetensors"))
        return hash_files([self.folder / "config.json", *weights])

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it.

        Raises:
            UserError: a file is cut short, or missing or not what the index says.
        """
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            shards = sorted(self.folder.glob("*.safetensors"))
            return {name: file for file in shards for name in _names(file)}
        try:
            names = json.loads(index.read_text())["weight_map"]
            files = {name: self.folder / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of shards; fetch the model again") from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise UserError(f"{index} names {file.name}, which is missing; fetch it again")
            held = set(_names(file))
            for name, place in files.items():
                if place == file and name not in held:
                    raise UserError(
                        f"{file} lacks {name!r}, which {index} says it has; fetch both again"
                    )
        return files

    def check(self) -> None:
        """Find out from the files' headers whether the weights are those that the config says.

        Raises:
            UserError: a tensor is unknown, is missing or has another shape; transformers makes no
                model of the config; or as `files`.
        """
        self._build()
        missing = self.architecture.places(range(self.architecture.sizes["layers"]))
        for file in sorted(set(self.files.values())):
            with _open_shard(file) as shard:
                for name in (name for name, place in self.files.items() if place == file):
                    shape = tuple(shard.get_slice(name).get_shape())
                    rule, layer = self.architecture.check_tensor(name, shape)
                    missing.discard((rule.pattern, layer))
        self.architecture.refuse_missing(missing)

    def _build(self) -> None:
        """Find out whether transformers makes a model of the config, without memory for weights."""
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(self.architecture.config)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise UserError(
                f"transformers makes no model of {self.folder / 'config.json'} "
                f"({type(error).__name__}: {reason}); mend it or fetch the model again"
            ) from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) pairs one at a time, shard by shard, memory-mapped."""
        for name, file in sorted(self.files.items(), key=lambda named: named[1]):
            # Opened for each, since what was read of an open shard stays mapped.
            with _open_shard(file) as shard:
                tensor = shard.get_tensor(name)
            yield name, tensor
            del tensor


def find_model(model: str | Path) -> Path:
    """The local folder of a model; a hub id is downloaded into the hub's cache first.

    Args:
        model: a folder, a hub id such as "owner/name" or "owner/name@revision", or "demo" for the
            demo's teacher.

    Raises:
        UserError: the folder, hub id or revision does not exist, or holds no safetensors.
    """
    if model == DEMO:
        return demo_teacher()
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(str(model))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is not a model folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no .safetensors files; headstart reads no pickles, so convert the "
            "teacher once with model.save_pretrained(folder)"
        )
    return folder


def read_architecture(model: str | Path) -> Architecture:
    """The architecture of a model that `find_model` would find, without fetching its weights.

    Raises:
        UserError: there is no such folder or model, or no table knows its family.
    """
    if model == DEMO or Path(model).is_dir():
        return Architecture.read(find_model(model) if model == DEMO else Path(model))
    return Architecture.read(_fetched_config(_on_hub(str(model))).parent)


def model_commit(name: HubName) -> str:
    """The commit that a model's revision is now; without a network, what it was when last fetched.

    Raises:
        UserError: there is no such model or revision.
    """
    return name.revision if name.is_pinned else _fetched_config(name).parent.name


def _fetched_config(name: HubName) -> Path:
    """A model's config.json in the hub's cache, in a folder that is named after its commit."""
    from huggingface_hub import hf_hub_download

    with _telling(name):
        return Path(hf_hub_download(name.repo, "config.json", revision=name.revision or None))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", CARD, *TOKENIZER_FILES]
    name = _on_hub(model)
    with _telling(name):
        # Without a network this is what was fetched before.
        folder = snapshot_download(
            name.repo, revision=name.revision or None, allow_patterns=patterns
        )
        return Path(folder)


def _on_hub(model: str) -> HubName:
    name = HubName.parse(model)
    if name is None or name.config:
        raise UserError(
            f"{model!r} is neither a folder nor a model on the hub; write one as owner/name "
            "or owner/name@revision"
        )
    return name


@contextmanager
def _telling(name: HubName) -> Iterator[None]:
    """Tell in a sentence what the hub does not give."""
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    try:
        yield
    except RevisionNotFoundError as error:
        raise name.no_revision() from error
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{str(name)!r} is neither a folder nor a model that can be fetched from the "
            f"hub ({str(error).splitlines()[0]})"
        ) from error


def _names(shard: Path) -> list[str]:
    with _open_shard(shard) as tensors:
        return list(tensors.keys())


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> None:
    """Write weights and config, in shards if need be, into a folder that exists."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), folder, metadata={"format": "pt"})
    config.save_pretrained(folder)


def copy_files(source: Path, folder: Path, patterns: Sequence[str] = TOKENIZER_FILES) -> None:
    """Copy what matches some patterns, the tokenizer's files by default, from folder to folder."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
