"""What a page shows of a search: its candidates, what the winner keeps, and the ten best.

The section stands in the report of a run and, for a search on its own, on a page by itself. It is
made of the `search` object that docs/result.md documents, with `bin` and `teacher` in it.
"""

import html
import math
from itertools import accumulate
from pathlib import Path

from headstart.files import write_whole
from headstart.report_page import (
    GREY,
    Figure,
    Result,
    chart_block,
    chart_layout,
    count_text,
    duration_text,
    page,
    plotly_text,
    section,
    settings_block,
    size_text,
    table,
)
from headstart.subnet.spec import Indices, SubnetSpec

NUM_BEST = 10
MEASURES = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs per token",
    "kv_cache_bytes_per_token": "KV cache bytes per token",
    "weight_bytes": "bytes of weights",
}
_FITNESS = {"loss": "loss", "kl": "divergence from the teacher"}
_NOTHING = "–"
# Mid-tones, as all colours of a page.
_GENERATIONS = [[0, "#7f93b5"], [0.5, "#a873b8"], [1, "#e5732e"]]
_WINNER = "#22a06b"


def write_search_html(search: Result, path: Path) -> None:
    """Writes the page of a search on its own as one HTML file that needs no network.

    Args:
        search: the content of `search.json`.
        path: the file to write; it appears whole or not at all.
    """
    charts = search_charts(search)
    sections = [search_section(search, charts)]
    if "settings" in search:
        sections.append(section("Settings", settings_block(search["settings"])))
    title = f"search in {search['teacher']['name']}"
    write_whole(path, page(title, _header(search), sections, charts))


def _header(search: Result) -> str:
    low, high = search["bin"]
    winner = search["candidates"][search["winner"]]
    found = (
        f"{count_text(search['parameters'])} parameters at a {_fitness(search)} of "
        f"{search['loss']:.3f} nats before training: "
        f"the best of {len(search['candidates']):,} candidates"
    )
    lead = ""
    if "trained_loss" in winner:
        lead = f"A short training takes it to {_nats(_loss(winner, 'trained_loss'))} nats."
    facts = (
        f"{count_text(low)} to {count_text(high)} {_measure(search)} · "
        f"{search['search_tokens']:,} tokens in {duration_text(search['search_seconds'])}"
    )
    return f"""<p class="eyebrow">headstart search · {html.escape(search["teacher"]["name"])}</p>
<h1>{html.escape(found)}</h1>
<p class="lead">{lead}</p>
<p class="meta">{html.escape(facts)}</p>
"""


def search_section(search: Result, charts: dict[str, Figure]) -> str:
    """The section of a page; `charts` are those of `search_charts`."""
    candidates = search["candidates"]
    facts = (
        f"{len(candidates):,} candidates of the {search['space']} space were scored "
        f"without training, units read in {search['order']} order."
    )
    if num_raced_out := _raced_out(candidates).count(True):
        facts += f" {num_raced_out:,} paler ones were raced out: dropped after fewer tokens."
    band = "The band is the bin; the ring marks the winner."
    if _front(search):
        band += " The thin line is the Pareto front."
    order = "Each point is one candidate; the line is the best so far."
    blocks = chart_block("search-size", charts["search-size"], band)
    blocks += chart_block("search-order", charts["search-order"], order)
    body = f'<p class="note">{html.escape(facts)}</p>\n<div class="pair">\n{blocks}</div>\n'
    return section("Search", body + _kept(search) + _best_candidates(search))


def search_charts(search: Result) -> dict[str, Figure]:
    """The charts of the section by the id of the element they are drawn in."""
    return {"search-size": _size_chart(search), "search-order": _order_chart(search)}


def _fitness(search: Result) -> str:
    return _FITNESS[search.get("fitness", "loss")]


def _measure(search: Result) -> str:
    return MEASURES[search.get("measure", "parameters")]


def _amount(candidate: Result) -> float:
    amount: float = candidate["amount" if "amount" in candidate else "parameters"]
    return amount


