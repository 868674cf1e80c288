"""A teacher with fewer tokens: an ordinary checkpoint, whose other rows are cut away."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.model.architecture import Architecture
from headstart.model.axes import dimensions_of
from headstart.model.card import CARD
from headstart.model.checkpoint import CORRECTION, Checkpoint, copy_files, write_checkpoint
from headstart.model.families import DROPPED
from headstart.system.errors import UserError
from headstart.system.files import write_json
from headstart.text.vocabulary import trimmed

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
WHOLE_TOKENIZER = "tokenizer_whole.json"
"""The teacher's tokenizer.json, by which llama.cpp's converter knows how texts are cut to words."""
KEPT = "vocabulary.json"
"""The teacher's ids of the rows that are left, in a trimmed folder."""
COPIED = (CARD, CORRECTION, "chat_template*", "special_tokens_map.json")
NEEDED_ID_KEYS = ("_token_id", "_token_ids")
"""How keys of configs end that hold ids without which a model means something else."""
ID_KEYS = (*NEEDED_ID_KEYS, "suppress_tokens")
"""How all keys end that hold ids."""


def trimmed_architecture(architecture: Architecture, num_rows: int) -> Architecture:
    """The architecture with so many rows of the vocabulary; its config's ids are the old ones."""
    config = copy.deepcopy(architecture.config)
    config.vocab_size = num_rows
    return Architecture.of(config)


def renumbered(entries: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The entries of a config that hold token ids, with the places of these among those kept.

    An id that is not kept is left out of a list, and stays as it is on its own: it is no token's.
    """
    places: dict[Any, int] = {id: place for place, id in enumerate(kept)}
    result: dict[str, Any] = {}
    for key, value in entries.items():
        if not key.endswith(ID_KEYS) or value is None:
            continue
        if isinstance(value, list):
            result[key] = [places[id] for id in value if id in places]
        elif value in places:
            result[key] = places[value]
    return result


def config_ids(teacher: Checkpoint) -> set[int]:
    """The ids that a model's configs name, such as the one that ends a text."""
    config = teacher.architecture.config
    found = set[int]()
    for entries in (config.to_dict(), _json_of(teacher.folder / GENERATION_CONFIG)):
        for key, value in entries.items():
            if key.endswith(NEEDED_ID_KEYS):
                found |= set(value if isinstance(value, list) else [value])
    return {id for id in found if isinstance(id, int) and 0 <= id < config.vocab_size}


def read_tokenizer(teacher: Checkpoint) -> dict[str, Any]:
    """What a model's tokenizer.json holds.

    Raises:
        UserError: it has none, or none that reads.
    """
    path = teacher.folder / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"{teacher.folder} has no tokenizer.json, and only such a tokenizer can be trimmed; "
            "write one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return _json_of(path)


def write_trimmed(teacher: Checkpoint, kept: Sequence[int], folder: Path) -> None:
    """Write a teacher that has only some rows of its vocabulary, into a folder that exists.

    Weights keep their precision, configs and tokenizer get the new ids. `tokenizer.model`,
    `vocab.json` and `merges.txt` are left out, since they say what tokenizer.json says; the ids
    that were kept are in `vocabulary.json`, and the whole tokenizer in `tokenizer_whole.json`.

    Args:
        teacher: its weights are read once, tensor by tensor.
        kept: ids in ascending order, from `kept_tokens`.
    """
    write_trimmed_model(teacher, kept, folder)
    write_trimmed_tokenizer(teacher, kept, folder)
    write_json(folder / KEPT, list(kept))
    if generation := _json_of(teacher.folder / GENERATION_CONFIG):
        write_json(folder / GENERATION_CONFIG, {**generation, **renumbered(generation, kept)})


def write_trimmed_model(teacher: Checkpoint, kept: Sequence[int], folder: Path) -> None:
    """Write its weights and config without a tokenizer; arguments as for `write_trimmed`."""
    rows = torch.tensor(kept)
    tensors: dict[str, Tensor] = {}
    for name, tensor in teacher.tensors():
        layout = teacher.architecture.match(name)[0].layout
        if layout == DROPPED:
            continue
        is_cut = [axes == ("vocab",) for axes in dimensions_of(layout)]
        tensors[name] = tensor.index_select(is_cut.index(True), rows) if any(is_cut) else tensor
    config = trimmed_architecture(teacher.architecture, len(kept)).config
    for key, value in renumbered(config.to_dict(), kept).items():
        setattr(config, key, value)
    if getattr(config, "pad_token_id", None) not in range(len(kept)):  # torch would refuse it
        config.pad_token_id = None
    write_checkpoint(folder, tensors, config)


def write_trimmed_tokenizer(teacher: Checkpoint, kept: Sequence[int], folder: Path) -> None:
    """Write the tokenizer that knows the kept ids alone; arguments as for `write_trimmed`."""
    copy_files(teacher.folder, folder, COPIED)
    trimmed_before = teacher.folder / WHOLE_TOKENIZER
    whole = trimmed_before if trimmed_before.is_file() else teacher.folder / TOKENIZER
    shutil.copyfile(whole, folder / WHOLE_TOKENIZER)
    write_json(folder / TOKENIZER, trimmed(read_tokenizer(teacher), kept))
    settings = _json_of(teacher.folder / TOKENIZER_CONFIG)
    if decoder := settings.get("added_tokens_decoder"):
        places = {str(id): str(place) for place, id in enumerate(kept)}
        settings["added_tokens_decoder"] = {
            places[id]: token for id, token in decoder.items() if id in places
        }
    if settings:
        write_json(folder / TOKENIZER_CONFIG, settings)


def _json_of(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        UserError: it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        raise UserError(f"{path} is no JSON object ({error}); fetch the model again") from error
    return found
