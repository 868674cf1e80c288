"""What each size of a vocabulary costs and gives, for the terminal and for a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.reports.charts import GREY, Axis, Chart, Series
from headstart.system.formats import count_text, flops_text

COLUMNS = ("rows", "bytes/token", "bits/byte", "embedding", "rest", "FLOPs/byte")
Sizes = Sequence[Mapping[str, Any]]
"""For each size "rows", and "bytes_per_token" and "bits_per_byte" of the untrained teacher."""


def size_rows(sizes: Sizes, width: int, parameters: int) -> list[tuple[str, ...]]:
    """The cells of a table of sizes, in the order of `COLUMNS`.

    Args:
        sizes: of the vocabulary.
        width: channels of the student's residual stream.
        parameters: of the student, each of which costs two FLOPs a token; its embedding is tied.
    """
    rows: list[tuple[str, ...]] = []
    for entry in sizes:
        embedding = entry["rows"] * width
        rows.append(
            (
                f"{entry['rows']:,}",
                f"{entry['bytes_per_token']:.3f}",
                f"{entry['bits_per_byte']:.4f}",
                count_text(embedding),
                count_text(parameters - embedding) if parameters > embedding else "none",
                flops_text(2 * parameters / entry["bytes_per_token"]),
            )
        )
    return rows


def sizes_table(sizes: Sizes, width: int, parameters: int) -> Table:
    """The table for the terminal; arguments as for `size_rows`."""
    table = Table(box=SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in size_rows(sizes, width, parameters):
        table.add_row(*row)
    return table


def sizes_chart(sizes: Sizes, chosen: int) -> Chart:
    """The teacher's bits per byte at every size, with a line at the one that was chosen."""
    rows, bits = ([entry[key] for entry in sizes] for key in ("rows", "bits_per_byte"))
    tips = [
        f"{entry['rows']:,} rows\n{entry['bits_per_byte']:.3f} bits per byte\n"
        f"{entry['bytes_per_token']:.2f} bytes per token"
        for entry in sizes
    ]
    x = Axis("rows of the vocabulary", "{:,}".format, is_log=True, ticks=tuple(sorted(rows)))
    y = Axis("bits per byte, untrained teacher")
    series = Series(rows, bits, GREY, "solid", radius=3, tips=tips)
    return Chart(x, y, (series,), cut=chosen)
