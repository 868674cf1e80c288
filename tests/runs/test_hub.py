"""A run keeps the commits that it was begun with, and needs no network once it has all inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file, save_file

from headstart.model.checkpoint import Checkpoint
from headstart.recipe import Recipe, recipe_from_dict
from headstart.runs.run import open_run
from headstart.system.errors import UserError
from headstart.text import corpus as corpus_module
from headstart.text.settings import DataSettings

COMMITS = ("1" * 40, "2" * 40)


class Hub:
    """Two commits of a teacher and of a dataset with two configs; `main` is the first at first."""

    def __init__(self, folder: Path, teacher: Path, texts: list[str]) -> None:
        self.main, self.is_reachable, self.texts = COMMITS[0], True, texts
        self.folder = folder / "models--org--teacher"
        for number, commit in enumerate(COMMITS):
            snapshot = self.folder / "snapshots" / commit
            shutil.copytree(teacher, snapshot)
            weights = load_file(snapshot / "model.safetensors")
            weights["model.norm.weight"] += number
            save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})

    def commit(self, revision: str | None) -> str:
        if not self.is_reachable and revision not in COMMITS:
            raise OSError("no network")
        commits = {None: self.main, "main": self.main, "old": COMMITS[0]}
        return commits.get(revision, revision or "")

    def snapshot_download(self, repo: str, revision: str | None, **_: Any) -> str:
        commit = self.commit(revision)
        if repo != "org/teacher" or commit not in COMMITS:
            raise OSError(f"404: no {revision} of {repo}")
        return str(self.folder / "snapshots" / commit)

    def dataset_info(self, repo: str, revision: str | None, timeout: float) -> Any:
        return type("Info", (), {"sha": self.commit(revision)})

    def load_dataset(self, repo: str, revision: str, name: str = "one", **_: Any) -> Any:
        if not self.is_reachable:
            raise OSError("no network")
        if name not in ("one", "two"):
            raise ValueError(f"BuilderConfig {name!r} not found. Available: ['one', 'two']")
        word = f"{name} {revision[0]} "
        rows = [{"text": word + text} for text in self.texts]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture
def hub(tmp_path: Path, teacher_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    hub = Hub(tmp_path / "hub", teacher_folder, texts)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(corpus_module, "HfApi", lambda: hub)
    monkeypatch.setattr(corpus_module.datasets, "load_dataset", hub.load_dataset)
    corpus_module._hub_stream.cache_clear()
    return hub


def recipe(tmp_path: Path, teacher: str = "org/teacher", source: str = "org/data") -> Recipe:
    return recipe_from_dict(
        {
            "teacher": teacher,
            "output": str(tmp_path / "run"),
            "data": {"source": source, "block_length": 32, "search_fraction": 0.2},
            "search": {"bin": {"low": 30_000, "high": 45_000}},
            "pretrain": {"baselines": ["org/teacher@old"], "tokens": 128},
            "train": {"use_cpu": True, "per_device_train_batch_size": 4},
        }
    )


def test_a_run_goes_on_with_the_commits_that_it_was_begun_with(hub: Hub, tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as first:
        fingerprint = first.text.fingerprint
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    names = ("org/data", "org/teacher", "org/teacher@old")
    assert inputs["revisions"] == dict.fromkeys(names, COMMITS[0])
    hub.main = COMMITS[1]
    with open_run(recipe(tmp_path)) as again:
        assert again.teacher.folder.name == COMMITS[0]
        assert again.text.fingerprint == fingerprint
        assert again.recipe.teacher == "org/teacher"  # as the user wrote it
    shutil.rmtree(tmp_path / "run")
    with open_run(recipe(tmp_path)) as new:
        assert new.teacher.folder.name == COMMITS[1]
        assert new.baselines["org/teacher@old"].folder.name == COMMITS[0]
        assert new.text.fingerprint != fingerprint


def test_a_run_that_has_its_inputs_starts_without_a_network(hub: Hub, tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as first:
        fingerprint = first.text.fingerprint
    hub.is_reachable = False
    corpus_module._hub_stream.cache_clear()
    with open_run(recipe(tmp_path)) as again:
        assert again.text.fingerprint == fingerprint
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"org/data is no local file .*check them and the network"):
        open_run(recipe(tmp_path)).__enter__()


def test_revisions_and_configs_are_chosen_by_name(hub: Hub, tmp_path: Path) -> None:
    hub.main = COMMITS[1]
    assert Checkpoint.open("org/teacher").folder.name == COMMITS[1]
    assert Checkpoint.open("org/teacher@old").folder.name == COMMITS[0]
    seen = {}
    for source in ("org/data", "org/data@old", "org/data:two", "org/data:two@old"):
        corpus = corpus_module.find_corpus(source)
        text = next(corpus_module.texts_of(corpus, 0, DataSettings.text_column))
        seen[source] = text.split()[:2]
    assert list(seen.values()) == [["one", "2"], ["one", "1"], ["two", "2"], ["two", "1"]]


def test_a_config_or_revision_that_there_is_not_is_told(hub: Hub, tmp_path: Path) -> None:
    configs = r"org/data:three@1+ cannot be read: .*Available: \['one', 'two'\]; choose a config"
    with pytest.raises(UserError, match=configs):
        open_run(recipe(tmp_path, source="org/data:three")).__enter__()
    with pytest.raises(UserError, match=r"'org/teacher@v9' is neither .* \(404: no v9"):
        Checkpoint.open("org/teacher@v9")
