"""Whole commands against a hub on localhost: commits are kept, and a second start needs no hub.

Clients of the hub read HF_ENDPOINT and HF_HOME when they are imported, so each command is a process
of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load, save
from tests.conftest import random_teacher
from tests.hub import Hub, Repo, serve

pytestmark = pytest.mark.exhaustive
FIRST, SECOND = "1" * 40, "2" * 40
CLI = str(Path(__file__).parents[1] / "float32_cli.py")
CARD = b"""---
configs:
- config_name: one
  data_files: one.jsonl
  default: true
- config_name: two
  data_files: two.jsonl
---
"""


@pytest.fixture
def hub(teacher_folder: Path, corpus: Path) -> Hub:
    """Two commits of a teacher and of a dataset with two configs; `main` is the first."""
    teacher = {path.name: path.read_bytes() for path in teacher_folder.iterdir()}
    weights = load(teacher["model.safetensors"])
    weights["model.norm.weight"] += 1
    moved = teacher | {"model.safetensors": save(weights, metadata={"format": "pt"})}
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]

    def rows(word: str) -> bytes:
        return "".join(json.dumps({"text": f"{word} {text}"}) + "\n" for text in texts).encode()

    def dataset(number: int) -> dict[str, bytes]:
        configs = {f"{name}.jsonl": rows(f"{name}{number}") for name in ("one", "two")}
        return {"README.md": CARD, **configs}

    def repo(first: dict[str, bytes], second: dict[str, bytes]) -> Repo:
        return Repo({FIRST: first, SECOND: second}, {"main": FIRST, "v1": FIRST, "v2": SECOND})

    data = repo(dataset(1), dataset(2))
    return Hub({"models/org/teacher": repo(teacher, moved), "datasets/org/data": data})


@pytest.fixture
def serving(hub: Hub) -> Iterator[ExitStack]:
    """The hub's server; closing it takes the network away."""
    with ExitStack() as stack:
        stack.enter_context(serve(hub))
        yield stack


def move_main(hub: Hub) -> None:
    for repo in hub.repos.values():
        repo.refs["main"] = SECOND


def recipe(output: Path, **entries: Any) -> dict[str, Any]:
    data = {"source": "org/data", "block_length": 32}
    return {
        "teacher": "org/teacher",
        "output": str(output),
        "search": {
            "bin": {"low": 30_000, "high": 45_000},
            "tokens": 256,
            "calibration_tokens": 512,
            "evolution": {"population": 3, "generations": 1, "elites": 2},
        },
        "pretrain": {
            "tokens": 256,
            "validation_tokens": 256,
            "evaluations": 1,
            "baselines": ["org/teacher@v2"],
            "arms": [{"name": "subnet"}],
        },
        "train": {"per_device_train_batch_size": 4, "use_cpu": True},
        **entries,
        "data": data | entries.get("data", {}),
    }


