"""The result of a run in words and as a table, for the terminal and for the page.

Everything here reads one file, `result.json` (its format is documented in docs/result.md), so a
report can be made again long after the checkpoints are gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headstart.system.errors import UserError
from headstart.system.formats import NOTHING, count_text, duration_text, flops_text

Result = dict[str, Any]

FORMAT = "headstart-result/3"
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
    "name created command teacher student budget costs reference compared_on target_loss arms "
    "search recipe environment"
)
_ARM_KEYS = (
    "name init kd learning_rate parameters tokens loss_before loss_final tokens_to_match "
    "tokens_factor flops_to_match flops_factor is_bound loss_difference tokens_per_step seconds "
    "curve budgets matches"
)


def load_result(run_folder: Path) -> Result:
    """Read `result.json` of a run's folder, which docs/result.md documents, and check it.

    Raises:
        UserError: the file is missing, is no JSON, has another format, or lacks keys.
    """
    path = Path(run_folder) / "result.json"
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the folder of a finished run."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): restore the file or run again to write it anew."
        ) from error
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found!r}, not {FORMAT!r}: "
            "read it with the headstart version that wrote it, or run again."
        )
    if missing := [key for key in _RESULT_KEYS.split() if key not in result]:
        raise UserError(f"{path} lacks {', '.join(missing)}: run again to write it anew.")
    if not (isinstance(result["arms"], list) and result["arms"]):
        raise UserError(f"{path} has no arms: run again with at least one arm in the recipe.")
    for index, arm in enumerate(result["arms"]):
        keys = arm if isinstance(arm, dict) else {}
        if missing := [key for key in _ARM_KEYS.split() if key not in keys]:
            name = keys.get("name", index)
            raise UserError(
                f"{path}: arm {name!r} lacks {', '.join(missing)}: run again to write it anew."
            )
    return result


def factor_text(factor: float) -> str:
    """A ratio with three digits: `11.7x`, `1.26x`, `0.48x`."""
    decimals = 2 if factor < 9.995 else 1 if factor < 99.95 else 0
    return f"{factor:,.{decimals}f}x"


def size_text(size: int | list[int]) -> str:
    """One size, or the range of the sizes of a layer-wise student."""
    if isinstance(size, list):
        low, high = min(size), max(size)
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"
    return f"{size:,}"


def _nats(loss: float) -> str:
    return f"{loss:.2f}" if abs(loss) >= 0.1 else f"{loss:.3f}"


def result_rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of every table of results, one row per arm, in the order of `COLUMNS`."""
    return [_row(arm, result["reference"]) for arm in result["arms"]]


def _row(arm: Result, reference: str | None) -> tuple[str, ...]:
    loss_final = f"{arm['loss_final']:.3f}"
    if arm.get("loss_spread") is not None:
        loss_final += f" ± {arm['loss_spread']:.3f}"
    comparison = [NOTHING] * 4
    if reference not in (None, arm["name"]):
        loss_final += f" ({arm['loss_difference']:+.3f})".replace("-", "−")
        if arm["tokens_to_match"] is None:
            tokens = f"not within {arm['tokens']:,} tokens"
        elif arm["tokens_to_match"] == 0:
            tokens = "before training"
        elif arm["is_bound"]:
            tokens = f"within the first {round(arm['tokens_to_match']):,}"
        else:
            tokens = f"{round(arm['tokens_to_match']):,}"
        at_least, at_most = ("≥ ", "≤ ") if arm["is_bound"] else ("", "")
        comparison = [
            tokens,
            _text(arm["tokens_factor"], factor_text, at_least),
            _text(arm["flops_to_match"], flops_text, at_most),
            _text(arm["flops_factor"], factor_text, at_least),
        ]
    return (
        arm["name"],
        count_text(arm["parameters"]),
        f"{arm['loss_before']:.3f}",
        loss_final,
        *comparison,
        duration_text(arm["seconds"]),
    )


