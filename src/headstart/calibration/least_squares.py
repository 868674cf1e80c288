"""Least squares: kept weights are re-solved so that outputs come closest to the teacher's.

A linear layer whose inputs are cut gives W x on kept and removed units alike. The student has the
kept ones, x_S, alone. Kept and removed activations are correlated, so a regression recovers part of
the removed ones, x_R. With G the inputs' second moment over calibration text, the best linear guess
is G_RS G_SS^-1 x_S, so the kept columns become

    W_S + W_R G_RS (G_SS + ridge)^-1.

The ridge shrinks the correction, not the weights: with nothing removed they stay as they are. A
layer with a bias guesses deviations from the mean, and its bias takes the rest. A norm whose
channels are cut divides by the root mean square of the kept ones; its weight is scaled so that
kept channels come out as large as the teacher's.

Source: least squares on kept units as in SlimGPT (arXiv 2412.18110) and ZipLM (arXiv 2302.04089),
both after Optimal Brain Surgeon (Hassibi and Stork, 1993); biases as in FLAP (arXiv 2312.11983).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headstart.calibration.moments import (
    ROWS_AT_ONCE,
    Statistics,
    has_bias,
    rms_norms_of,
    sources_of,
)
from headstart.calibration.share import ALONE, Share
from headstart.model.architecture import Architecture
from headstart.model.axes import kept_indices, shape_of
from headstart.model.spec import SubnetSpec

RIDGE = 1e-3
"""Of the kept units' mean square. On the demo's teacher anything from 1e-5 to 1e-2 did as well."""


@torch.no_grad()
def refitted(
    tensors: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    spec: SubnetSpec,
    statistics: Statistics,
    ridge: float = RIDGE,
    share: Share = ALONE,
) -> Iterator[tuple[str, Tensor]]:
    """Change a teacher's tensors, still whole, for the sub-network that will be cut out of them.

    Every linear layer with removed inputs is refitted, unless its weight is the input embedding
    too; so is the weight of every RMSNorm with removed channels. All other tensors, and the parts
    that will be cut away, are as they were.

    Args:
        tensors: (name, tensor) pairs of the whole teacher, in any order.
        architecture: the teacher's.
        spec: what will be kept.
        statistics: of the teacher's activations.
        ridge: added to the diagonal of the kept units' second moment, relative to its mean.
        share: this process' part, where several refit the same student; the layers that it does not
            solve for stay as they are. What is outside the layers counts as one more.

    Raises:
        UserError: a tensor matches no rule.
    """
    layouts, sizes, family = architecture.layouts, architecture.sizes, architecture.family
    sources, rms_norms = sources_of(architecture), rms_norms_of(architecture)
    positions = {layer: position for position, layer in enumerate(spec.layers)}
    waiting: dict[str, dict[str, Tensor]] = {}  # weights and biases, each for its partner
    for name, tensor in tensors:
        rule, layer = architecture.match(name)
        stem, _, kind = name.rpartition(".")
        pattern = f"{rule.pattern.rpartition('.')[0]}.weight"
        position = len(positions) if layer is None else positions.get(layer)
        is_refitted = pattern in sources or rule.pattern in rms_norms
        if position is None or not is_refitted or not share.has(position):
            yield name, tensor
            continue
        kept = {"embed": spec.embed} if layer is None else spec.kept_in_layer(position)
        rows, *units = kept_indices(layouts[pattern], sizes, kept)
        if pattern in rms_norms:
            held = statistics.share(pattern.format(i=layer))
            yield name, _rescaled_norm(tensor, held, rows, family.norm_offset)
            continue
        parts = waiting.setdefault(stem, {})
        parts[kind] = tensor
        is_biased = has_bias(pattern, architecture)
        if len(parts) < 1 + is_biased:
            continue
        source = sources[pattern].format(i=layer)
        if len(units[0]) < shape_of(layouts[pattern], sizes)[1]:
            gram, mean = statistics.gram(source), statistics.mean(source) if is_biased else None
            parts = _refitted(parts, gram, mean, rows, units[0], ridge)
        yield from ((f"{stem}.{kind}", part) for kind, part in parts.items())
        del waiting[stem], parts
    for stem, parts in waiting.items():
        yield from ((f"{stem}.{kind}", part) for kind, part in parts.items())


def _rescaled_norm(
    weight: Float[Tensor, " units"],
    share: Float[Tensor, " units"],
    kept: Int[Tensor, " kept"],
    offset: float,
) -> Float[Tensor, " units"]:
    """A norm's weight, times the root mean square of its kept channels over that of all."""
    if len(kept) == len(weight):
        return weight
    scale: float = (share[kept].mean() / share.mean()).sqrt().item()
    return (weight + offset) * scale - offset


def _refitted(
    parts: Mapping[str, Tensor],
    gram: Float[Tensor, "units units"],
    mean: Float[Tensor, " units"] | None,
    rows: Int[Tensor, " kept_rows"],
    kept: Int[Tensor, " kept"],
    ridge: float,
) -> dict[str, Tensor]:
    """A linear layer's weight, and its bias if it has one, with the kept part refitted.

    `gram` and, where there is a bias, `mean` are moments of its inputs; `rows` are the outputs and
    `kept` the inputs that are kept.
    """
    weight = parts["weight"]
    gram, rows, kept = (tensor.to(weight.device) for tensor in (gram, rows, kept))
    if mean is not None:
        mean = mean.to(weight.device)
        gram = gram - torch.outer(mean, mean)
    is_removed = torch.ones(len(gram), dtype=torch.bool, device=weight.device)
    is_removed[kept] = False
    among_kept = gram[kept][:, kept]
    diagonal = among_kept.diagonal()  # a view
    diagonal += max(ridge * diagonal.mean().item(), torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky(among_kept)
    guess = torch.cholesky_solve(gram[kept][:, is_removed], factor).T
    result = {kind: part.clone() for kind, part in parts.items()}
    for some in rows.split(ROWS_AT_ONCE):  # type: ignore[no-untyped-call]
        wanted = weight[some].to(gram.dtype)
        fitted = wanted[:, kept] + wanted[:, is_removed] @ guess
        result["weight"][some[:, None], kept] = fitted.to(weight.dtype)
        if mean is not None:
            shift = wanted @ mean - fitted @ mean[kept]
            result["bias"][some] += shift.to(weight.dtype)
    return result
