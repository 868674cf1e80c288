"""Cuts a sub-network out of its teacher, from memory or shard by shard from disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

import headstart
from headstart.subnet.axes import Sizes, parse_layout, shape_of, slice_tensor, stacked, unstack
from headstart.subnet.card import CARD, licence_of, write_card
from headstart.subnet.families import DROPPED
from headstart.subnet.refit import refitted
from headstart.subnet.rotary import kept_pairs
from headstart.subnet.rules import (
    Rule,
    family_of,
    is_layerwise,
    layouts_of,
    match_tensor,
    read_config,
    sizes_of,
)
from headstart.subnet.spec import SubnetSpec, student_config
from headstart.subnet.statistics import Statistics

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


def slice_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    spec: SubnetSpec,
    statistics: Statistics | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Cut each of a teacher's tensors down to the sub-network, and renumber the kept layers.

    Args:
        tensors: (name, tensor) pairs of the whole teacher, in any order.
        config: the teacher's config.
        spec: what to keep.
        statistics: of the teacher's activations, by which what is kept is refitted; None keeps the
            teacher's numbers.

    Raises:
        ValueError: a tensor matches no rule or has not the config's shape, or one that the table
            names is not there.
    """
    if statistics is not None:
        tensors = refitted(tensors, config, spec, statistics)
    sizes, family = sizes_of(config), family_of(config)
    positions = {layer: position for position, layer in enumerate(spec.layers)}
    missing = {
        (pattern, layer if "{i}" in pattern else None)
        for pattern in layouts_of(config)
        for layer in spec.layers
    }
    for name, tensor in tensors:
        rule, layer = match_tensor(name, config)
        missing.discard((rule.pattern, layer))
        if rule.layout != DROPPED and tuple(tensor.shape) != shape_of(rule.layout, sizes):
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, and the config says "
                f"{shape_of(rule.layout, sizes)}; mend config.json or fetch the teacher again"
            )
        part = None
        if rule.layout != DROPPED and layer is None:
            part = slice_tensor(tensor, rule.layout, sizes, {"embed": spec.embed})
            if family.scaled_embedding and rule.pattern in family.scaled_embedding:
                part = _as_loud(part, rule, config, len(spec.embed))
        elif rule.layout != DROPPED and layer in positions:
            position = positions[layer]
            name = name.replace(f".{layer}.", f".{position}.", 1)
            part = slice_tensor(tensor, rule.layout, sizes, spec.kept_in_layer(position))
            if spec.head_dim is not None and rule.pattern in family.queries:
                kept = spec.kept_in_layer(position)
                part = _rescaled_queries(part, rule.layout, sizes, kept)
        del tensor  # or it would stay until the next one is read
        if part is not None:
            yield name, part
        part = None  # it may be a view of the whole
    if missing:
        pattern, layer = min(missing, key=str)
        raise ValueError(
            f"the checkpoint lacks {pattern.replace('{i}', str(layer))!r}, which the "
            f"{family.name} table expects; fetch the teacher again"
        )


def _rescaled_queries(
    queries: Tensor, layout: str, sizes: Sizes, kept: Mapping[str, Sequence[int]]
) -> Tensor:
    """Queries of narrower heads, scaled so that scores stay what the kept channels gave.

    Attention divides scores by the root of the head size, which is now a smaller one.
    """
    head_dim = len(kept["head_dim"])
    scale: float = (head_dim / sizes["head_dim"]) ** 0.5
    if len(stacked(layout)) > 1:
        parts = unstack(queries, layout, {**sizes, **{axis: len(kept[axis]) for axis in kept}})
        first, *rest = (part for part, _ in parts)
        return torch.cat([first * scale, *rest])
    fused = [part for part in parse_layout(layout)[0] if isinstance(part, int)]
    if not fused:
        return queries * scale
    by_part = queries.clone().view(-1, fused[0], head_dim, *queries.shape[1:])
    by_part[:, 0] *= scale
    return by_part.view(queries.shape)


def _as_loud(part: Tensor, rule: Rule, config: PreTrainedConfig, kept: int) -> Tensor:
    """An embedding, or the last norm, of a model that multiplies embeddings by the root of width.

    The narrower student multiplies by less, so its embeddings are made larger; where they are the
    output matrix too, the last norm is made smaller by as much.
    """
    family = family_of(config)
    assert family.scaled_embedding
    scale: float = (sizes_of(config)["embed"] / kept) ** 0.5
    if scale == 1:
        return part
    embedding, _ = family.scaled_embedding
    if rule.pattern == embedding:
        return part * scale
    return (1 + part) / scale - 1 if config.tie_word_embeddings else part


def build_student(
    state: Mapping[str, Tensor],
    config: PreTrainedConfig,
    spec: SubnetSpec,
    statistics: Statistics | None = None,
) -> PreTrainedModel:
    """Cut a sub-network out of a teacher in memory, without touching disk.

    Shapes that no stock checkpoint could hold, such as layers of different sizes, work as well.

    Args:
        state: the teacher's state dict.
        config: the teacher's config.
        spec: what to keep.
        statistics: as for `slice_tensors`.

    Returns:
        A model in eval mode on the teacher's device, whose parameters ask for no gradients; those
        whose kept units lie side by side are views of the teacher's. Its config has the teacher's
        rotary parameters, also where heads are narrower.

    Raises:
        ValueError: the spec does not fit the teacher.
    """
    family = family_of(config)
    state_device = next(iter(state.values())).device
    sliced = slice_tensors(state.items(), config, spec, statistics)
    model = assemble(student_config(config, spec, with_rope=False), sliced, family.aliases)
    if spec.head_dim is not None:
        _set_frequencies(model, config, kept_pairs(config, spec.head_dim))
    return place_buffers(model, state_device).eval().requires_grad_(False)


def assemble(
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    aliases: Mapping[str, str],
) -> PreTrainedModel:
    """A model of a config around tensors that are there already, without making others first.

    Args:
        config: of the model.
        tensors: (name, tensor) pairs, all that it has.
        aliases: name of a pair -> name in the model, where the two differ.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, tensor in tensors:
        _attach(model, aliases.get(name, name), tensor)
    model.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model


def place_buffers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model's buffers to where its parameters are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def _attach(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in a parameter's place."""
    module_name, _, parameter = name.rpartition(".")
    module = model.get_submodule(module_name)
    assert getattr(module, parameter).shape == tensor.shape, name
    setattr(module, parameter, nn.Parameter(tensor))


def _set_frequencies(model: PreTrainedModel, config: PreTrainedConfig, pairs: list[int]) -> None:
    """Let a model turn by the frequencies of some of the teacher's pairs, whichever they are."""
    rotary: Any = type(model.base_model.rotary_emb)(config)
    model.base_model.rotary_emb.inv_freq = rotary.inv_freq[pairs]
    model.base_model.rotary_emb.original_inv_freq = rotary.original_inv_freq[pairs]


def extract(
    teacher: str | Path,
    spec: SubnetSpec,
    out_folder: str | Path,
    provenance: Mapping[str, Any] | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
    statistics: Statistics | None = None,
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
    sliced = dict(map(_alone, slice_tensors(tensors, config, spec, statistics)))
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
