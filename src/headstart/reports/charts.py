"""The charts of the pages, each a plain dict for plotly.js.

The colours of text and grid are left out here: `script.js` takes them from the style's variables,
so that charts follow the reader's light or dark mode. Where a chart has `views`, buttons above it
switch between them: each holds what `Plotly.update` is called with, a change of the traces and one
of the layout.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from headstart.reports.candidates import (
    Candidate,
    Search,
    amount_of,
    fitness_text,
    front_of,
    loss_of,
    measure_text,
    raced_out,
)
from headstart.reports.table import Result, size_text

Figure = dict[str, Any]

# Mid-tones, each with enough contrast on the page's white and on its near-black.
GREY = "#858d9a"
_COLOURS = ("#3f86e0", "#e5732e", "#22a06b", "#b067d9", "#d6506e", "#1f9eb5", "#b08a1e")
_GENERATIONS = [[0, "#7f93b5"], [0.5, "#a873b8"], [1, "#e5732e"]]
ACCENT = "#22a06b"


def arm_colours(result: Result) -> dict[str, str]:
    """One colour per arm, the same in every table and chart; the reference is grey."""
    names = [arm["name"] for arm in result["arms"]]
    others = [name for name in names if name != result["reference"]]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    return {name: colours.get(name, GREY) for name in names}


def plotly_text(text: str) -> str:
    """Text as plotly shows it: it reads a few tags, and knows no entity for quotes."""
    return html.escape(text, quote=False)


def chart_layout(x_title: str, y_title: str, x_axis: Figure, **more: Any) -> Figure:
    """The look of every chart; `x_axis` adds to plotly's layout of that axis, `more` to it all."""
    small = {"size": 13}
    axis = {"zeroline": False, "automargin": True, "ticks": ""}
    title = {"text": x_title, "standoff": 12, "font": small}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 13},
        "margin": {"l": 48, "r": 16, "t": 16, "b": 48},
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": {**axis, "showline": True, "showgrid": False, "title": title, **x_axis},
        "yaxis": {**axis, "title": {"text": y_title, "standoff": 8, "font": small}},
        **more,
    }


def loss_charts(result: Result) -> dict[str, Figure]:
    """Each arm's loss against what it cost, and with several budgets what was saved at each."""
    several = len(result["arms"][0]["budgets"]) > 1
    factors = {"factor-budget": _factor_chart(result)} if several else {}
    return factors | {
        "loss-tokens": _loss_chart(result, "tokens", "training tokens", "B"),
        "loss-flops": _loss_chart(result, "flops", "FLOPs spent, all costs counted", "power"),
    }


def _loss_chart(result: Result, key: str, title: str, exponent: str) -> Figure:
    unit = {"tokens": "%{x:,} tokens", "flops": "%{x:.3e} FLOPs"}[key]
    colours = arm_colours(result)
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plotly_text(arm["name"]),
            "x": [point[key] for point in _compared_points(arm)],
            "y": [point["loss"] for point in _compared_points(arm)],
            "line": {"color": colours[arm["name"]], "width": 2},
            "marker": {"size": 5},
            "hovertemplate": f"%{{fullData.name}}<br>{unit}<br>%{{y:.3f}} nats<extra></extra>",
        }
        for arm in result["arms"]
    ]
    more: Figure = {}
    target = result["target_loss"]
    if target is not None:
        across = {"xref": "paper", "x0": 0, "x1": 1, "y0": target, "y1": target}
        line = {"color": GREY, "width": 1.5, "dash": "dash"}
        more["shapes"] = [{"type": "line", "layer": "below", "line": line, **across}]
        place = {"xref": "paper", "x": 1, "xanchor": "right", "y": target, "yanchor": "top"}
        name = plotly_text(result["reference"])
        label = {"text": f"{name}’s final loss {target:.3f}", "font": {"size": 12}}
        more["annotations"] = [{**label, **place, "showarrow": False}]
    x_axis = {"exponentformat": exponent, "rangemode": "tozero"}
    return {
        "data": data,
        "layout": chart_layout(
            title, f"{result['compared_on']} loss (nats per token)", x_axis, **more
        ),
        "views": _scales([trace["x"] for trace in data]),
    }


def _compared_points(arm: Result) -> list[Result]:
    """The points of an arm's own curve, or what its budgets end with if there are several."""
    budgets: list[Result] = arm["budgets"]
    curve: list[Result] = arm["curve"]
    return budgets if len(budgets) > 1 else curve