def _loss(candidate: Result, key: str = "loss") -> float:
    """A candidate's loss; infinite without one or where it is no number, which JSON has as null."""
    loss: float | None = candidate.get(key)
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _raced_out(candidates: list[Result]) -> list[bool]:
    """For each candidate, whether its loss was taken on fewer tokens than that of others."""
    most = max(candidate.get("tokens", 0) for candidate in candidates)
    return [candidate.get("tokens", most) < most for candidate in candidates]


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _size_chart(search: Result) -> Figure:
    candidates = search["candidates"]
    amounts = [_amount(candidate) for candidate in candidates]
    generations = [candidate["generation"] + 1 for candidate in candidates]
    bar = {
        "title": {"text": "generation", "side": "right", "font": {"size": 13}},
        "thickness": 8,
        "outlinewidth": 0,
        "nticks": min(6, max(generations)),
    }
    points = _points(search, amounts)
    points["marker"] = {
        "size": 7,
        "opacity": [0.2 if raced_out else 0.8 for raced_out in _raced_out(candidates)],
        "color": generations,
        "colorscale": _GENERATIONS,
        "colorbar": bar,
    }
    low, high = search["bin"]
    band = {"type": "rect", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
    band |= {"layer": "below", "line": {"width": 0}, "fillcolor": "rgba(133,141,154,0.14)"}
    margin = 0.08 * (high - low)
    exponent = "B" if _measure(search) == "parameters" else "SI"
    axis = {"exponentformat": exponent, "nticks": 5, "range": [low - margin, high + margin]}
    layout = chart_layout(_measure(search), _loss_title(search), xaxis=axis, shapes=[band])
    return {"data": [points, *_front(search), _winner_ring(search, amounts)], "layout": layout}


def _order_chart(search: Result) -> Figure:
    candidates = search["candidates"]
    raced_out = _raced_out(candidates)
    order: list[float] = [*range(1, len(candidates) + 1)]
    points = _points(search, order)
    opacity = [0.18 if out else 0.55 for out in raced_out]
    points["marker"] = {"size": 5, "opacity": opacity, "color": GREY}
    losses = [
        math.inf if out else _loss(candidate)
        for candidate, out in zip(candidates, raced_out, strict=True)
    ]
    best = {
        "type": "scatter",
        "mode": "lines",
        "x": order,
        "y": _finite(list(accumulate(losses, min))),
        "line": {"color": _WINNER, "width": 2, "shape": "hv"},
        "hoverinfo": "skip",
    }
    title = "candidates scored"
    figure: Figure = {
        "data": [points, best, _winner_ring(search, order)],
        "layout": chart_layout(title, _loss_title(search), xaxis={"exponentformat": "B"}),
    }
    if all("tokens" in candidate for candidate in candidates):
        tokens: list[float] = list(accumulate(candidate["tokens"] for candidate in candidates))
        figure["views"] = {
            "candidates": _order_view(search, order, title),
            "tokens": _order_view(search, tokens, "tokens evaluated"),
        }
    return figure


def _order_view(search: Result, x: list[float], title: str) -> list[Figure]:
    traces = {"x": [x, x, [x[search["winner"]]]]}
    return [traces, {"xaxis.title.text": title, "xaxis.autorange": True}]


def _loss_title(search: Result) -> str:
    return f"{_fitness(search)}, untrained (nats per token)"


def _points(search: Result, x: list[float]) -> Figure:
    candidates = search["candidates"]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": _finite([_loss(candidate) for candidate in candidates]),
        "text": [_hover_text(search, candidate) for candidate in candidates],
        "hovertemplate": "%{y:.3f} nats<br>%{text}<extra></extra>",
    }


def _hover_text(search: Result, candidate: Result) -> str:
    lines = [
        f"generation {candidate['generation'] + 1}, {candidate['origin']}",
        f"{candidate['parameters']:,} parameters",
        ", ".join(f"{key} {size_text(size)}" for key, size in candidate["sizes"].items()),
    ]
    if _measure(search) != "parameters":
        lines.insert(2, f"{_amount(candidate):,} {_measure(search)}")
    if "tokens" in candidate:
        lines.append(f"on {candidate['tokens']:,} tokens")
    return "<br>".join(map(plotly_text, lines))


def _front(search: Result) -> list[Figure]:
    """The Pareto front as a step line: the lowest loss of what is at most so large."""
    front = [search["candidates"][index] for index in search.get("front") or []]
    front = sorted(front, key=lambda candidate: (_amount(candidate), _loss(candidate)))
    losses = [_loss(candidate) for candidate in front]
    # A front in another measure than the bin's does not fall along it, and a line would mislead.
    if not front or losses != sorted(losses, reverse=True):
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [_amount(candidate) for candidate in front],
            "y": losses,
            "line": {"color": GREY, "width": 1, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]


def _winner_ring(search: Result, x: list[float]) -> Figure:
    winner = search["winner"]
    ring = {"symbol": "circle-open", "size": 15, "color": _WINNER, "line": {"width": 2.5}}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x[winner]],
        "y": [search["candidates"][winner]["loss"]],
        "marker": ring,
        "hoverinfo": "skip",
    }