def _text(value: float | None, as_text: Callable[[float], str], bound: str = "") -> str:
    return NOTHING if value is None else bound + as_text(value)


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
    wrapping = {"arm", "loss final", "tokens to match", "time"}  # a number stays whole
    for column in (COLUMNS[index] for index in kept):
        justify: Literal["left", "right"] = "left" if column == "arm" else "right"
        header = column.replace(" ", "\n", 1)
        table.add_column(header, justify=justify, overflow="fold", no_wrap=column not in wrapping)
    for row in result_rows(result):
        # Text, so that brackets in a name are no markup.
        table.add_row(*(Text(row[index]) for index in kept))
    return table


def best_arm(result: Result) -> Result:
    """The arm which matched the reference's loss earliest, else the one that ended lowest.

    Arms with random weights are only looked at where there are no others.
    """
    others = (
        [arm for arm in result["arms"] if arm["init"] != "random"]
        or [arm for arm in result["arms"] if arm["name"] != result["reference"]]
        or result["arms"]
    )
    matched = [arm for arm in others if arm["tokens_to_match"] is not None]
    if result["target_loss"] is not None and matched:
        return min(matched, key=lambda arm: (arm["tokens_to_match"], arm["loss_final"]))
    return min(others, key=lambda arm: arm["loss_final"])


def headline(result: Result) -> str:
    """What the run found, in one plain sentence, and what it cost, in a second one if known."""
    return " ".join(filter(None, (match_sentence(result), cost_sentence(result))))


def match_sentence(result: Result) -> str:
    """Where the best arm stands against the reference."""
    best, target, reference = best_arm(result), result["target_loss"], result["reference"]
    name, ends = best["name"], f"{_nats(best['loss_final'])} nats after {best['tokens']:,} tokens"
    if target is None:
        return f"{name} ends at {ends}; no arm with random weights was run to compare it with."
    if name == reference:
        return f"{name} ends at {ends}; no other arm was run to compare it with."
    loss = f"{reference}'s {result['compared_on']} loss of {_nats(target)} nats"
    difference = best["loss_difference"]
    side = f"{_nats(abs(difference))} nats {'lower' if difference <= 0 else 'higher'}"
    if best["tokens_to_match"] is None:
        return (
            f"No arm reaches {loss} within {best['tokens']:,} tokens; "
            f"the closest, {name}, ends {side}."
        )
    if best["tokens_to_match"] == 0:
        return f"{name} is at or below {loss} before training; at equal tokens it ends {side}."
    if best["is_bound"] and len(best["budgets"]) > 1:
        return (
            f"{name} is below {loss} at its smallest budget already, "
            f"{round(best['tokens_to_match']):,} of {best['tokens']:,} tokens: at least "
            f"{factor_text(best['tokens_factor'])} fewer."
        )
    if best["is_bound"]:
        steps = round(best["tokens_to_match"] / best["tokens_per_step"])
        return (
            f"{name} reaches {loss} within the first {'step' if steps == 1 else f'{steps} steps'}, "
            f"that is {round(best['tokens_to_match']):,} of {best['tokens']:,} tokens: at least "
            f"{factor_text(best['tokens_factor'])} fewer."
        )
    matching = f"{round(best['tokens_to_match']):,} of {best['tokens']:,} tokens"
    factor = best["tokens_factor"]
    return f"{name} reaches {loss} after {matching}: {factor_text(factor)} fewer."


def error_sentences(result: Result) -> list[str]:
    """How far each last loss may be off because the test split is no larger."""
    errors = [
        f"{arm['name']} {arm['standard_error']:.3f}"
        for arm in result["arms"]
        if arm.get("standard_error") is not None
    ]
    sentence = f"Standard error of the last losses over test blocks: {', '.join(errors)}."
    return [sentence] if errors else []


def missing_sentences(result: Result) -> list[str]:
    """Which arms of the recipe are not in the comparison, since they are not trained yet."""
    there = {arm["name"] for arm in result["arms"]}
    asked = result["recipe"].get("pretrain", {}).get("arms", [])  # a result may be made by hand
    names = [arm["name"] for arm in asked]
    missing = [name for name in names if name not in there]
    return [f"Not trained yet: {', '.join(missing)}."] if missing else []