def _factor_chart(result: Result) -> Figure:
    """How many times fewer tokens, and FLOPs, each arm needs than the reference at every budget."""
    colours, data = arm_colours(result), list[Figure]()
    for arm in result["arms"]:
        if arm["init"] == "random":
            continue
        for unit, dash in (("tokens", "solid"), ("flops", "dot")):
            name = "tokens" if unit == "tokens" else "FLOPs"
            symbols = ["circle-open" if match["is_bound"] else "circle" for match in arm["matches"]]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{plotly_text(arm['name'])}, {name}",
                    "x": [match["tokens"] for match in arm["matches"]],
                    "y": [match[f"{unit}_factor"] for match in arm["matches"]],
                    "line": {"color": colours[arm["name"]], "width": 2, "dash": dash},
                    "marker": {"size": 7, "symbol": symbols},
                    "hovertemplate": "%{fullData.name}<br>%{x:,} tokens<br>"
                    "%{y:.2f}x fewer<extra></extra>",
                }
            )
    axis = {"type": "log", "exponentformat": "SI", "dtick": "D2"}
    across = {"xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1}
    line = {"color": GREY, "width": 1.5, "dash": "dash"}
    shapes = [{"type": "line", "layer": "below", "line": line, **across}]
    layout = chart_layout("training tokens of the budget", "times fewer", axis, shapes=shapes)
    layout["yaxis"] |= {"type": "log"}
    return {"data": data, "layout": layout}


def _scales(columns: list[list[float]]) -> Figure:
    """A linear and a logarithmic view of a chart whose traces have these x."""
    # plotly would draw a line in from the edge for a point at 0, so the log scale drops it.
    positive = [[at if at > 0 else None for at in column] for column in columns]
    linear = {"xaxis.type": "linear", "xaxis.tickmode": "auto", "xaxis.dtick": None}
    log = {"xaxis.type": "log", "xaxis.tickmode": "linear", "xaxis.dtick": "D2"}
    return {
        "linear": [{"x": columns}, {**linear, "xaxis.autorange": True}],
        "log": [{"x": positive}, {**log, "xaxis.autorange": True}],
    }


def search_charts(search: Search) -> dict[str, Figure]:
    """Each candidate's loss against its size, and in the order of scoring."""
    return {"search-size": _size_chart(search), "search-order": _order_chart(search)}


def _size_chart(search: Search) -> Figure:
    candidates = search["candidates"]
    amounts = [amount_of(candidate) for candidate in candidates]
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
        "opacity": [0.2 if dropped else 0.8 for dropped in raced_out(search)],
        "color": generations,
        "colorscale": _GENERATIONS,
        "colorbar": bar,
    }
    low, high = search["bin"]
    band = {"type": "rect", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
    band |= {"layer": "below", "line": {"width": 0}, "fillcolor": "rgba(133,141,154,0.14)"}
    margin = 0.08 * (high - low)
    exponent = "B" if measure_text(search) == "parameters" else "SI"
    axis = {"exponentformat": exponent, "nticks": 5, "range": [low - margin, high + margin]}
    traces = [points]
    if front := front_of(search):
        x, y = [amount_of(candidate) for candidate in front], [loss_of(best) for best in front]
        traces.append(_step_line(x, y, {"color": GREY, "width": 1}))
    return {
        "data": [*traces, _winner_ring(search, amounts)],
        "layout": chart_layout(measure_text(search), _loss_title(search), axis, shapes=[band]),
    }


def _order_chart(search: Search) -> Figure:
    candidates, dropped = search["candidates"], raced_out(search)
    order: list[float] = [*range(1, len(candidates) + 1)]
    points = _points(search, order)
    opacity = [0.18 if out else 0.55 for out in dropped]
    points["marker"] = {"size": 5, "opacity": opacity, "color": GREY}
    losses = [
        math.inf if out else loss_of(candidate)
        for candidate, out in zip(candidates, dropped, strict=True)
    ]
    best = _finite(list(accumulate(losses, min)))
    best_line = _step_line(order, best, {"color": ACCENT, "width": 2})
    title = "candidates scored"
    figure: Figure = {
        "data": [points, best_line, _winner_ring(search, order)],
        "layout": chart_layout(title, _loss_title(search), {"exponentformat": "B"}),
    }
    if all("tokens" in candidate for candidate in candidates):
        tokens: list[float] = list(accumulate(candidate["tokens"] for candidate in candidates))
        figure["views"] = {
            "candidates": _order_view(search, order, title),
            "tokens": _order_view(search, tokens, "tokens evaluated"),
        }
    return figure


def _order_view(search: Search, x: list[float], title: str) -> list[Figure]:
    traces = {"x": [x, x, [x[search["winner"]]]]}
    return [traces, {"xaxis.title.text": title, "xaxis.autorange": True}]


def _loss_title(search: Search) -> str:
    return f"{fitness_text(search)}, untrained (nats per token)"


def _points(search: Search, x: list[float]) -> Figure:
    candidates = search["candidates"]
    return _trace(
        "markers",
        x,
        _finite([loss_of(candidate) for candidate in candidates]),
        text=[_hover_text(search, candidate) for candidate in candidates],
        hovertemplate="%{y:.3f} nats<br>%{text}<extra></extra>",
    )


def _hover_text(search: Search, candidate: Candidate) -> str:
    lines = [
        f"generation {candidate['generation'] + 1}, {candidate['origin']}",
        f"{candidate['parameters']:,} parameters",
        ", ".join(f"{axis} {size_text(size)}" for axis, size in candidate["sizes"].items()),
    ]
    if measure_text(search) != "parameters":
        lines.insert(2, f"{amount_of(candidate):,} {measure_text(search)}")
    if "tokens" in candidate:
        lines.append(f"on {candidate['tokens']:,} tokens")
    return "<br>".join(map(plotly_text, lines))


def _step_line(x: Sequence[float], y: Sequence[float | None], line: Figure) -> Figure:
    return _trace("lines", x, y, line={**line, "shape": "hv"}, hoverinfo="skip")


def _winner_ring(search: Search, x: Sequence[float]) -> Figure:
    winner = search["winner"]
    ring = {"symbol": "circle-open", "size": 15, "color": ACCENT, "line": {"width": 2.5}}
    loss = search["candidates"][winner]["loss"]
    return _trace("markers", [x[winner]], [loss], marker=ring, hoverinfo="skip")


def _trace(mode: str, x: Sequence[float], y: Sequence[float | None], **more: Any) -> Figure:
    return {"type": "scatter", "mode": mode, "x": x, "y": y, **more}


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
