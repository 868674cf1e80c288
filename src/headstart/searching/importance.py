"""One score per unit of every searched axis, from one calibration pass over the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headstart.searching.candidate import Orders
from headstart.searching.scores import (
    UNIT_AXES,
    Activation,
    BlockInfluence,
    Contribution,
    Observer,
    Scores,
    Taylor,
    magnitude,
)
from headstart.system.errors import UserError
from headstart.system.hashing import hash_tensors
from headstart.system.memo import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UnitImportance = Literal["activation", "contribution", "magnitude", "taylor"]
DepthImportance = Literal["block_influence", "magnitude", "taylor"]

VERSION = 2
"""Of what the memo keeps; raise it when an equal key would give other scores."""

OBSERVERS: Mapping[str, type[Observer]] = {
    "activation": Activation,
    "contribution": Contribution,
    "block_influence": BlockInfluence,
    "taylor": Taylor,
}
"""The kinds that need text; "magnitude" needs none."""


@dataclass(frozen=True)
class Importance:
    """Scores of a teacher's units; higher is more important.

    What a score is depends on the kind; see `Activation`, `Contribution`, `BlockInfluence`,
    `magnitude` and `Taylor`.

    Attributes:
        layers: of each layer.
        embed: of each channel of the residual stream.
        kv_groups: of each key/value group with its query heads, for each layer.
        mlp: of each neuron, for each layer.
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


def measure_importance(
    teacher: PreTrainedModel,
    batches: Iterable[Int[Tensor, "batch tokens"]],
    units: UnitImportance = "activation",
    depth: DepthImportance = "block_influence",
    on_batch: Callable[[int], None] = lambda num_tokens: None,
) -> Importance:
    """Score every unit of a teacher, in one pass over the text whatever is asked.

    Args:
        teacher: the whole teacher, in eval mode; it is left as it was.
        batches: calibration token ids; untouched when both kinds are "magnitude".
        units: what scores channels, groups and neurons: mean |activation|, what they add to
            the output of linear layers, the norm of their weights, or the first-order change of the
            loss without them.
        depth: what scores layers: how much they turn a token, the norm of their weights, or the
            Taylor scores of their groups and neurons.
        on_batch: called with the tokens of each batch done, for progress.

    Raises:
        UserError: a kind needs text and there is no batch.

    Source: see the classes of `headstart.searching.scores`.
    """
    scores: dict[str, Scores] = {}
    observers: dict[str, Observer] = {}
    num_tokens = 0
    with ExitStack() as undo:
        for kind in dict.fromkeys((units, depth)):
            if kind == "magnitude":
                scores[kind] = magnitude(teacher)
            else:
                observers[kind] = OBSERVERS[kind](teacher, undo)
        if observers:
            undo.enter_context(torch.set_grad_enabled("taylor" in observers))
            for batch in batches:
                batch = batch.to(teacher.device, non_blocking=True)
                hidden = teacher.base_model(batch, use_cache=False).last_hidden_state
                for observer in observers.values():
                    observer.add(hidden, batch)
                num_tokens += batch.numel()
                on_batch(batch.numel())
            if num_tokens == 0:
                raise UserError(
                    "importance needs at least one calibration block; add text to the data"
                )
        scores |= {kind: observer.scores() for kind, observer in observers.items()}
    return Importance(
        layers=scores[depth]["layers"].float().cpu(),
        **{axis: scores[units][axis].float().cpu() for axis in UNIT_AXES},
    )


def remembered_importance(key: Mapping[str, Any], measure: Callable[[], Importance]) -> Importance:
    """What `measure` returns, or returned before with an equal key.

    Args:
        key: all that the scores depend on, as JSON: teacher, text, tokens, kinds and precision.
        measure: called when nothing is remembered, or it is not whole.
    """
    return remembered(
        "importance",
        VERSION,
        key,
        make=lambda folder: _write(measure(), folder / "scores.safetensors"),
        read=lambda folder: _read_scores(folder / "scores.safetensors"),
    )


def _write(importance: Importance, file: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in vars(importance).items()}
    # safetensors checks no more than its header.
    save_file(tensors, file, metadata={"hash": hash_tensors(sorted(tensors.items()))})


def _read_scores(file: Path) -> Importance:
    """The scores in a file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file") from error
    if metadata != {"hash": hash_tensors(sorted(tensors.items()))}:
        raise ValueError(f"{file} holds other numbers than were written")
    return Importance(**tensors)
