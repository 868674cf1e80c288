"""A chart of lines on two logarithmic axes, as an SVG file that a Markdown page can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 190, 20, 52
COLOURS = ("#3f86e0", "#e5732e", "#22a06b", "#b067d9", "#d6506e", "#1f9eb5")
GREY = "#858d9a"
Points = Sequence[tuple[float, float]]


def write_figure(
    path: Path,
    lines: Mapping[str, Points],
    x_title: str,
    y_title: str,
    levels: Mapping[str, float],
) -> None:
    """Draw each line with its name at its end; every second one is dashed, in the colour before.

    Args:
        lines: name -> (x, y), all above 0.
        levels: name -> y of a grey line across.
    """
    points = [point for line in lines.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points] + list(levels.values())
    (x_low, x_high), (y_low, y_high) = (
        (math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05) for values in (xs, ys)
    )

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    def text(x: float, y: float, content: str, anchor: str = "start", colour: str = GREY) -> str:
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'
        )

    middle = (LEFT + WIDTH - RIGHT) / 2
    parts = [text(middle, HEIGHT - 10, escape(x_title), "middle")]
    parts.append(f'<g transform="rotate(-90 14 {HEIGHT / 2})">')
    parts += [text(14, HEIGHT / 2, escape(y_title), "middle"), "</g>"]
    for x in sorted(set(xs)):
        at, _ = place(x, 10**y_low)
        parts.append(text(at, HEIGHT - BOTTOM + 18, _count(x), "middle"))
    for name, y in levels.items():
        start, height = place(10**x_low, y)
        end = WIDTH - RIGHT
        parts.append(
            f'<line x1="{start:.1f}" x2="{end}" y1="{height:.1f}" y2="{height:.1f}" '
            f'stroke="{GREY}" stroke-dasharray="2 4"/>'
        )
        parts.append(text(LEFT - 8, height + 4, escape(name), "end"))
    for number, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number // 2 % len(COLOURS)], "6 4" if number % 2 else "none"
        places = [place(*point) for point in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        end, height = places[-1]
        parts.append(text(end + 8, height + 4, escape(name), colour=colour))
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13">\n{body}\n</svg>\n'
    )


def _count(value: float) -> str:
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k"
