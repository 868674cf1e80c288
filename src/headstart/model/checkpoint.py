"""Checkpoint folders: found by what a user calls them, read, hashed, and written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.demo import DEMO, demo_teacher
from headstart.model.architecture import Architecture
from headstart.model.card import CARD
from headstart.model.families import DROPPED
from headstart.model.transformers_4 import add_old_keys
from headstart.model.weights import (
    INDEX,
    WHOLE,
    open_shard,
    refuse_not_finite,
    refuse_other_kinds,
    shard_names,
    tensor_files,
    weight_files,
)
from headstart.system.errors import UserError
from headstart.system.files import read_json
from headstart.system.hashing import hash_files
from headstart.system.hub import HubName
from headstart.system.memo import remembered_of_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip
CORRECTION = "correction.json"
"""In the folder of a teacher that was tuned before it was cut: what that took and gave."""
FILES_VERSION = 1
"""Of how weights are hashed and looked through; raise it when either changes."""
EMBEDDING = "vocab embed"
"""The layout of the input embedding, and of an output matrix."""


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
        """Of config and weights. These are read to their end, unless they were before."""
        files = [self.folder / "config.json", *weight_files(self.folder)]
        return remembered_of_files("hash", FILES_VERSION, files, partial(hash_files, files))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it; errors as in `tensor_files`."""
        return tensor_files(self.folder)

    @cached_property
    def correction(self) -> dict[str, Any] | None:
        """What its `correction.json` says of how it was tuned on a run's own text, if it was."""
        found: dict[str, Any] | None = read_json(self.folder / CORRECTION)
        return found

    @property
    def correction_flops(self) -> int:
        """Of that tuning; 0 for a model as it came."""
        return int(self.correction["flops"]) if self.correction else 0

    def check(self) -> None:
        """Find out whether the weights are those that the config says, and finite numbers.

        They are read to their end, unless they were before, after all that the files' headers say
        was looked at.

        Raises:
            UserError: a tensor is unknown, is missing, has another shape, or holds something else
                than finite numbers; an output matrix is not the input embedding that the config
                ties it to; transformers makes no model of the config; or as `files`.
        """
        self._build()
        missing = self.architecture.places(range(self.architecture.sizes["layers"]))
        unused = []
        for file in sorted(set(self.files.values())):
            with open_shard(file) as shard:
                for name in shard.keys():  # noqa: SIM118
                    part = shard.get_slice(name)
                    rule, layer = self.architecture.check_tensor(name, tuple(part.get_shape()))
                    if rule.layout == DROPPED:
                        unused.append((name, rule.pattern))
                        continue
                    refuse_other_kinds(file, name, part.get_dtype())
                    missing.discard((rule.pattern, layer))
        self.architecture.refuse_missing(missing)
        for file in sorted(set(self.files.values())):
            check = partial(self._check_finite, file)
            remembered_of_files("finite", FILES_VERSION, [file], check)
        for name, pattern in unused:
            if self.architecture.family.tensors[pattern].startswith(EMBEDDING):
                self._refuse_untied(name)

    def _check_finite(self, file: Path) -> None:
        for name in (name for name, holder in self.files.items() if holder == file):
            tensor = self._tensor(name)
            if tensor.is_floating_point():
                refuse_not_finite(file, name, tensor)

    def _refuse_untied(self, output: str) -> None:
        """Raise a UserError if the output matrix beside a tied embedding is another one.

        Transformers then leaves the tie, and the model is another than its config says.
        """
        (embedding,) = (
            name for name in self.files if self.architecture.match(name)[0].layout == EMBEDDING
        )
        if not torch.equal(self._tensor(output), self._tensor(embedding)):
            raise UserError(
                f"{self.files[output]} holds {output!r} and another {embedding!r}, and "
                f"{self.folder / 'config.json'} ties the two; set tie_word_embeddings to false "
                "there if the output matrix is right, or remove it"
            )

    def _build(self) -> None:
        """Find out whether transformers makes a model of the config, without memory for weights."""
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
        for name in sorted(self.files, key=lambda name: self.files[name]):
            yield name, self._tensor(name)

    def _tensor(self, name: str) -> Tensor:
        # Opened for each, since what was read of an open shard stays mapped.
        with open_shard(self.files[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


def find_model(model: str | Path) -> Path:
    """The local folder of a model; a hub id is downloaded into the hub's cache first.

    Args:
        model: a folder, a hub id such as "owner/name" or "owner/name@revision", or "demo" for the
            demo's teacher.

    Raises:
        UserError: the folder, hub id or revision does not exist; or as `weight_files`.
    """
    if model == DEMO:
        return demo_teacher()
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(str(model))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is not a model folder")
    weight_files(folder)
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

    name = _on_hub(model)

    def fetched(*patterns: str) -> Path:
        # Without a network this is what was fetched before.
        revision = name.revision or None
        return Path(snapshot_download(name.repo, revision=revision, allow_patterns=list(patterns)))

    with _telling(name):
        folder = fetched(WHOLE, "*.json", "*.txt", CARD, *TOKENIZER_FILES)
        if (folder / INDEX).is_file() and not (folder / WHOLE).is_file():
            fetched(*shard_names(folder / INDEX))
    return folder


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


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> None:
    """Write weights and config, in shards if need be, into a folder that exists.

    A stock folder has the tensor names of its family's files, by which transformers 4 goes; a
    layer-wise one has the model's own, since loading it knows no others.
    """
    from huggingface_hub import save_torch_state_dict

    architecture = Architecture.of(config)
    names = architecture.family.aliases
    if not architecture.is_layerwise:
        names = {name: alias for alias, name in names.items()}
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    save_torch_state_dict(renamed, folder, metadata={"format": "pt"})
    config.save_pretrained(folder)
    add_old_keys(folder)


def copy_files(source: Path, folder: Path, patterns: Sequence[str] = TOKENIZER_FILES) -> None:
    """Copy what matches some patterns, the tokenizer's files by default, from folder to folder."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
