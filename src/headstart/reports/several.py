"""Several runs side by side: a table for the terminal, and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headstart.reports.charts import (
    COLOURS,
    Axis,
    Chart,
    Charts,
    Series,
    Views,
    compared_points,
)
from headstart.reports.render import Row, write_page
from headstart.reports.table import COLUMNS, Result, result_rows
from headstart.system.formats import (
    NOTHING,
    count_text,
    flops_text,
    tick_of_count,
    tick_of_power,
)
from headstart.system.settings import FREE_KEYS, differences

Runs = Mapping[str, Result]
"""The result of each run, by the name that it has in the comparison."""
RUN_COLUMNS = (
    "arm",
    "parameters",
    "tokens",
    "loss final",
    "bits per byte",
    "fewer tokens",
    "fewer FLOPs",
    "FLOPs in all",
    "time",
)


def run_rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of a run's arms, in the order of `RUN_COLUMNS`."""
    rows = []
    for arm, cells in zip(result["arms"], result_rows(result), strict=True):
        of_arm = dict(zip(COLUMNS, cells, strict=True))
        bits = arm.get("bits_per_byte_final")
        of_arm |= {
            "tokens": count_text(arm["tokens"]),
            "bits per byte": NOTHING if bits is None else f"{bits:.3f}",
            "FLOPs in all": flops_text(compared_points(arm)[-1]["flops"]),
        }
        rows.append(tuple(of_arm[column] for column in RUN_COLUMNS))
    return rows


def runs_table(runs: Runs) -> Table:
    """Every arm of every run, for the terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for column in ("run", *RUN_COLUMNS):
        left = column in ("run", "arm")
        header = {"parameters": "para-\nmeters"}.get(column, column.replace(" ", "\n"))
        table.add_column(
            header,
            justify="left" if left else "right",
            overflow="fold",
            min_width=8 if column == "loss final" else None,
            no_wrap=not left and column != "loss final",  # which has a space to break at
        )
    for name, result in runs.items():
        for row in run_rows(result):
            table.add_row(*map(Text, (name, *row)))
    return table


def caution_sentences(runs: Runs) -> list[str]:
    """Why figures of these runs may not be compared with one another."""
    sentences = []
    texts = {json.dumps(result["recipe"].get("data"), sort_keys=True) for result in runs.values()}
    if len(texts) > 1:
        sentences.append("The runs read different texts, so they were not tested on the same text.")
    tested = {result["recipe"].get("pretrain", {}).get("test_tokens") for result in runs.values()}
    if len(tested) > 1:
        sentences.append(
            "pretrain.test_tokens differs, so the runs were not tested on the same text."
        )
    vocabularies = {result["student"]["sizes"]["vocab"] for result in runs.values()}
    teachers = {result["teacher"]["name"] for result in runs.values()}
    if len(vocabularies) > 1 or len(teachers) > 1:
        sentences.append(
            "Losses are of each run's own tokens, which may differ: compare bits per byte."
        )
    if len({result["compared_on"] for result in runs.values()}) > 1:
        sentences.append(
            "Some runs draw curves on the validation split, and others the ends of several "
            "budgets on the test split."
        )
    return sentences


def differing_keys(runs: Runs) -> dict[str, list[Any]]:
    """What the runs' recipes differ in: dotted key -> the value of each run."""
    trees = [
        _by_name({key: value for key, value in result["recipe"].items() if key not in FREE_KEYS})
        for result in runs.values()
    ]
    keys = dict.fromkeys(key for tree in trees[1:] for key in differences(trees[0], tree))
    return {key: [_value(tree, key) for tree in trees] for key in keys}


def _by_name(tree: Any) -> Any:
    """A tree with lists of things that have a `name`, such as arms, as dictionaries by it."""
    if isinstance(tree, dict):
        return {key: _by_name(value) for key, value in tree.items()}
    if not (isinstance(tree, list) and all(isinstance(item, dict) for item in tree)):
        return tree
    if not tree or not all("name" in item for item in tree):
        return tree
    return {
        str(item["name"]): _by_name({key: value for key, value in item.items() if key != "name"})
        for item in tree
    }


def _value(tree: Any, key: str) -> Any:
    """What stands at a dotted key, of which a name may have dots of its own; None for nothing."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return tree[key]
    found = (
        _value(tree[name], key.removeprefix(f"{name}."))
        for name in tree
        if key.startswith(f"{name}.")
    )
    return next((value for value in found if value is not None), None)


def run_colours(runs: Runs) -> dict[str, str]:
    """One colour for each run."""
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(runs)}


def runs_charts(runs: Runs) -> Charts:
    """Every arm's loss against tokens and FLOPs, in bits per byte where all results have it."""
    tokens, flops = (
        Axis("training tokens", tick_of_count),
        Axis("FLOPs spent, all costs counted", tick_of_power),
    )
    return {
        "runs-tokens": _views(runs, "tokens", tokens),
        "runs-flops": _views(runs, "flops", flops),
    }


def _views(runs: Runs, key: str, x: Axis) -> Views:
    arms = [(name, arm) for name, result in runs.items() for arm in result["arms"]]
    points = [compared_points(arm) for _, arm in arms]
    in_bits = all("bits_per_byte" in point for of_arm in points for point in of_arm)
    unit, of_loss = ("bits per byte", "bits_per_byte") if in_bits else ("nats per token", "loss")
    written = {"tokens": "{:,} tokens", "flops": "{:.3e} FLOPs"}[key]
    series = [
        Series(
            [point[key] for point in of_arm],
            [point[of_loss] for point in of_arm],
            run_colours(runs)[name],
            "dotted" if arm["init"] == "random" else "solid",
            radius=3,
            tips=[
                f"{name}, {arm['name']}\n{written.format(point[key])}\n{point[of_loss]:.3f} {unit}"
                for point in of_arm
            ],
        )
        for (name, arm), of_arm in zip(arms, points, strict=True)
    ]
    linear = Chart(replace(x, limits=(0, None)), Axis(f"loss ({unit})"), tuple(series))
    return {"linear": linear, "log": replace(linear, x=replace(x, is_log=True))}


def write_comparison(runs: Runs, path: Path) -> None:
    """Write the page of several runs as one HTML file, whole or not at all."""
    colours, keys = run_colours(runs), differing_keys(runs)
    rows = [
        Row(name, cells, colours[name])
        for name, result in runs.items()
        for cells in run_rows(result)
    ]
    models = [
        Row(
            name,
            [
                result["teacher"]["name"],
                f"{result['teacher']['loss']:.3f}",
                count_text(result["student"]["parameters"]),
                result["reference"] or NOTHING,
                result["created"][:10],
            ],
            colours[name],
        )
        for name, result in runs.items()
    ]
    write_page(
        path,
        "several.html",
        runs_charts(runs),
        num_runs=len(runs),
        colours=colours,
        columns=("run", *RUN_COLUMNS),
        rows=rows,
        cautions=caution_sentences(runs),
        model_columns=("run", "teacher", "its loss", "student", "reference", "made on"),
        models=models,
        key_columns=("key", *runs),
        keys=[Row(key, [_text(value) for value in values]) for key, values in keys.items()],
    )


def _text(value: Any) -> str:
    if value is None or value == "":
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value)
