"""The result of a run as a table in the terminal and as one self-contained HTML page.

Everything here reads one file, `result.json` (its format is documented in docs/result.md), so a
report can be made again long after the checkpoints are gone. What the page looks like, its charts
and its drawing live in `report_page`; its section on the search in `report_search`.
"""

import html
import json
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headstart.files import write_whole
from headstart.report_page import (
    Figure,
    architecture_drawing,
    arm_colours,
    arm_label,
    chart_block,
    count_text,
    duration_text,
    flops_text,
    loss_charts,
    page,
    section,
    settings_block,
    size_text,
    table,
)
from headstart.report_search import search_charts, search_section

Result = dict[str, Any]

FORMAT = "headstart-result/1"
SCRATCH = "scratch"
NOTHING = "–"
COLUMNS = (
    "arm",
    "parameters",
    "loss before",
    "loss final",
    "tokens to match",
    "fewer tokens",
    "FLOPs to match",
    "fewer FLOPs",
    "time",
)
_RESULT_KEYS = (
    "name created command teacher student budget costs target_loss arms search recipe environment"
)
_ARM_KEYS = (
    "name init kd learning_rate parameters tokens loss_before loss_final tokens_to_match "
    "tokens_factor flops_to_match flops_factor loss_difference seconds curve"
)


def load_result(run_folder: Path) -> Result:
    """Reads `result.json` of a run folder and checks that a report can be made of it.

    Args:
        run_folder: the folder a finished run wrote.

    Returns:
        The result, as documented in docs/result.md.

    Raises:
        ValueError: the file is missing, is no JSON, has another format, or lacks keys.
    """
    path = Path(run_folder) / "result.json"
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give the folder of a finished run."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): restore the file or run again to write it anew."
        ) from error
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r}, not {FORMAT!r}: "
            "read it with the headstart version that wrote it, or run again."
        )
    if missing := [key for key in _RESULT_KEYS.split() if key not in result]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run again to write it anew.")
    if not (isinstance(result["arms"], list) and result["arms"]):
        raise ValueError(f"{path} has no arms: run again with at least one arm in the recipe.")
    for index, arm in enumerate(result["arms"]):
        keys = arm if isinstance(arm, dict) else {}
        if missing := [key for key in _ARM_KEYS.split() if key not in keys]:
            name = keys.get("name", index)
            raise ValueError(
                f"{path}: arm {name!r} lacks {', '.join(missing)}: run again to write it anew."
            )
    return result


def factor_text(factor: float) -> str:
    """A ratio with three digits: `11.7x`, `1.26x`, `0.48x`."""
    decimals = 2 if factor < 9.995 else 1 if factor < 99.95 else 0
    return f"{factor:,.{decimals}f}x"


def _nats(loss: float) -> str:
    return f"{loss:.2f}" if abs(loss) >= 0.1 else f"{loss:.3f}"


def result_rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of every table of results, one row per arm, in the order of `COLUMNS`."""
    return [_row(arm, compared=result["target_loss"] is not None) for arm in result["arms"]]


def _row(arm: Result, compared: bool) -> tuple[str, ...]:
    loss_final = f"{arm['loss_final']:.3f}"
    if arm.get("loss_spread") is not None:
        loss_final += f" ± {arm['loss_spread']:.3f}"
    tokens = fewer_tokens = flops = fewer_flops = NOTHING
    if compared and arm["name"] != SCRATCH:
        loss_final += f" ({arm['loss_difference']:+.3f})".replace("-", "−")
        if arm["tokens_to_match"] is None:
            tokens = f"not within {arm['tokens']:,} tokens"
        elif arm["tokens_to_match"] == 0:
            tokens = "before training"
        else:
            tokens = f"{round(arm['tokens_to_match']):,}"
        if arm["tokens_factor"] is not None:
            fewer_tokens = factor_text(arm["tokens_factor"])
        if arm["flops_to_match"] is not None:
            flops = flops_text(arm["flops_to_match"])
        if arm["flops_factor"] is not None:
            fewer_flops = factor_text(arm["flops_factor"])
    return (
        arm["name"],
        count_text(arm["parameters"]),
        f"{arm['loss_before']:.3f}",
        loss_final,
        tokens,
        fewer_tokens,
        flops,
        fewer_flops,
        duration_text(arm["seconds"]),
    )


def result_table(result: Result) -> Table:
    """The table of results for the terminal."""
    student, budget = result["student"], result["budget"]
    title = (
        f"{result['name']}: {count_text(student['parameters'])} parameters, "
        f"{budget['tokens']:,} tokens for each arm"
    )
    # All arms have the same parameters, and 80 columns are few: the title names them.
    kept = [index for index, column in enumerate(COLUMNS) if column != "parameters"]
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    wrapping = {"loss final", "tokens to match", "time"}  # their cells have spaces to break at
    for column in (COLUMNS[index] for index in kept):
        justify: Literal["left", "right"] = "left" if column == "arm" else "right"
        header = column.replace(" ", "\n", 1)
        table.add_column(header, justify=justify, no_wrap=column not in wrapping)
    for row in result_rows(result):
        # Text, so that brackets in a name are no markup.
        table.add_row(*(Text(row[index]) for index in kept))
    return table


def markdown_table(result: Result) -> str:
    """The table of results in GitHub's Markdown, with no newline at its end."""
    rule = [":--"] + ["--:"] * (len(COLUMNS) - 1)
    rows = [[html.escape(cell).replace("|", r"\|") for cell in row] for row in result_rows(result)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(COLUMNS), rule, *rows])


