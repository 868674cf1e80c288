"""What the HTML report is made of: its style, its script, its charts and its drawing.

A chart is a plain dict for plotly.js. Its colours for text and grid are left out here and filled in
by the script from the style's variables, so that charts follow the reader's light or dark mode.
"""

import html
import json
from itertools import accumulate
from typing import Any

Result = dict[str, Any]
Figure = dict[str, Any]

# Mid-tones, each with enough contrast on the page's white and on its near-black.
_SCRATCH_COLOUR = "#858d9a"
_COLOURS = ("#3f86e0", "#e5732e", "#22a06b", "#b067d9", "#d6506e", "#1f9eb5", "#b08a1e")
_GENERATIONS = [[0, "#7f93b5"], [0.5, "#a873b8"], [1, "#e5732e"]]
_WINNER = "#22a06b"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #16191f; --muted: #5d6572;
  --rule: #e3e6eb; --faint: #f5f6f8; --accent: #3f86e0; }
@media (prefers-color-scheme: dark) { :root { --paper: #121418; --ink: #e8eaee;
  --muted: #9ba3b0; --rule: #2b3038; --faint: #1a1d23; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 3.5rem 1.5rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { max-width: 26em; margin: .4rem 0 .8rem; font-size: clamp(1.5rem, 4vw, 2.1rem);
  font-weight: 650; line-height: 1.22; letter-spacing: -.015em; text-wrap: balance; }
h2 { margin: 0 0 .9rem; font-size: 1.1rem; font-weight: 650; }
section { margin-top: 2.6rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
.eyebrow, .meta, .note { margin: 0; color: var(--muted); font-size: .875rem; }
.eyebrow { color: var(--accent); font-weight: 600; }
.lead { margin: 0 0 .8rem; font-size: 1.1rem; }
.note { max-width: 46em; margin: .6rem 0; text-wrap: pretty; }
h1, .lead, dd, code { overflow-wrap: anywhere; }
code, pre { font: .85em/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 0; padding: 1rem 1.2rem; overflow-x: auto; background: var(--faint);
  border-radius: 8px; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 0 .5rem 1.2rem; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child { padding-left: 0; text-align: left; font-weight: 500; }
table.facts { width: auto; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { color: var(--muted); vertical-align: top; }
.arm::before { content: ""; display: inline-block; width: .65em; height: .65em;
  margin-right: .5em; border-radius: 50%; background: var(--arm); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; font-size: .875rem; }
.above { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .5rem 1.5rem; }
.scales { display: flex; gap: .25rem; margin-left: auto; }
.scales button { padding: .15rem .7rem; border: 1px solid var(--rule); border-radius: 99px;
  background: none; color: var(--muted); font: inherit; font-size: .8rem; cursor: pointer; }
.scales button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); }
figure { min-width: 0; margin: 0; }
.chart { height: 380px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem 2.5rem; align-items: start; }
@media (max-width: 44rem) { body { padding: 2rem 1rem 3rem; } .chart { height: 320px; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  .results thead { display: none; }
  .results tr { display: block; padding: .7rem 0; border-bottom: 1px solid var(--rule); }
  .results th, .results td { display: flex; justify-content: space-between; padding: .15rem 0;
    border: 0; }
  .results th { justify-content: flex-start; align-items: baseline; font-weight: 650; }
  .results td::before { content: attr(data-label); color: var(--muted); } }
svg.stacks { display: block; width: 100%; max-width: 26rem; }
.stacks text { fill: var(--muted); font-size: 13px; text-anchor: middle; }
.stacks .dropped { fill: var(--rule); }
.stacks .kept { fill: var(--accent); }
.stacks .path { fill: var(--accent); opacity: .16; }
dt { font-weight: 600; }
dd { max-width: 46em; margin: 0 0 .8rem; color: var(--muted); }
"""

SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
const theme = () => {
  const style = getComputedStyle(document.documentElement);
  const [ink, rule, paper] = ['--muted', '--rule', '--paper'].map(
    name => style.getPropertyValue(name).trim());
  const colours = {'font.color': ink, 'hoverlabel.bgcolor': paper, 'hoverlabel.bordercolor': rule};
  for (const axis of ['xaxis', 'yaxis'])
    Object.assign(colours, {[axis + '.gridcolor']: rule, [axis + '.linecolor']: rule});
  return colours;
};
const drawn = Promise.all(Object.entries(charts).map(([id, figure]) => Plotly.newPlot(id,
  structuredClone(figure.data),
  // A finger scrolls the page; a mouse zooms the chart.
  {...figure.layout, dragmode: matchMedia('(pointer: coarse)').matches ? false : 'zoom'},
  {displayModeBar: false, responsive: true})));
const recolour = () => Object.keys(charts).forEach(id => Plotly.relayout(id, theme()));
drawn.then(recolour);
dark.addEventListener('change', recolour);
for (const button of document.querySelectorAll('.scales button'))
  button.addEventListener('click', () => {
    for (const other of button.parentElement.children)
      other.setAttribute('aria-pressed', other === button);
    const {chart, scale} = button.dataset, log = scale === 'log';
    // plotly would draw a line in from the edge for a point at 0, so the log scale drops it.
    const x = charts[chart].data.map(trace => trace.x.map(at => log && at <= 0 ? null : at));
    Plotly.update(chart, {x},
      {'xaxis.type': scale, 'xaxis.autorange': true,
        'xaxis.tickmode': log ? 'linear' : 'auto', 'xaxis.dtick': log ? 'D2' : null});
  });
"""


def inline_json(value: object) -> str:
    """JSON that can stand inside a script element: no text in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c")


def arm_colours(result: Result) -> dict[str, str]:
    """One colour per arm, the same in every table and chart; scratch is grey."""
    names = [arm["name"] for arm in result["arms"]]
    others = [name for name in names if name != "scratch"]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    return {name: colours.get(name, _SCRATCH_COLOUR) for name in names}


def section(title: str, body: str) -> str:
    """A part of the page; `title` and `body` are HTML already."""
    return f"<section>\n<h2>{title}</h2>\n{body}</section>\n"


def table(header: tuple[str, ...], rows: list[list[str]], name: str = "") -> str:
    """A table of cells that are HTML already; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for first, *rest in rows:
        labels = header[1:] or [""] * len(rest)  # shown beside the cell where a screen is narrow
        cells = (
            f'<td data-label="{label}">{cell}</td>'
            for label, cell in zip(labels, rest, strict=True)
        )
        body += f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>\n'
    head = f"<thead><tr>{head}</tr></thead>\n" if header else ""
    return f'<div class="wide"><table class="{name}">{head}<tbody>{body}</tbody></table></div>\n'


def arm_label(name: str, colours: dict[str, str]) -> str:
    """An arm's name behind a dot of its colour."""
    return f'<span class="arm" style="--arm:{colours[name]}">{html.escape(name)}</span>'


def definitions(tokens: int) -> str:
    """What the words of the table mean, for arms of so many tokens."""
    items = {
        "Tokens to match": "Let L be the scratch arm’s final validation loss, reached after D "
        "tokens. An arm’s tokens to match is the first token count at which its validation loss "
        "is at or below L, linear between evaluations; “fewer tokens” is D over it.",
        "Before training": "An arm already at or below L before its first step has 0 tokens to "
        "match. A factor would divide by zero, so none is given; the loss difference at equal "
        "tokens says how far apart the arms end.",
        f"Not within {tokens:,} tokens": "The arm’s loss never came down to L in its budget.",
        "FLOPs to match": "As with tokens, but an arm is also charged with its search, its "
        "calibration and its teacher’s forward passes; “fewer FLOPs” is scratch’s total FLOPs "
        "over it. Below 1x the arm costs more than scratch at this budget.",
        "A dash": "Does not apply: scratch is the arm the others are measured against, and a "
        "factor needs a match.",
    }
    body = "".join(f"<dt>{term}</dt><dd>{text}</dd>\n" for term, text in items.items())
    return section("Definitions", f"<dl>\n{body}</dl>\n")


def chart_block(name: str, note: str, legend: str = "") -> str:
    """The place a chart is drawn in, with its note; a legend brings a linear/log toggle."""
    buttons = "".join(
        f'<button type="button" data-chart="{name}" data-scale="{scale}" '
        f'aria-pressed="{"true" if scale == "linear" else "false"}">{scale}</button>'
        for scale in ("linear", "log")
    )
    above = f'<p class="legend">{legend}</p>\n<div class="scales">{buttons}</div>\n'
    above = f'<div class="above">\n{above}</div>\n' if legend else ""
    return (
        f'<figure>\n{above}<div class="chart" id="{name}"></div>\n'
        f'<figcaption class="note">{note}</figcaption>\n</figure>\n'
    )


def charts_of(result: Result) -> dict[str, Figure]:
    """Every chart of the page by the id of the element it is drawn in."""
    charts = {
        "loss-tokens": _loss_chart(result, "tokens", "training tokens", "B"),
        "loss-flops": _loss_chart(result, "flops", "FLOPs spent, all costs counted", "power"),
    }
    if result["search"] is not None:
        charts["search-parameters"] = _parameters_chart(result)
        charts["search-order"] = _order_chart(result["search"])
    return charts


def _plotly_text(text: str) -> str:
    """Text as plotly shows it: it reads a few tags, and knows no entity for quotes."""
    return html.escape(text, quote=False)


def _layout(x_title: str, y_title: str, **more: Any) -> Figure:
    small = {"size": 13}
    axis = {"zeroline": False, "automargin": True, "ticks": ""}
    x_axis = {
        **axis,
        "showline": True,
        "title": {"text": x_title, "standoff": 12, "font": small},
        **more.pop("xaxis", {}),
    }
    x_axis.setdefault("showgrid", False)
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 13},
        "margin": {"l": 48, "r": 16, "t": 16, "b": 48},
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": x_axis,
        "yaxis": {**axis, "title": {"text": y_title, "standoff": 8, "font": small}},
        **more,
    }


def _loss_chart(result: Result, key: str, title: str, exponent: str) -> Figure:
    unit = {"tokens": "%{x:,} tokens", "flops": "%{x:.3e} FLOPs"}[key]
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": _plotly_text(arm["name"]),
            "x": [point[key] for point in arm["curve"]],
            "y": [point["loss"] for point in arm["curve"]],
            "line": {"color": arm_colours(result)[arm["name"]], "width": 2},
            "marker": {"size": 5},
            "hovertemplate": f"%{{fullData.name}}<br>{unit}<br>%{{y:.3f}} nats<extra></extra>",
        }
        for arm in result["arms"]
    ]
    more: Figure = {"xaxis": {"exponentformat": exponent, "rangemode": "tozero"}}
    target = result["target_loss"]
    if target is not None:
        across = {"xref": "paper", "x0": 0, "x1": 1, "y0": target, "y1": target}
        line = {"color": _SCRATCH_COLOUR, "width": 1.5, "dash": "dash"}
        more["shapes"] = [{"type": "line", "layer": "below", "line": line, **across}]
        place = {"xref": "paper", "x": 1, "xanchor": "right", "y": target, "yanchor": "top"}
        label = {"text": f"scratch’s final loss {target:.3f}", "font": {"size": 12}}
        more["annotations"] = [{**label, **place, "showarrow": False}]
    return {"data": data, "layout": _layout(title, "validation loss (nats per token)", **more)}