BUDGET_COLUMNS = (
    "arm",
    "budget",
    "learning rate",
    "loss",
    "reference",
    "fewer tokens",
    "fewer FLOPs",
)


def budget_rows(result: Result) -> list[tuple[str, ...]]:
    """What every arm ends with at every budget, in the order of `BUDGET_COLUMNS`.

    Empty where there is only one budget.
    """
    rows = []
    for arm in result["arms"]:
        if len(arm["budgets"]) == 1:
            return []
        for budget, match in zip(arm["budgets"], arm["matches"], strict=True):
            loss = f"{budget['loss']:.3f}"
            if budget["spread"] is not None:
                loss += f" ± {budget['spread']:.3f}"
            at_least = "≥ " if match["is_bound"] else ""
            factors = [NOTHING] * 2
            if match["reference"] not in (None, arm["name"]):
                factors = [
                    "before training"
                    if unit == "tokens" and match["tokens_to_match"] == 0
                    else "not reached"
                    if match["tokens_to_match"] is None
                    else _text(match[f"{unit}_factor"], factor_text, at_least)
                    for unit in ("tokens", "flops")
                ]
            rate = f"{budget['learning_rate']:g}"
            reference = match["reference"] or NOTHING
            rows.append((arm["name"], f"{budget['tokens']:,}", rate, loss, reference, *factors))
    return rows


def forecast_sentences(result: Result) -> list[str]:
    """When the reference is forecast to catch up with each arm, or why nothing is forecast."""
    sentences, missed = [], []
    for arm in result["arms"]:
        if (forecast := arm.get("forecast")) and not forecast["is_trusted"]:
            miss = max(abs(of["forecast"] - of["loss"]) for of in forecast["checked"])
            missed.append(f"{arm['name']} is {miss:.2f} nats off")
        if catch_up := arm.get("catch_up"):
            tokens, reference = catch_up["tokens"], result["reference"]
            when = (
                f"at a budget of about {count_text(tokens)} tokens"
                if tokens
                else f"not within {count_text(catch_up['horizon_tokens'])} tokens"
            )
            sentences.append(f"By forecast, {reference} catches up with {arm['name']} {when}.")
    if missed:
        sentences.append(
            "No forecast where the smaller half of the budgets does not tell the larger one: "
            f"{', '.join(missed)}."
        )
    return sentences


def budget_table(result: Result) -> Table:
    """The table of budgets for the terminal."""
    table = Table(title="what runs of each budget end with, test loss", box=SIMPLE_HEAD)
    for column in BUDGET_COLUMNS:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in budget_rows(result):
        table.add_row(*map(Text, row))
    return table


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
            f"{baseline['loss']:.3f} nats for each of the teacher's tokens, which is reached by: "
            f"{', '.join(reached)}."
        )
    return sentences


def bits_sentences(result: Result) -> list[str]:
    """The last losses in bits per byte, which compare with models of other tokenizers."""
    ended = [
        f"{arm['name']} {arm['bits_per_byte_final']:.3f}"
        for arm in result["arms"]
        if "bits_per_byte_final" in arm
    ]
    if not ended:  # an older file
        return []
    teacher = result["teacher"]["bits_per_byte"]
    return [f"In bits per byte of text: teacher {teacher:.3f}, {', '.join(ended)}."]


def cost_sentence(result: Result) -> str:
    """How the FLOPs of the best arm compare with the reference's; empty if they do not."""
    best = best_arm(result)
    factor = best["flops_factor"]
    if result["reference"] in (None, best["name"]) or not factor:
        return ""
    counted = (
        "Counting the search" if result["costs"]["search_flops"] else "With no search to count"
    )
    if best.get("flops", {}).get("correction"):
        counted += ", and with the teacher's correction"
    if factor >= 1:
        bound = "at least " if best["is_bound"] else ""
        return f"{counted}, it needs {bound}{factor_text(factor)} fewer FLOPs."
    return f"{counted}, it costs {factor_text(1 / factor)} more FLOPs at this budget."