def _kept(search: Result) -> str:
    """Which axis shrank where: what the winner keeps of every axis, layer by layer."""
    if "spec" not in search:
        return ""
    spec, sizes = SubnetSpec.from_json(search["spec"]), search["teacher"]["sizes"]
    rows = _bar("depth", len(spec.layers), sizes["layers"])
    rows += _bar("embed", len(spec.embed), sizes["embed"])
    if "head_dim" in sizes:
        kept = sizes["head_dim"] if spec.head_dim is None else len(spec.head_dim)
        rows += _bar("head dim", kept, sizes["head_dim"])
    layers, num_layers = spec.layers, sizes["layers"]
    rows += _layer_cells("kv groups", layers, spec.kv_groups, num_layers, sizes["kv_groups"])
    rows += _layer_cells("mlp", layers, spec.mlp, num_layers, sizes["mlp"])
    ticks = f"<span>layer 0</span><span>layer {num_layers - 1}</span>"
    note = (
        "What the winner keeps of the teacher. A column is one of the teacher’s layers, filled as "
        "far as its units are kept; a dashed outline is a dropped layer."
    )
    rows += f'<p class="note ticks">{ticks}</p>\n<p class="note">{note}</p>\n'
    return f"<h3>Which axis shrank where</h3>\n{rows}"


def _axis_row(name: str, kept: str, drawing: str) -> str:
    label = f'<p><span>{name}</span><span class="note">{kept}</span></p>'
    return f'<div class="axis">{label}\n{drawing}</div>\n'


def _bar(name: str, kept: int, total: int) -> str:
    bar = f'<div class="bar"><div style="width:{100 * kept / total:.1f}%"></div></div>'
    return _axis_row(name, f"{kept:,} of {total:,}", bar)


def _layer_cells(
    name: str, layers: Indices, units: tuple[Indices, ...], num_layers: int, total: int
) -> str:
    """One row of cells, a unit square for each of the teacher's layers, stretched to the page."""
    kept = {layer: len(indices) for layer, indices in zip(layers, units, strict=True)}
    cells = ""
    for layer in range(num_layers):
        place = f'x="{layer + 0.08:.2f}" width="0.84"'
        if layer not in kept:
            title = f"<title>layer {layer}: dropped</title>"
            cells += f'<rect class="dropped" {place} y="0" height="1">{title}</rect>\n'
            continue
        part = kept[layer] / total
        title = f"<title>layer {layer}: {kept[layer]:,} of {total:,} {name}</title>"
        cells += f'<rect class="room" {place} y="0" height="1">{title}</rect>\n'
        cells += (
            f'<rect class="kept" {place} y="{1 - part:.4f}" height="{part:.4f}" '
            f'fill-opacity="{0.4 + 0.6 * part:.3f}">{title}</rect>\n'
        )
    summary = f"{size_text([*kept.values()])} of {total:,} in a kept layer"
    drawing = (
        f'<svg class="layers" viewBox="0 0 {num_layers} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{name}: {summary}">\n{cells}</svg>'
    )
    return _axis_row(name, summary, drawing)


def _best_candidates(search: Result) -> str:
    """A table of the ten best; a loss after training outranks one before, which is no match."""
    candidates, raced_out = search["candidates"], _raced_out(search["candidates"])

    def key(index: int) -> tuple[bool, float, float]:
        candidate = candidates[index]
        return raced_out[index], _loss(candidate, "trained_loss"), _loss(candidate)

    best = sorted(range(len(candidates)), key=key)[:NUM_BEST]
    axes = list(dict.fromkeys(axis for index in best for axis in candidates[index]["sizes"]))
    measured = _measure(search) != "parameters"
    trained = any("trained_loss" in candidates[index] for index in best)
    header = ["rank", "generation", "origin", "parameters"]
    header += [_measure(search)] if measured else []
    header += [_fitness(search), *(["trained"] if trained else [])]
    header += [axis.replace("_", " ") for axis in axes]
    rows = []
    for rank, index in enumerate(best, 1):
        candidate = candidates[index]
        row = [
            f"{rank}, winner" if index == search["winner"] else str(rank),
            str(candidate["generation"] + 1),
            html.escape(candidate["origin"]),
            f"{candidate['parameters']:,}",
        ]
        row += [f"{_amount(candidate):,}"] if measured else []
        row += [_nats(_loss(candidate))]
        row += [_nats(_loss(candidate, "trained_loss"))] if trained else []
        sizes = candidate["sizes"]
        row += [size_text(sizes[axis]) if axis in sizes else _NOTHING for axis in axes]
        rows.append(row)
    note = '<p class="note">Losses after the short training rank first.</p>\n' if trained else ""
    return f"<h3>The best candidates</h3>\n{table(tuple(header), rows)}{note}"


def _nats(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else _NOTHING
