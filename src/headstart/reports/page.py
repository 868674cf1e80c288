"""The page of a run: what its template `run.html` is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.reports.charts import Charts, arm_colours, loss_charts, search_charts
from headstart.reports.render import Row, write_page, yaml_text
from headstart.reports.scores import scores_cells
from headstart.reports.search import section_of
from headstart.reports.table import (
    BUDGET_COLUMNS,
    COLUMNS,
    Result,
    baseline_sentences,
    bits_sentences,
    budget_rows,
    cost_sentence,
    error_sentences,
    forecast_sentences,
    match_sentence,
    missing_sentences,
    result_rows,
    size_text,
)
from headstart.reports.vocabulary import COLUMNS as VOCABULARY_COLUMNS
from headstart.reports.vocabulary import size_rows, sizes_chart
from headstart.system.formats import NOTHING, count_text, duration_text, flops_text


def write_html(result: Result, path: Path) -> None:
    """Write the report as one HTML file that needs no network, whole or not at all."""
    search, colours = _search_of(result), arm_colours(result)
    started = [arm["name"] for arm in result["arms"] if arm["init"] != "random"]
    write_page(
        path,
        "run.html",
        charts_of(result),
        result=result,
        heading=match_sentence(result),
        lead=cost_sentence(result),
        colours=colours,
        budget_colours={name: colours[name] for name in started},
        tokens=f"{result['budget']['tokens']:,}",
        results=_results(result),
        search=section_of(search) if search else None,
        architecture=_architecture(result["teacher"], result["student"]),
        vocabulary=_vocabulary(result),
        continuations=_continuations(result),
        zero_shot=_zero_shot(result),
        budgets=[Row(name, cells) for name, *cells in budget_rows(result)],
        budget_columns=BUDGET_COLUMNS,
        forecasts=forecast_sentences(result),
        costs=_costs(result),
        recipe=yaml_text(result["recipe"]),
        environment=[Row(key, [str(value)]) for key, value in result["environment"].items()],
    )


def charts_of(result: Result) -> Charts:
    """Every chart of the page by the id of its place."""
    search = _search_of(result)
    charts = loss_charts(result) | (search_charts(search) if search else {})
    if sizes := result.get("vocabulary_sizes"):
        charts["vocabulary"] = {"": sizes_chart(sizes, result["student"]["sizes"]["vocab"])}
    return charts


def _search_of(result: Result) -> Result | None:
    """The run's search with what older files say of it elsewhere, or None without a search."""
    if result["search"] is None:
        return None
    return {"bin": result["student"]["bin"], "teacher": result["teacher"], **result["search"]}


def _results(result: Result) -> dict[str, Any]:
    colours = arm_colours(result)
    return {
        "columns": COLUMNS,
        "rows": [Row(name, cells, colours[name]) for name, *cells in result_rows(result)],
        "reference": result["reference"],
        "seeds": any(arm.get("loss_spread") is not None for arm in result["arms"]),
        "sentences": [
            *error_sentences(result),
            *bits_sentences(result),
            *baseline_sentences(result),
            *missing_sentences(result),
            *_sweep_sentences(result),
        ],
    }


def _sweep_sentences(result: Result) -> list[str]:
    """The last loss at every learning rate of the arms that had several."""
    sentences = []
    for arm in result["arms"]:
        runs = arm.get("sweep", [])
        losses = [f"{run['loss_final']:.3f} at {run['learning_rate']:g}" for run in runs]
        if len(losses) > 1:
            sentences.append(f"{arm['name']} ended at {', '.join(losses)}.")
    return sentences


def _architecture(teacher: Result, student: Result) -> dict[str, Any]:
    models = (teacher, student)
    rows = [
        Row(axis.replace("_", " "), [size_text(model["sizes"][axis]) for model in models])
        for axis in ("layers", "embed", "kv_groups", "q_per_kv", "head_dim", "mlp", "vocab")
    ]
    rows.insert(2, Row("heads", [_heads_text(model["sizes"]) for model in models]))
    rows += [
        Row(heading, [count_text(model[key]) for model in models])
        for heading, key in (
            ("parameters", "parameters"),
            ("non-embedding parameters", "non_embedding_parameters"),
        )
    ]
    return {
        "teacher": teacher["name"] + (f" ({teacher['note']})" if teacher["note"] else ""),
        "teacher_loss": f"{teacher['loss']:.3f}",
        "rows": rows,
        "drawing": _drawing(teacher, student),
    }


def _vocabulary(result: Result) -> dict[str, Any] | None:
    """What the page says of a trimmed vocabulary; None where it is whole."""
    sizes, student = result.get("vocabulary_sizes"), result["student"]
    if not sizes:
        return None
    rows = size_rows(sizes, student["sizes"]["embed"], student["parameters"])
    return {
        "columns": VOCABULARY_COLUMNS,
        "rows": [Row(heading, cells) for heading, *cells in rows],
        "chosen": f"{student['sizes']['vocab']:,}",
    }


def _continuations(result: Result) -> list[dict[str, Any]]:
    """How each model continues each prompt, with the loss that it has; older files hold none."""
    colours = arm_colours(result)
    losses = {("arm", arm["name"]): arm["loss_final"] for arm in result["arms"]}
    losses["teacher", "teacher"] = result["teacher"]["loss"]
    for arm in result["arms"]:
        if arm["init"] != "random":
            losses["student", "student"] = arm["loss_before"]
    shown = []
    for entry in result.get("continuations", []):
        rows = []
        for model in entry["models"]:
            kind, name = model["kind"], model["name"]
            heading = "student, untrained" if kind == "student" else name
            if (kind, name) in losses:
                heading += f", {losses[kind, name]:.2f} nats"
            rows.append(Row(heading, [model["text"]], colours[name] if kind == "arm" else ""))
        shown.append({"prompt": entry["prompt"], "rows": rows})
    return shown