def best_arm(result: Result) -> Result:
    """The arm which matched scratch's loss earliest, else the one that ended lowest."""
    others = [arm for arm in result["arms"] if arm["name"] != SCRATCH] or result["arms"]
    matched = [arm for arm in others if arm["tokens_to_match"] is not None]
    if result["target_loss"] is not None and matched:
        return min(matched, key=lambda arm: (arm["tokens_to_match"], arm["loss_final"]))
    return min(others, key=lambda arm: arm["loss_final"])


def headline(result: Result) -> str:
    """What the run found, in one plain sentence, and what it cost, in a second one if known."""
    return " ".join(filter(None, (_match_sentence(result), _cost_sentence(result))))


def _match_sentence(result: Result) -> str:
    best, target = best_arm(result), result["target_loss"]
    name, ends = best["name"], f"{_nats(best['loss_final'])} nats after {best['tokens']:,} tokens"
    if target is None:
        return f"{name} ends at {ends}; no scratch arm was run to compare it with."
    if name == SCRATCH:
        return f"{name} ends at {ends}; no other arm was run to compare it with."
    loss = f"scratch's loss of {_nats(target)} nats"
    difference = best["loss_difference"]
    side = f"{_nats(abs(difference))} nats {'lower' if difference <= 0 else 'higher'}"
    if best["tokens_to_match"] is None:
        return (
            f"No arm reaches {loss} within {best['tokens']:,} tokens; "
            f"the closest, {name}, ends {side}."
        )
    if best["tokens_to_match"] == 0:
        return f"{name} is at or below {loss} before training; at equal tokens it ends {side}."
    matching = f"{round(best['tokens_to_match']):,} of {best['tokens']:,} tokens"
    factor = best["tokens_factor"]
    return f"{name} reaches {loss} after {matching}: {factor_text(factor)} fewer."


def baseline_sentences(result: Result) -> list[str]:
    """Which arms reach the loss of each baseline, and when."""
    sentences = []
    for index, baseline in enumerate(result.get("baselines", [])):
        reached = [
            f"{arm['name']} after {round(arm['baseline_tokens'][index]):,} tokens"
            if arm["baseline_tokens"][index] is not None
            else f"{arm['name']} not within {arm['tokens']:,}"
            for arm in result["arms"]
        ]
        sentences.append(
            f"{baseline['name']} ({count_text(baseline['parameters'])} parameters) has "
            f"{baseline['loss']:.3f} nats, which is reached by: {', '.join(reached)}."
        )
    return sentences


def _cost_sentence(result: Result) -> str:
    best = best_arm(result)
    factor = best["flops_factor"]
    if result["target_loss"] is None or best["name"] == SCRATCH or not factor:
        return ""
    counted = (
        "Counting the search" if result["costs"]["search_flops"] else "With no search to count"
    )
    if factor >= 1:
        return f"{counted}, it needs {factor_text(factor)} fewer FLOPs."
    return f"{counted}, it costs {factor_text(1 / factor)} more FLOPs at this budget."


def write_html(result: Result, path: Path) -> None:
    """Writes the report as one HTML file that needs no network.

    Args:
        result: what `load_result` returned.
        path: the file to write; it appears whole or not at all.
    """
    charts = charts_of(result)
    sections = [_results(result), _curves(result, charts), _search(result, charts)]
    sections += [_architecture(result), _definitions(result["budget"]["tokens"])]
    sections += [_costs(result), _settings(result)]
    write_whole(path, page(result["name"], _header(result), sections, charts))


def charts_of(result: Result) -> dict[str, Figure]:
    """Every chart of the page by the id of the element it is drawn in."""
    search = _searched(result)
    return loss_charts(result) | (search_charts(search) if search else {})


def _searched(result: Result) -> Result | None:
    """The run's search with what older files say of it elsewhere, or None without a search."""
    if result["search"] is None:
        return None
    return {"bin": result["student"]["bin"], "teacher": result["teacher"], **result["search"]}


def _header(result: Result) -> str:
    return f"""<p class="eyebrow">headstart · {html.escape(result["name"])}</p>
<h1>{html.escape(_match_sentence(result))}</h1>
<p class="lead">{html.escape(_cost_sentence(result))}</p>
<p class="meta">{html.escape(result["created"][:10])} · \
<code>{html.escape(result["command"])}</code></p>
"""


def _results(result: Result) -> str:
    colours = arm_colours(result)
    rows = [
        [arm_label(name, colours), *map(html.escape, cells)] for name, *cells in result_rows(result)
    ]
    note = "Losses are in nats per token on the validation split"
    if result["target_loss"] is not None:
        note += "; in brackets, the difference to scratch at equal tokens"
    if any(arm.get("loss_spread") is not None for arm in result["arms"]):
        note += "; ± is the standard deviation over seeds, of which curves and losses are the mean"
    notes = [f"{note}.", *map(html.escape, baseline_sentences(result))]
    notes += [html.escape(sentence) for sentence in _sweep_sentences(result)]
    body = "".join(f'<p class="note">{one}</p>\n' for one in notes)
    return section("Results", table(COLUMNS, rows, "results") + body)


