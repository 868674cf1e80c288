"""Fills the templates in `templates/`; whatever is put into them is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from headstart.reports.charts import ACCENT, Charts
from headstart.reports.drawing import LINE_UNITS, Tips, draw_all
from headstart.system.files import write_whole

ENVIRONMENT = Environment(
    loader=PackageLoader("headstart.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals |= {"line_units": LINE_UNITS, "accent": ACCENT}


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        heading: the first cell.
        cells: the others.
        colour: of the arm that the heading names; empty where it names none.
    """

    heading: str
    cells: Sequence[str]
    colour: str = ""


def render(template: str, **values: Any) -> str:
    """The HTML of a template filled with these values."""
    return ENVIRONMENT.get_template(template).render(values)


def write_page(path: Path, template: str, charts: Charts, **values: Any) -> None:
    """Write one HTML file that needs no network.

    Args:
        path: the file to write; it appears whole or not at all.
        template: extends `frame.html`.
        charts: every chart by the id of its place.
        values: what else the template is given.
    """
    tips = Tips()
    drawings = draw_all(charts, tips)
    write_whole(path, render(template, charts=drawings, tips=[*tips.numbers], **values))


def yaml_text(settings: Any) -> str:
    """Nested settings as the YAML of a recipe."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