def _zero_shot(result: Result) -> dict[str, Any] | None:
    """Scores in the tasks, a row for each model; None where there were no tasks."""
    models = result.get("zero_shot")
    if not models:
        return None
    colours = arm_colours(result)
    cells = [scores_cells({"tasks": model["tasks"]}) for model in models]
    columns = list(dict.fromkeys(column for of_model in cells for column in of_model))
    rows = [
        Row(
            "student, untrained" if model["kind"] == "student" else model["name"],
            [of_model.get(column, NOTHING) for column in columns],
            colours[model["name"]] if model["kind"] == "arm" else "",
        )
        for model, of_model in zip(models, cells, strict=True)
    ]
    return {"columns": ["", *columns], "rows": rows}


def _heads_text(sizes: Result) -> str:
    groups = sizes["kv_groups"]
    groups = groups if isinstance(groups, list) else [groups]
    return size_text([count * sizes["q_per_kv"] for count in groups])


def _drawing(teacher: Result, student: Result) -> dict[str, Any]:
    """Where the macro `stacks` draws the student's layers beside the teacher's.

    A bar is a layer and its width stands for embed. The teacher's kept layers are coloured, and a
    ribbon leads from each to the layer it became.
    """
    kept, models = student["kept_layers"], (teacher, student)
    most_layers = max(model["sizes"]["layers"] for model in models)
    widest = max(model["sizes"]["embed"] for model in models)
    pitch = min(26.0, 330 / most_layers)
    floor, bar_height = pitch * most_layers, 0.72 * pitch
    centres = (85, 315)
    bars, labels, edges = [], [], []
    for name, model, centre in zip(("teacher", "student"), models, centres, strict=True):
        num_layers, embed = model["sizes"]["layers"], model["sizes"]["embed"]
        width = 150 * embed / widest
        edges.append((centre - width / 2, centre + width / 2))
        for layer in range(num_layers):
            was_kept = name == "teacher" and layer in kept
            bars.append(
                {
                    "class": "kept" if was_kept or name == "student" else "dropped",
                    "x": round(centre - width / 2, 1),
                    "y": round(floor - (layer + 1) * pitch, 1),
                    "width": round(width, 1),
                    "title": f"{name} layer {layer}{', kept' if was_kept else ''}",
                }
            )
        for text, offset in ((f"{name} · {num_layers} layers", 16), (f"embed {embed:,}", 34)):
            labels.append({"x": centre, "y": round(floor + offset, 1), "text": text})
    start, end = edges[0][1], edges[1][0]
    ribbons = []
    for layer, source in enumerate(kept):
        top, end_top = floor - (source + 1) * pitch, floor - (layer + 1) * pitch
        corners = (top, end_top, end_top + bar_height, top + bar_height)
        ribbons.append([round(y, 1) for y in corners])
    return {
        "height": round(floor + 42),
        "bar_height": round(bar_height, 1),
        "bar_radius": round(min(3, bar_height / 4), 1),
        "bars": bars,
        "labels": labels,
        "ribbons": ribbons,
        "ribbon_x": [round(x, 1) for x in (start, (start + end) / 2, end)],
    }


def _costs(result: Result) -> dict[str, Any]:
    costs, student, budget = result["costs"], result["student"], result["budget"]
    arms, colours = result["arms"], arm_colours(result)
    facts = {
        "calibration": f"{flops_text(costs['calibration_flops'])} FLOPs",
        "search": f"{flops_text(costs['search_flops'])} FLOPs",
        "search tokens": f"{costs['search_tokens']:,}",
        "search time": duration_text(costs["search_seconds"]),
        "teacher, per token": f"{flops_text(costs['teacher_flops_per_token'])} FLOPs",
        "student training, per token": f"{flops_text(student['training_flops_per_token'])} FLOPs",
        "tokens per arm": f"{budget['tokens']:,}",
        "tokens per step": f"{budget['tokens_per_step']:,}",
        "block length": f"{budget['block_length']:,} tokens",
        "validation split": f"{budget['validation_tokens']:,} tokens",
        "test split": f"{budget['test_tokens']:,} tokens",
    }
    if correction := costs.get("correction_flops"):
        facts = {"teacher's correction": f"{flops_text(correction)} FLOPs", **facts}
    totals = [
        Row(arm["name"], [f"{flops_text(arm['curve'][-1]['flops'])} FLOPs"], colours[arm["name"]])
        for arm in arms
        if arm["curve"]
    ]
    ledgers = {arm["name"]: arm["flops"] for arm in arms if "flops" in arm}
    parts: tuple[str, ...] = ("calibration", "search", "training", "teacher", "evaluation")
    if any(ledger.get("correction") for ledger in ledgers.values()):
        parts = ("correction", *parts)
    return {
        "rows": [*(Row(name, [amount]) for name, amount in facts.items()), *totals],
        "parts_columns": ("FLOPs", *parts),
        "parts_rows": [
            Row(name, [flops_text(ledger[part]) for part in parts], colours[name])
            for name, ledger in ledgers.items()
        ],
    }