def _parameters_chart(result: Result) -> Figure:
    candidates = result["search"]["candidates"]
    low, high = result["student"]["bin"]
    bar = {
        "title": {"text": "generation", "side": "right", "font": {"size": 13}},
        "thickness": 8,
        "outlinewidth": 0,
    }
    parameters = [candidate["parameters"] for candidate in candidates]
    generations = [candidate["generation"] for candidate in candidates]
    points = {
        **_candidate_points(candidates, parameters),
        "marker": {
            "size": 7,
            "opacity": 0.8,
            "color": generations,
            "colorscale": _GENERATIONS,
            "colorbar": {**bar, "nticks": min(6, max(generations, default=0) + 1)},
        },
    }
    band = {"type": "rect", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
    band |= {"layer": "below", "line": {"width": 0}, "fillcolor": "rgba(133,141,154,0.14)"}
    margin = 0.08 * (high - low)
    axis = {"exponentformat": "B", "nticks": 5, "range": [low - margin, high + margin]}
    winner = _winner_ring(result["search"], parameters)
    layout = _layout("parameters", "loss, untrained (nats per token)", xaxis=axis, shapes=[band])
    return {"data": [points, winner], "layout": layout}


def _order_chart(search: Result) -> Figure:
    candidates = search["candidates"]
    order = list(range(1, len(candidates) + 1))
    points = {**_candidate_points(candidates, order), "marker": {"size": 5, "opacity": 0.55}}
    points["marker"]["color"] = _SCRATCH_COLOUR
    best = {
        "type": "scatter",
        "mode": "lines",
        "x": order,
        "y": list(accumulate((candidate["loss"] for candidate in candidates), min)),
        "line": {"color": _WINNER, "width": 2, "shape": "hv"},
        "hoverinfo": "skip",
    }
    winner = _winner_ring(search, order)
    layout = _layout("candidates scored", "loss, untrained (nats per token)")
    return {"data": [points, best, winner], "layout": layout}


def _candidate_points(candidates: list[Result], x: list[int]) -> Figure:
    texts = [
        f"generation {candidate['generation']}, {_plotly_text(candidate['origin'])}<br>"
        f"{candidate['parameters']:,} parameters<br>"
        + _plotly_text(", ".join(f"{key} {size}" for key, size in candidate["sizes"].items()))
        for candidate in candidates
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": [candidate["loss"] for candidate in candidates],
        "text": texts,
        "hovertemplate": "%{y:.3f} nats<br>%{text}<extra></extra>",
    }


def _winner_ring(search: Result, x: list[int]) -> Figure:
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


def architecture_drawing(teacher: Result, student: Result) -> str:
    """The student's stack of layers beside the teacher's, as SVG.

    A bar is a layer and its width stands for embed. The teacher's kept layers are coloured, and a
    path leads from each to the layer it became.
    """
    kept = student["kept_layers"]
    teacher_layers, student_layers = teacher["sizes"]["layers"], student["sizes"]["layers"]
    pitch = min(26.0, 330 / max(teacher_layers, student_layers))
    floor, bar = pitch * max(teacher_layers, student_layers), 0.72 * pitch
    widest = max(teacher["sizes"]["embed"], student["sizes"]["embed"])
    widths = [150 * model["sizes"]["embed"] / widest for model in (teacher, student)]
    centres = (85, 315)

    def rectangle(column: int, layer: int, name: str, title: str) -> str:
        left, top = centres[column] - widths[column] / 2, floor - (layer + 1) * pitch
        return (
            f'<rect class="{name}" x="{left:.1f}" y="{top:.1f}" width="{widths[column]:.1f}" '
            f'height="{bar:.1f}" rx="{min(3, bar / 4):.1f}"><title>{title}</title></rect>\n'
        )

    def path(source: int, layer: int) -> str:
        start, end = centres[0] + widths[0] / 2, centres[1] - widths[1] / 2
        y, z, middle = floor - (source + 1) * pitch, floor - (layer + 1) * pitch, (start + end) / 2
        there = f"M{start:.1f} {y:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {z:.1f} {end:.1f} {z:.1f}"
        back = f"v{bar:.1f}C{middle:.1f} {z + bar:.1f} {middle:.1f} {y + bar:.1f}"
        return f'<path class="path" d="{there}{back} {start:.1f} {y + bar:.1f}z"/>\n'

    shapes = [path(source, layer) for layer, source in enumerate(kept)]
    shapes += [
        rectangle(
            0,
            layer,
            "kept" if layer in kept else "dropped",
            f"teacher layer {layer}{', kept' if layer in kept else ''}",
        )
        for layer in range(teacher_layers)
    ]
    shapes += [
        rectangle(1, layer, "kept", f"student layer {layer}") for layer in range(student_layers)
    ]
    for centre, name, model in zip(
        centres, ("teacher", "student"), (teacher, student), strict=True
    ):
        sizes = model["sizes"]
        lines = (f"{name} · {sizes['layers']} layers", f"embed {sizes['embed']:,}")
        shapes += [
            f'<text x="{centre}" y="{floor + offset:.1f}">{line}</text>\n'
            for line, offset in zip(lines, (16, 34), strict=True)
        ]
    return (
        f'<svg class="stacks" viewBox="0 0 400 {floor + 42:.0f}" role="img" '
        'aria-label="the layers of the teacher, and the student cut out of it">\n'
        f"{''.join(shapes)}</svg>\n"
    )
