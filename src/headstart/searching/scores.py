"""How each kind of importance is measured: from activations, from weights, or from gradients.

Every kind yields `Scores`. Weights alone are scored by a function; what needs text is an
`Observer` of the teacher's forward passes. Which numbers belong to which unit is read from the
family's table, so a new family needs no code here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headstart.losses.next_token import next_token_loss
from headstart.model.architecture import Architecture
from headstart.model.axes import (
    GLOBAL_AXES,
    Dimension,
    Sizes,
    dimensions_of,
    parse_layout,
    shape_of,
    unstack,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNIT_AXES = ("embed", "kv_groups", "mlp")

Scores: TypeAlias = "Mapping[str, Tensor]"
"""Axis -> the score of each of its units; one row for each layer, except for layers and embed."""

Weight: TypeAlias = "tuple[nn.Parameter, str, int | None]"
"""A parameter with its layout, and its layer if it is in one."""


class Observer(Protocol):
    """Scores a teacher while it reads text. Its hooks and flags are undone with the stack."""

    def __init__(self, teacher: PreTrainedModel, undo: ExitStack) -> None: ...

    def add(
        self, hidden: Float[Tensor, "batch tokens embed"], batch: Int[Tensor, "batch tokens"]
    ) -> None:
        """Take in the forward pass that just ended, without waiting for the device."""

    def scores(self) -> Scores:
        """The scores over all that was taken in, on the teacher's device."""


class Activation:
    """Mean |activation| of each unit over tokens, at the inputs of the family's importance sites.

    Source: Minitron (arXiv 2407.14679), section 2.2.
    """

    power = 1

    def __init__(self, teacher: PreTrainedModel, undo: ExitStack) -> None:
        architecture = Architecture.of(teacher.config)
        layouts, self.sizes = architecture.layouts, architecture.sizes
        self.units: dict[str, tuple[str, Dimension]] = {}
        self.of_batch: dict[str, Tensor] = {}
        self.num_tokens = 0
        for axis, sites in architecture.family.importance_sites.items():
            for site in sites:
                layout = layouts[f"{site}.weight"]
                width = shape_of(layout, self.sizes)[1]
                rows = torch.zeros(self.sizes["layers"], width, device=teacher.device)
                self.units[site] = (axis, dimensions_of(layout)[1])
                self.of_batch[site] = rows
                for layer, row in enumerate(rows):
                    module = teacher.get_submodule(site.format(i=layer))
                    hook = _powers_into(row, self.power)
                    undo.callback(module.register_forward_pre_hook(hook).remove)
        self.totals = {
            site: _zeros(rows.shape, rows.device) for site, rows in self.of_batch.items()
        }

    def add(self, hidden: Tensor, batch: Tensor) -> None:
        for site, total in self.totals.items():
            total += self.of_batch[site]
        self.num_tokens += batch.numel()

    def scores(self) -> Scores:
        means: dict[str, list[Tensor]] = {axis: [] for axis in UNIT_AXES}
        for site, (axis, units) in self.units.items():
            kept = {axis} if axis in GLOBAL_AXES else {"layers", axis}
            sums = _sum_but(kept, self.totals[site], ("layers", *units), self.sizes)
            values_per_unit = self.num_tokens * self.totals[site].numel() // sums.numel()
            means[axis].append(sums / values_per_unit)
        return {axis: torch.stack(of_sites).mean(dim=0) for axis, of_sites in means.items()}


class Contribution(Activation):
    """Root mean square, over tokens, of what each unit adds to the output of linear layers.

    Those are the family's importance sites: a neuron is scored by what it writes through the down
    projection, a channel by what queries and gates read of it, in all layers. What two units add is
    taken as independent.

    Source: Wanda (arXiv 2306.11695), section 3, whose |W_ij| |x_j| are summed here in squares over
    all outputs i and over all inputs j of a unit.
    """

    power = 2

    def __init__(self, teacher: PreTrainedModel, undo: ExitStack) -> None:
        super().__init__(teacher, undo)
        self.gains: dict[str, Tensor] = {}
        for site in self.units:
            names = (f"{site}.weight".format(i=layer) for layer in range(self.sizes["layers"]))
            weights = (_wide(teacher.get_parameter(name)) for name in names)
            self.gains[site] = torch.stack([weight.square().sum(0) for weight in weights])

    def scores(self) -> Scores:
        added: dict[str, list[Tensor]] = {axis: [] for axis in UNIT_AXES}
        for site, (axis, units) in self.units.items():
            kept = {axis} if axis in GLOBAL_AXES else {"layers", axis}
            squares = self.totals[site] * self.gains[site] / self.num_tokens
            added[axis].append(_sum_but(kept, squares, ("layers", *units), self.sizes))
        return {axis: torch.stack(of_sites).sum(dim=0).sqrt() for axis, of_sites in added.items()}


