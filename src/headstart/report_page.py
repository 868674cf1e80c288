"""What HTML reports are made of: the page's frame, style and script, its charts and its drawing.

A chart is a plain dict for plotly.js. Its colours for text and grid are left out here and filled in
by the script from the style's variables, so that charts follow the reader's light or dark mode.
Where it has `views`, buttons above it switch between them: each is what `Plotly.update` is called
with, a change of the traces and one of the layout.
"""

import html
import json
from typing import Any

import yaml

Result = dict[str, Any]
Figure = dict[str, Any]

# Mid-tones, each with enough contrast on the page's white and on its near-black.
GREY = "#858d9a"
_COLOURS = ("#3f86e0", "#e5732e", "#22a06b", "#b067d9", "#d6506e", "#1f9eb5", "#b08a1e")

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
h3 { margin: 1.8rem 0 .7rem; font-size: .95rem; font-weight: 650; }
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
.views { display: flex; gap: .25rem; margin-left: auto; }
.views button { padding: .15rem .7rem; border: 1px solid var(--rule); border-radius: 99px;
  background: none; color: var(--muted); font: inherit; font-size: .8rem; cursor: pointer; }
.views button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); }
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
.axis, .ticks { max-width: 46rem; }
.axis { margin-bottom: .9rem; }
.axis p, .ticks { display: flex; justify-content: space-between; gap: 1rem; font-size: .875rem; }
.axis p { margin: 0 0 .25rem; }
.axis .note { margin: 0; }
.axis .bar { height: .7rem; background: var(--rule); border-radius: 3px; overflow: hidden; }
.axis .bar div { height: 100%; background: var(--accent); }
svg.layers { display: block; width: 100%; height: 3.4rem; overflow: visible; }
.layers .dropped { fill: none; stroke: var(--muted); stroke-dasharray: 2 2;
  vector-effect: non-scaling-stroke; }
.layers .room { fill: var(--rule); }
.layers .kept { fill: var(--accent); }
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
for (const button of document.querySelectorAll('.views button'))
  button.addEventListener('click', () => {
    for (const other of button.parentElement.children)
      other.setAttribute('aria-pressed', other === button);
    const {chart, view} = button.dataset;
    Plotly.update(chart, ...structuredClone(charts[chart].views[view]));
  });
"""


def count_text(count: float) -> str:
    """A count in the unit a reader would say.

    >>> count_text(12_345_678), count_text(999), count_text(1_300_000_000)
    ('12.3M', '999', '1.30B')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return f"{count:.0f}"


def flops_text(flops: float) -> str:
    """Floating point operations with three digits.

    >>> flops_text(1.234e15), flops_text(0)
    ('1.23e15', '0')
    """
    if not flops:
        return "0"
    mantissa, exponent = f"{flops:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def duration_text(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> duration_text(8.25), duration_text(200), duration_text(3900)
    ('8.2s', '3m20s', '1h05m')
    """
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def size_text(size: int | list[int]) -> str:
    """One size, or the range of the sizes of a layer-wise student."""
    if isinstance(size, list):
        low, high = min(size), max(size)
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{size:,}"


def inline_json(value: object) -> str:
    """JSON that can stand inside a script element: no text in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c")


def arm_colours(result: Result) -> dict[str, str]:
    """One colour per arm, the same in every table and chart; scratch is grey."""
    names = [arm["name"] for arm in result["arms"]]
    others = [name for name in names if name != "scratch"]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    return {name: colours.get(name, GREY) for name in names}


def page(title: str, header: str, sections: list[str], charts: dict[str, Figure]) -> str:
    """A whole HTML page that needs no network.

    Args:
        title: plain text.
        header: HTML of the page's head.
        sections: HTML of its parts.
        charts: every chart by the id of the element it is drawn in.
    """
    from plotly.offline import get_plotlyjs  # slow to import, and only a page needs it

    # The policy forbids every request, so a page that reads well here reads well offline.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{html.escape(title)} · headstart</title>
<style>{STYLE}</style>
</head>
<body>
<header>
{header}</header>
<main>
{"".join(sections)}</main>
<noscript><p class="note">The charts need JavaScript; the tables do not.</p></noscript>
<script>{get_plotlyjs()}</script>
<script>const charts = {inline_json(charts)};
{SCRIPT}</script>
</body>
</html>
"""


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


def settings_block(settings: Any) -> str:
    """Nested settings as the YAML of a recipe."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"<pre>{html.escape(text)}</pre>\n"


def chart_block(name: str, figure: Figure, note: str, legend: str = "") -> str:
    """The place a chart is drawn in, with its note and a button for each of its views."""
    buttons = "".join(
        f'<button type="button" data-chart="{name}" data-view="{view}" '
        f'aria-pressed="{"false" if place else "true"}">{view}</button>'
        for place, view in enumerate(figure.get("views", {}))
    )
    above = f'<p class="legend">{legend}</p>\n' if legend else ""
    above += f'<div class="views">{buttons}</div>\n' if buttons else ""
    above = f'<div class="above">\n{above}</div>\n' if above else ""
    return (
        f'<figure>\n{above}<div class="chart" id="{name}"></div>\n'
        f'<figcaption class="note">{note}</figcaption>\n</figure>\n'
    )


def plotly_text(text: str) -> str:
    """Text as plotly shows it: it reads a few tags, and knows no entity for quotes."""
    return html.escape(text, quote=False)


def chart_layout(x_title: str, y_title: str, **more: Any) -> Figure:
    """The look of every chart; `more` adds to plotly's layout, `xaxis` to that of the axis."""
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


def loss_charts(result: Result) -> dict[str, Figure]:
    """Each arm's loss against what it cost."""
    return {
        "loss-tokens": _loss_chart(result, "tokens", "training tokens", "B"),
        "loss-flops": _loss_chart(result, "flops", "FLOPs spent, all costs counted", "power"),
    }


def _loss_chart(result: Result, key: str, title: str, exponent: str) -> Figure:
    unit = {"tokens": "%{x:,} tokens", "flops": "%{x:.3e} FLOPs"}[key]
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plotly_text(arm["name"]),
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
        line = {"color": GREY, "width": 1.5, "dash": "dash"}
        more["shapes"] = [{"type": "line", "layer": "below", "line": line, **across}]
        place = {"xref": "paper", "x": 1, "xanchor": "right", "y": target, "yanchor": "top"}
        label = {"text": f"scratch’s final loss {target:.3f}", "font": {"size": 12}}
        more["annotations"] = [{**label, **place, "showarrow": False}]
    layout = chart_layout(title, "validation loss (nats per token)", **more)
    return {"data": data, "layout": layout, "views": _scales([trace["x"] for trace in data])}


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
