"""One score per unit of every searched axis, from one calibration pass over the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headstart.search.space import Orders
from headstart.subnet.axes import parse_layout
from headstart.subnet.rules import family_of, layouts_of, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Importance:
    """Scores of a teacher's units; higher is more important.

    Attributes:
        layers: 1 - cos(input, output) of each layer, mean over tokens.
        embed: mean |activation| of each channel after the norms, over tokens and layers.
        kv_groups: mean |activation| of each group's attention output, for each layer.
        mlp: mean |activation| of each neuron, for each layer.
    """

    layers: Float[Tensor, " layers"]
    embed: Float[Tensor, " embed"]
    kv_groups: Float[Tensor, "layers kv_groups"]
    mlp: Float[Tensor, "layers mlp"]

    def orders(self) -> Orders:
        """The order of each axis from the most to the least important unit."""
        return Orders(
            layers=_descending(self.layers),
            embed=_descending(self.embed),
            kv_groups=tuple(_descending(row) for row in self.kv_groups),
            mlp=tuple(_descending(row) for row in self.mlp),
        )


def _descending(scores: Tensor) -> tuple[int, ...]:
    return tuple(torch.argsort(scores, descending=True, stable=True).tolist())


@torch.no_grad()
def activation_importance(
    teacher: PreTrainedModel,
    batches: Iterable[Int[Tensor, "batch tokens"]],
    on_batch: Callable[[int], None] = lambda num_tokens: None,
) -> Importance:
    """Score every unit by its mean absolute activation, and layers by how much they turn a token.

    Args:
        teacher: the whole teacher, in eval mode.
        batches: calibration token ids.
        on_batch: called with the tokens of each batch done, for progress.

    Source: Minitron (arXiv 2407.14679), section 2.2, for width; ShortGPT (arXiv 2403.03853),
    section 3.1, for depth.
    """
    config = teacher.config
    family, sizes = family_of(config), sizes_of(config)
    layouts = layouts_of(config)
    num_layers = sizes["layers"]
    sums: dict[str, Tensor] = {
        axis: torch.zeros(num_layers, sizes[axis], dtype=torch.float64)
        for axis in family.importance_sites
    }
    turns = torch.zeros(num_layers, dtype=torch.float64)
    num_tokens = 0

    def add_activation(axis: str, layer: int, layout: str) -> Callable[[nn.Module, Any], None]:
        units = parse_layout(layout)[1]
        shape = [part if isinstance(part, int) else sizes[part] for part in units]
        position = units.index(axis)
        others = [dimension for dimension in range(len(shape)) if dimension != position]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            per_unit = inputs[0].flatten(0, -2).abs().sum(dim=0, dtype=torch.float32)
            per_unit = per_unit.reshape(shape)
            sums[axis][layer] += (per_unit.mean(dim=others) if others else per_unit).cpu()

        return hook

    def add_turn(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            turns[layer] += (1 - cosine).sum().cpu()

        return hook

    with ExitStack() as hooks:
        for layer in range(num_layers):
            module = teacher.get_submodule(family.layer.format(i=layer))
            hooks.callback(module.register_forward_hook(add_turn(layer)).remove)
            for axis, sites in family.importance_sites.items():
                for site in sites:
                    hook = add_activation(axis, layer, layouts[f"{site}.weight"])
                    module = teacher.get_submodule(site.format(i=layer))
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            teacher.base_model(batch.to(teacher.device), use_cache=False)
            num_tokens += batch.numel()
            on_batch(batch.numel())

    if num_tokens == 0:
        raise ValueError("importance needs at least one calibration block; add text to the data")
    sites_per_axis = {axis: len(sites) for axis, sites in family.importance_sites.items()}
    mean = {axis: sums[axis] / (num_tokens * sites_per_axis[axis]) for axis in sums}
    return Importance(
        layers=(turns / num_tokens).float(),
        embed=mean["embed"].mean(dim=0).float(),
        kv_groups=mean["kv_groups"].float(),
        mlp=mean["mlp"].float(),
    )
