"""What the pages show of a search: its candidates, what the winner keeps, and the ten best.

The section stands in the page of a run and, for a search on its own, on a page by itself. It is
made of the `search` object that docs/result.md documents, with `bin` and `teacher` in it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from headstart.model.spec import Indices, SubnetSpec
from headstart.reports.candidates import (
    Search,
    amount_of,
    best_of,
    fitness_text,
    front_of,
    loss_of,
    measure_text,
    raced_out,
)
from headstart.reports.charts import generation_colour, search_charts
from headstart.reports.render import Row, write_page, yaml_text
from headstart.reports.table import size_text
from headstart.system.formats import NOTHING, count_text, duration_text

NUM_BEST = 10


def write_search_html(search: Search, path: Path) -> None:
    """Write the page of a `search.json` as one HTML file, whole or not at all."""
    write_page(
        path,
        "search.html",
        search_charts(search),
        teacher=search["teacher"]["name"],
        found=_found(search),
        search=section_of(search),
        settings=yaml_text(search["settings"]) if "settings" in search else "",
    )


def _found(search: Search) -> dict[str, str]:
    """What the page's header says of the winner and of the search."""
    low, high = search["bin"]
    winner = search["candidates"][search["winner"]]
    trained = "trained_loss" in winner
    return {
        "parameters": count_text(search["parameters"]),
        "fitness": fitness_text(search),
        "loss": f"{search['loss']:.3f}",
        "trained_loss": _nats(loss_of(winner, "trained_loss")) if trained else "",
        "low": count_text(low),
        "high": count_text(high),
        "measure": measure_text(search),
        "tokens": f"{search['search_tokens']:,}",
        "time": duration_text(search["search_seconds"]),
    }


def section_of(search: Search) -> dict[str, Any]:
    """What `search_section.html` shows, beside the charts."""
    num_raced_out = sum(raced_out(search))
    return {
        "num_candidates": f"{len(search['candidates']):,}",
        "space": search["space"],
        "order": search["order"],
        "num_raced_out": f"{num_raced_out:,}" if num_raced_out else "",
        "generation_colours": ", ".join(map(generation_colour, (0, 0.5, 1))),
        "has_front": bool(front_of(search)),
        "kept": _kept(search) if "spec" in search else None,
        "best": _best(search),
    }


def _kept(search: Search) -> dict[str, Any]:
    """What the winner keeps of every axis: bars, and rows of one cell for each teacher layer."""
    spec, sizes = SubnetSpec.from_json(search["spec"]), search["teacher"]["sizes"]
    bars = [
        _bar("depth", len(spec.layers), sizes["layers"]),
        _bar("embed", len(spec.embed), sizes["embed"]),
    ]
    if "head_dim" in sizes:
        kept = sizes["head_dim"] if spec.head_dim is None else len(spec.head_dim)
        bars.append(_bar("head dim", kept, sizes["head_dim"]))
    rows = [
        _row_of_cells(
            "kv groups", spec.layers, spec.kv_groups, sizes["layers"], sizes["kv_groups"]
        ),
        _row_of_cells("mlp", spec.layers, spec.mlp, sizes["layers"], sizes["mlp"]),
    ]
    return {"num_layers": sizes["layers"], "bars": bars, "rows": rows}


def _bar(name: str, kept: int, total: int) -> dict[str, Any]:
    summary = f"{kept:,} of {total:,}"
    return {"name": name, "summary": summary, "percent": round(100 * kept / total, 1)}


def _row_of_cells(
    name: str, layers: Indices, units: tuple[Indices, ...], num_layers: int, total: int
) -> dict[str, Any]:
    """An axis layer by layer: each cell is filled as far as the layer's units are kept."""
    kept = {layer: len(indices) for layer, indices in zip(layers, units, strict=True)}
    cells: list[dict[str, Any]] = []
    for layer in range(num_layers):
        cell = {"x": round(layer + 0.08, 2), "part": None, "title": f"layer {layer}: dropped"}
        if layer in kept:
            part = kept[layer] / total
            cell["title"] = f"layer {layer}: {kept[layer]:,} of {total:,} {name}"
            cell |= {"part": round(part, 4), "y": round(1 - part, 4)}
            cell["opacity"] = round(0.4 + 0.6 * part, 3)
        cells.append(cell)
    summary = f"{size_text([*kept.values()])} of {total:,} in a kept layer"
    return {"name": name, "summary": summary, "cells": cells}


def _best(search: Search) -> dict[str, Any]:
    """The table of the best candidates."""
    best = [(place, search["candidates"][place]) for place in best_of(search, NUM_BEST)]
    axes = list(dict.fromkeys(axis for _, candidate in best for axis in candidate["sizes"]))
    measured = measure_text(search) != "parameters"
    trained = any("trained_loss" in candidate for _, candidate in best)
    table = []
    for rank, (place, candidate) in enumerate(best, 1):
        cells = {
            "rank": f"{rank}, winner" if place == search["winner"] else str(rank),
            "generation": str(candidate["generation"] + 1),
            "origin": candidate["origin"],
            "parameters": f"{candidate['parameters']:,}",
        }
        if measured:
            cells[measure_text(search)] = f"{amount_of(candidate):,}"
        cells[fitness_text(search)] = _nats(loss_of(candidate))
        if trained:
            cells["last round"] = _nats(loss_of(candidate, "trained_loss"))
        sizes = candidate["sizes"]
        for axis in axes:
            cells[axis.replace("_", " ")] = size_text(sizes[axis]) if axis in sizes else NOTHING
        table.append(cells)
    rows = [Row(heading, cells) for heading, *cells in (cells.values() for cells in table)]
    return {"columns": list(table[0]), "rows": rows, "trained": trained}


def _nats(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else NOTHING