def headstart(hub: Hub, command: str, asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A command on a recipe, with caches beside the recipe's output."""
    folder = Path(asked["output"]).parent
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    return python(hub, folder, CLI, command, str(path))


def python(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that knows the hub, with its caches in a folder."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HEADSTART_CACHE": str(folder / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_keeps_its_commits_and_goes_on_without_a_hub(
    hub: Hub, serving: ExitStack, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    asked = recipe(folder)
    first = headstart(hub, "run", asked)
    assert first.returncode == 0, first.stderr
    begun, result = read(folder / "inputs.json"), read(folder / "result.json")
    commits = {"org/data": FIRST, "org/teacher": FIRST, "org/teacher@v2": SECOND}
    assert begun["revisions"] == result["revisions"] == commits
    assert result["teacher"]["name"] == "org/teacher"
    assert read(folder / "student" / "subnet.json")["teacher_commit"] == FIRST
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["source"] == "org/data"

    move_main(hub)
    hub.requests.clear()
    shutil.rmtree(folder / "student")
    again = headstart(hub, "run", asked)
    assert again.returncode == 0, again.stderr
    assert read(folder / "inputs.json") == begun
    assert not [request for request in hub.requests if "main" in request]

    serving.close()
    shutil.rmtree(folder / "arms")
    (folder / "result.json").unlink()
    (folder / "compared.json").unlink()
    offline = headstart(hub, "run", asked)
    assert offline.returncode == 0, offline.stderr
    redone = read(folder / "result.json")
    assert redone["arms"][0]["loss_final"] == result["arms"][0]["loss_final"]
    assert redone["baselines"] == result["baselines"]


def test_a_new_run_takes_what_main_is_and_a_revision_what_it_was(
    hub: Hub, serving: ExitStack, tmp_path: Path
) -> None:
    move_main(hub)
    old = {"teacher": "org/teacher@v1", "data": {"source": "org/data:two@v1"}}
    for name, entries in {"new": {}, "old": old}.items():
        found = headstart(hub, "search", recipe(tmp_path / name, **entries))
        assert found.returncode == 0, found.stderr
    newer, older = (read(tmp_path / name / "inputs.json") for name in ("new", "old"))
    assert newer["revisions"]["org/teacher"] == newer["revisions"]["org/data"] == SECOND
    assert older["revisions"]["org/teacher@v1"] == FIRST
    assert older["revisions"]["org/data:two@v1"] == FIRST
    assert newer["teacher"] != older["teacher"] and newer["data"] != older["data"]
    manifests = map(read, (tmp_path / "cache" / "data").glob("*/manifest.json"))
    ((identity,),) = [m["inputs"] for m in manifests if m["fingerprint"] == older["data"]]
    assert identity == {"name": "org/data", "revision": FIRST, "config": "two"}

    # Commits need no look-up, so a new run over prepared text needs no hub.
    serving.close()
    entries = {
        "teacher": f"org/teacher@{FIRST}",
        "data": {"source": f"org/data:two@{FIRST}"},
    }
    offline = headstart(hub, "search", recipe(tmp_path / "pinned", **entries))
    assert offline.returncode == 0, offline.stderr
    assert read(tmp_path / "pinned" / "inputs.json")["data"] == older["data"]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"teacher": "org/teacher@v9"}, "org/teacher has no revision 'v9' on the hub: give a"),
        ({"data": {"source": "org/data@v9"}}, "org/data has no revision 'v9' on the hub: give a"),
        (
            {"data": {"source": f"org/data@{'9' * 40}"}},
            f"the hub gives no dataset org/data@{'9' * 40} (Revision",
        ),
        (
            {"data": {"source": "org/data:three"}},
            "org/data has no config 'three': choose one of one, two, as in org/data:one",
        ),
        ({"teacher": "org/none"}, "'org/none' is neither a folder nor a model that can be fetched"),
        ({"data": {"source": "org/none"}}, "org/none is no local file or folder, and the hub"),
    ],
)
def test_what_the_hub_has_not_is_told_in_a_sentence(
    hub: Hub, serving: ExitStack, tmp_path: Path, entries: dict[str, Any], sentence: str
) -> None:
    start = time.perf_counter()
    found = headstart(hub, "search", recipe(tmp_path / "run", **entries))
    seconds = time.perf_counter() - start
    assert found.returncode == 2, found.stderr
    assert sentence in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()
    assert seconds < 30  # imports included, on a machine that has other work


@pytest.mark.parametrize("is_whole", [True, False])
def test_only_the_weights_that_transformers_loads_are_fetched(
    is_whole: bool, hub: Hub, serving: ExitStack, saved: Any, tmp_path: Path
) -> None:
    """Beside them lie others, as in repos that hold a model in several formats."""
    folder = saved(random_teacher("llama-tied-gqa"), max_shard_size="1GB" if is_whole else "20KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = sorted(name for name in files if name.endswith(".safetensors"))
    assert (names == ["model.safetensors"]) is is_whole
    others = dict.fromkeys(("consolidated.safetensors", "pytorch_model.bin"), b"large")
    hub.repos["models/org/other"] = Repo({FIRST: files | others}, {"main": FIRST})
    code = (
        "from headstart.model.checkpoint import Checkpoint; "
        "print(*sorted({f.name for f in Checkpoint.open_whole('org/other').files.values()}))"
    )
    for _ in range(2):
        ran = python(hub, tmp_path, "-c", code)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == names
        fetched = [request for request in hub.requests if request.startswith("GET")]
        assert not any(name in request for request in fetched for name in others)
        serving.close()  # and again without a network