def _powers_into(row: Float[Tensor, " units"], power: int) -> Callable[[nn.Module, Any], None]:
    """A hook that writes the sum of |input|, or of its square, over all tokens."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].detach().flatten(0, -2)
        if power == 2:
            torch.sum(_wide(tokens).square(), dim=0, dtype=row.dtype, out=row)
        elif tokens.device.type == "cpu":  # where the norm is six times as slow
            torch.sum(tokens.abs(), dim=0, dtype=row.dtype, out=row)
        else:
            torch.linalg.vector_norm(tokens, ord=1, dim=0, dtype=row.dtype, out=row)

    return hook


class BlockInfluence:
    """1 - cos(input, output) of each layer, mean over tokens. It scores the layers alone.

    Source: ShortGPT (arXiv 2403.03853), section 3.1.
    """

    def __init__(self, teacher: PreTrainedModel, undo: ExitStack) -> None:
        architecture = Architecture.of(teacher.config)
        num_layers = architecture.sizes["layers"]
        self.total = _zeros((num_layers,), teacher.device)
        self.of_batch = torch.zeros_like(self.total)
        self.num_tokens = 0
        for layer in range(num_layers):
            module = teacher.get_submodule(architecture.family.layer.format(i=layer))
            hook = _cosines_into(self.of_batch[layer])
            undo.callback(module.register_forward_hook(hook).remove)

    def add(self, hidden: Tensor, batch: Tensor) -> None:
        self.total += self.of_batch
        self.num_tokens += batch.numel()

    def scores(self) -> Scores:
        return {"layers": 1 - self.total / self.num_tokens}


def _cosines_into(place: Float[Tensor, ""]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that writes the sum of cos(input, output) over all tokens."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        before = _wide(inputs[0])
        after = _wide(output[0] if isinstance(output, tuple) else output)
        norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
        cosines = torch.linalg.vecdot(before, after) / norms.clamp_(min=1e-12)
        torch.sum(cosines, dim=(0, 1), dtype=place.dtype, out=place)

    return hook


@torch.no_grad()
def magnitude(teacher: PreTrainedModel) -> Scores:
    """L2 norm over all weights of each unit, and of each layer.

    A channel's weights are its row or column of every matrix on the residual stream, embeddings
    included, and its entry of every norm and bias; a group's are those of its key, value and query
    heads; a layer's are all that it has.
    """
    sizes = Architecture.of(teacher.config).sizes
    squares = ((_wide(weight).square(), layout, layer) for weight, layout, layer in _table(teacher))
    sums = _sums_of_units(squares, sizes, teacher.device)
    return {axis: total.sqrt() for axis, total in sums.items()}


class Taylor:
    """Mean over batches of |sum over a unit's weights of gradient * weight|, in nats per token.

    That is, to first order, by how much a batch's mean next-token loss changes when the unit's
    weights become 0. A unit's weights are those of `magnitude`. A layer scores the sum of its
    groups and neurons: summed over a whole layer, products of either sign would cancel.

    Every batch takes a backward pass too, and holds its activations and one gradient for each
    parameter.

    Source: Molchanov et al. (arXiv 1906.10771), section 3, with the absolute value in place of the
    square; LLM-Pruner (arXiv 2305.11627), section 3.2, for language models.
    """

    def __init__(self, teacher: PreTrainedModel, undo: ExitStack) -> None:
        self.teacher = teacher
        self.table = list(_table(teacher))
        self.sizes = Architecture.of(teacher.config).sizes
        self.totals = _zeros_of_units(self.sizes, teacher.device)
        self.num_batches = 0
        for weight, _, _ in self.table:
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_()

    def add(self, hidden: Tensor, batch: Tensor) -> None:
        num_targets = batch[:, 1:].numel()
        loss = next_token_loss(hidden, self.teacher.get_output_embeddings().weight, batch)
        # Of the summed loss: a mean's gradients could underflow in half precision.
        gradients = torch.autograd.grad(loss, [weight for weight, _, _ in self.table])
        products = (
            (_wide(gradient) * weight.detach(), layout, layer)
            for gradient, (weight, layout, layer) in zip(gradients, self.table, strict=True)
        )
        sums = _sums_of_units(products, self.sizes, self.teacher.device)
        for axis, total in self.totals.items():
            total += sums[axis].abs() / num_targets
        self.num_batches += 1

    def scores(self) -> Scores:
        means = {axis: total / self.num_batches for axis, total in self.totals.items()}
        return {**means, "layers": means["kv_groups"].sum(dim=1) + means["mlp"].sum(dim=1)}


def _table(teacher: PreTrainedModel) -> Iterator[Weight]:
    """Every weight of a teacher; a tied matrix once, as the family's table names it once."""
    architecture = Architecture.of(teacher.config)
    for pattern, layout in architecture.layouts.items():
        in_layers = range(architecture.sizes["layers"]) if "{i}" in pattern else (None,)
        for layer in in_layers:
            yield teacher.get_parameter(pattern.format(i=layer)), layout, layer


def _sums_of_units(
    values: Iterable[tuple[Tensor, str, int | None]], sizes: Sizes, device: torch.device
) -> dict[str, Tensor]:
    """Sum tensors like weights, with their layouts and layers, over each unit and each layer."""
    totals = _zeros_of_units(sizes, device)
    for tensor, layout, layer in values:
        for block, of_block in unstack(tensor, layout, sizes):
            parts = [part for dimension in parse_layout(of_block) for part in dimension]
            for axis in UNIT_AXES:
                if axis in parts:
                    total = totals[axis] if axis in GLOBAL_AXES else totals[axis][layer]
                    total += _sum_but({axis}, block, parts, sizes)
        if layer is not None:
            totals["layers"][layer] += tensor.sum()
    return totals


def _zeros_of_units(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    axes = {axis: (axis,) if axis in GLOBAL_AXES else ("layers", axis) for axis in UNIT_AXES}
    shapes = {"layers": ("layers",), **axes}
    return {axis: _zeros([sizes[part] for part in shape], device) for axis, shape in shapes.items()}


def _zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    """Zeros to add to, in float64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def _sum_but(
    kept: Collection[str], values: Tensor, parts: Sequence[str | int], sizes: Sizes
) -> Tensor:
    """Sum values, whose dimensions are made of `parts`, over all of these but the kept ones."""
    values = values.reshape([part if isinstance(part, int) else sizes[part] for part in parts])
    others = [position for position, part in enumerate(parts) if part not in kept]
    return values.sum(dim=others) if others else values


def _wide(values: Tensor) -> Tensor:
    """Values without their history, half precisions as float32."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
