"""The axis orders of a search: measured once, and kept in the run folder.

Scores in the journal belong to ranks, and ranks mean nothing without their orders. Measured again
on a machine with other arithmetic, orders may differ.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.calibration.layer_by_layer import batches_of
from headstart.calibration.start import ROTATED
from headstart.model.architecture import Architecture
from headstart.model.spec import Indices
from headstart.searching.candidate import Orders
from headstart.searching.importance import (
    DepthImportance,
    Importance,
    UnitImportance,
    measure_importance,
    remembered_importance,
)
from headstart.searching.settings import SearchSettings
from headstart.system.distributed import from_main
from headstart.system.files import write_whole
from headstart.system.progress import progress
from headstart.text.blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORDERS = "orders.json"
"""In a run folder."""


def kept_orders(folder: Path) -> Orders | None:
    """The orders that a run has measured, if it has; for every process."""

    def read() -> Orders | None:
        try:
            return Orders.from_json(json.loads((folder / ORDERS).read_text()))
        except FileNotFoundError:
            return None

    return from_main(read)


def keep_orders(folder: Path, orders: Orders) -> None:
    """Write the orders of a run; the main process calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ORDERS, json.dumps(orders.to_json()) + "\n")


def measured_kinds(settings: SearchSettings) -> tuple[UnitImportance, DepthImportance] | None:
    """The kinds of importance that a search measures; None where it takes the teacher's orders."""
    if settings.order == settings.layer_order == "teacher":
        return None
    units: UnitImportance = "magnitude" if settings.order == "teacher" else settings.order
    depth: DepthImportance = (
        "magnitude" if settings.layer_order == "teacher" else settings.layer_order
    )
    return units, depth


def measure_orders(
    model: PreTrainedModel, settings: SearchSettings, text: TokenBlocks, identity: dict[str, Any]
) -> Orders:
    """The axis orders that a search's settings ask for; importance is remembered.

    Args:
        model: the teacher that is cut, rotated already if it is to be.
        settings: of the search.
        text: whose training split is read.
        identity: hashes of teacher and text.
    """
    teacher = Architecture.of(model.config)
    orders = Orders.of_teacher(teacher.sizes)
    period = teacher.layer_period if settings.grid.layer_periods else 1
    kinds = measured_kinds(settings)
    if kinds is None:
        return replace(orders, layers=by_periods(orders.layers, period))
    calibration = text.sample("train", settings.calibration_tokens)
    key = {
        **identity,
        "kinds": kinds,
        "tokens": calibration.numel(),
        "dtype": str(model.dtype),
        "init": settings.init,
    }

    def measure() -> Importance:
        with progress("calibrate", calibration.numel(), "tokens") as advance:
            return measure_importance(model, batches_of(calibration), *kinds, advance)

    found = from_main(lambda: remembered_importance(key, measure)).orders()
    by_units = orders if settings.order == "teacher" else found
    by_depth = orders if settings.layer_order == "teacher" else found
    # Channels of a rotated teacher have an order already.
    embed = (orders if settings.init == ROTATED else by_units).embed
    layers = by_periods(by_depth.layers, period)
    return Orders(layers, embed, by_units.kv_groups, by_units.mlp)


def by_periods(order: Indices, period: int) -> Indices:
    """An order of layers in which whole periods stay together, those of the best mean rank first.

    Layers after the last whole period come last.

    >>> by_periods((6, 2, 3, 1, 0, 5, 4), 2)
    (2, 3, 0, 1, 4, 5, 6)
    """
    ranks = {layer: rank for rank, layer in enumerate(order)}
    num_periods = len(order) // period
    periods = [range(first, first + period) for first in range(0, num_periods * period, period)]
    periods.sort(key=lambda layers: sum(ranks[layer] for layer in layers))
    rest = [layer for layer in order if layer >= num_periods * period]
    return (*chain.from_iterable(periods), *rest)
