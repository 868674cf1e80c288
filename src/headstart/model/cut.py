"""Cuts a sub-network's tensors out of its teacher's, and makes a model of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.model.architecture import Architecture, Rule
from headstart.model.axes import Sizes, parse_layout, slice_tensor, stacked, unstack
from headstart.model.families import DROPPED
from headstart.model.rotary import kept_pairs
from headstart.model.spec import SubnetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def slice_tensors(
    tensors: Iterable[tuple[str, Tensor]], teacher: Architecture, spec: SubnetSpec
) -> Iterator[tuple[str, Tensor]]:
    """Cut each of a teacher's tensors down to the sub-network, and renumber the kept layers.

    The (name, tensor) pairs are the whole teacher's, in any order.

    Raises:
        UserError: a tensor matches no rule or has not the config's shape, or one that the table
            names is not there.
    """
    sizes, family = teacher.sizes, teacher.family
    positions = {layer: position for position, layer in enumerate(spec.layers)}
    missing = teacher.places(spec.layers)
    for name, tensor in tensors:
        rule, layer = teacher.check_tensor(name, tuple(tensor.shape))
        missing.discard((rule.pattern, layer))
        part = None
        if rule.layout != DROPPED and layer is None:
            part = slice_tensor(tensor, rule.layout, sizes, {"embed": spec.embed})
            if family.scaled_embedding and rule.pattern in family.scaled_embedding:
                part = _rescaled_embedding(part, rule, teacher, len(spec.embed))
        elif rule.layout != DROPPED and layer in positions:
            kept = spec.kept_in_layer(positions[layer])
            name = name.replace(f".{layer}.", f".{positions[layer]}.", 1)
            part = slice_tensor(tensor, rule.layout, sizes, kept)
            if spec.head_dim is not None and rule.pattern in family.queries:
                part = _rescaled_queries(part, rule.layout, sizes, kept)
        del tensor  # or it would stay until the next one is read
        if part is not None:
            yield name, part
        part = None  # it may be a view of the whole
    teacher.refuse_missing(missing)


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


def embedding_scale(teacher: Architecture, kept: int) -> float:
    """How many times as large the embeddings of a student with so many channels are."""
    if not teacher.family.scaled_embedding:
        return 1.0
    scale: float = (teacher.sizes["embed"] / kept) ** 0.5
    return scale


def _rescaled_embedding(part: Tensor, rule: Rule, teacher: Architecture, kept: int) -> Tensor:
    """An embedding, or the last norm, of a model that multiplies embeddings by the root of width.

    The narrower student multiplies by less, so its embeddings are made larger; where they are the
    output matrix too, the last norm is made smaller by as much.
    """
    assert teacher.family.scaled_embedding
    scale = embedding_scale(teacher, kept)
    if scale == 1:
        return part
    embedding, _ = teacher.family.scaled_embedding
    if rule.pattern == embedding:
        return part * scale
    return (1 + part) / scale - 1 if teacher.config.tie_word_embeddings else part


def build_student(
    tensors: Iterable[tuple[str, Tensor]], teacher: Architecture, spec: SubnetSpec
) -> PreTrainedModel:
    """Cut a sub-network out of a teacher in memory, without touching disk.

    Shapes that no stock checkpoint could hold, such as layers of different sizes, work as well. The
    (name, tensor) pairs are the whole teacher's, refitted or as they are.

    Returns:
        A model in eval mode on the teacher's device, whose parameters ask for no gradients; those
        whose kept units lie side by side are views of the teacher's. Its config has the teacher's
        rotary parameters, also where heads are narrower.

    Raises:
        UserError: the spec does not fit the teacher.
    """
    return assemble_student(slice_tensors(tensors, teacher, spec), teacher, spec)


def assemble_student(
    sliced: Iterable[tuple[str, Tensor]], teacher: Architecture, spec: SubnetSpec
) -> PreTrainedModel:
    """What `build_student` returns, of pairs that were cut already and are on one device."""
    model = assemble(teacher.student(spec, with_rope=False), sliced)
    if spec.head_dim is not None:
        _set_frequencies(model, teacher, spec.head_dim)
    return place_buffers(model, model.device).eval().requires_grad_(False)


def assemble(architecture: Architecture, tensors: Iterable[tuple[str, Tensor]]) -> PreTrainedModel:
    """A model around all of its (name, tensor) pairs, without making other tensors first."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture.config)
    for name, tensor in tensors:
        _attach(model, architecture.family.aliases.get(name, name), tensor)
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


def _set_frequencies(
    model: PreTrainedModel, teacher: Architecture, channels: tuple[int, ...]
) -> None:
    """Let a model turn by the teacher's frequencies of the kept channels, whichever they are."""
    pairs = kept_pairs(teacher.config.rope_parameters, teacher.sizes["head_dim"], channels)
    rotary: Any = type(model.base_model.rotary_emb)(teacher.config)
    model.base_model.rotary_emb.inv_freq = rotary.inv_freq[pairs]
    model.base_model.rotary_emb.original_inv_freq = rotary.original_inv_freq[pairs]