def _sweep_sentences(result: Result) -> list[str]:
    """The last loss at every learning rate of the arms that had several."""
    sentences = []
    for arm in result["arms"]:
        rates = [
            f"{one['loss_final']:.3f} at {one['learning_rate']:g}" for one in arm.get("sweep", [])
        ]
        sentences += [f"{arm['name']} ended at {', '.join(rates)}."] * (len(rates) > 1)
    return sentences


def _definitions(tokens: int) -> str:
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


def _curves(result: Result, charts: dict[str, Figure]) -> str:
    colours = arm_colours(result)
    legend = "".join(arm_label(name, colours) for name in colours)
    omitted = "On the log scale a point at 0 has no place"
    tokens_note = f"{omitted}: read the loss before training off the table or the linear scale."
    flops_note = (
        "Search and calibration are paid before the first step, so an arm that needs them starts "
        f"to the right; an arm that distils also pays the teacher’s forward passes. {omitted}."
    )
    tokens = chart_block("loss-tokens", charts["loss-tokens"], tokens_note, legend)
    flops = chart_block("loss-flops", charts["loss-flops"], flops_note, legend)
    return section("Loss against tokens", tokens) + section("Loss against FLOPs", flops)


def _search(result: Result, charts: dict[str, Figure]) -> str:
    search = _searched(result)
    if search is None:
        return section("Search", '<p class="note">This run began without a search.</p>\n')
    return search_section(search, charts)


def _architecture(result: Result) -> str:
    teacher, student = result["teacher"], result["student"]
    both = (teacher, student)
    rows = [
        [key.replace("_", " "), *(size_text(model["sizes"][key]) for model in both)]
        for key in ("layers", "embed", "kv_groups", "q_per_kv", "head_dim", "mlp", "vocab")
    ]
    rows.insert(2, ["heads", *(_heads_text(model["sizes"]) for model in both)])
    rows += [
        [key.replace("_", " ").replace("non ", "non-"), *(count_text(model[key]) for model in both)]
        for key in ("parameters", "non_embedding_parameters")
    ]
    name = html.escape(teacher["name"] + (f" ({teacher['note']})" if teacher["note"] else ""))
    note = (
        f'<p class="note">The teacher is {name}; its own loss is {teacher["loss"]:.3f} nats. '
        "Width stands for embed, one bar for a layer, the first layer at the bottom.</p>\n"
    )
    body = f'<div class="pair">\n{architecture_drawing(teacher, student)}'
    body += table(("", "teacher", "student"), rows) + "</div>\n"
    return section("Architecture", note + body)


def _heads_text(sizes: Result) -> str:
    groups = sizes["kv_groups"]
    groups = groups if isinstance(groups, list) else [groups]
    return size_text([count * sizes["q_per_kv"] for count in groups])


def _costs(result: Result) -> str:
    costs, student, budget = result["costs"], result["student"], result["budget"]
    colours = arm_colours(result)
    rows = [
        ["calibration", f"{flops_text(costs['calibration_flops'])} FLOPs"],
        ["search", f"{flops_text(costs['search_flops'])} FLOPs"],
        ["search tokens", f"{costs['search_tokens']:,}"],
        ["search time", duration_text(costs["search_seconds"])],
        ["teacher, per token", f"{flops_text(costs['teacher_flops_per_token'])} FLOPs"],
        ["student training, per token", f"{flops_text(student['training_flops_per_token'])} FLOPs"],
        ["tokens per arm", f"{budget['tokens']:,}"],
        ["tokens per step", f"{budget['tokens_per_step']:,}"],
        ["block length", f"{budget['block_length']:,} tokens"],
        ["validation split", f"{budget['validation_tokens']:,} tokens"],
    ]
    rows += [
        [arm_label(arm["name"], colours), f"{flops_text(arm['curve'][-1]['flops'])} FLOPs"]
        for arm in result["arms"]
        if arm["curve"]
    ]
    note = (
        "The last rows are the arms’ totals, with what was paid before training. Below, their "
        "parts; evaluation is shown and not charged, since it serves the comparison alone."
    )
    body = table((), rows, "facts") + f'<p class="note">{note}</p>\n'
    parts = ("calibration", "search", "training", "teacher", "evaluation")
    ledger = [
        [arm_label(arm["name"], colours), *(flops_text(arm["flops"][part]) for part in parts)]
        for arm in result["arms"]
        if "flops" in arm
    ]
    if ledger:
        body += table(("FLOPs", *parts), ledger)
    return section("Costs", body)


def _settings(result: Result) -> str:
    rows = [[html.escape(str(cell)) for cell in row] for row in result["environment"].items()]
    environment = section("Environment", table((), rows, "facts"))
    return section("Recipe", settings_block(result["recipe"])) + environment
