"""The whole search on a small teacher: what it writes, and that it goes on where it stopped."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from headstart.data import DataSettings, TokenBlocks, prepare
from headstart.search.evolution import EvolutionSettings
from headstart.search.fitness import HeldOutLoss
from headstart.search.search import SearchSettings, load_spec, search
from headstart.search.space import BinSettings, Candidate
from headstart.subnet.extract import extract
from headstart.subnet.spec import SubnetSpec

SETTINGS = SearchSettings(
    bin=BinSettings(low="25K", high="35K"),
    evolution=EvolutionSettings(population=5, generations=3, elites=2),
    tokens=300,
    calibration_tokens=600,
    batch_size=4,
)
NUM_CANDIDATES = 15
BLOCK_LENGTH = 32


@pytest.fixture(scope="module")
def blocks(
    corpus: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TokenBlocks:
    settings = DataSettings(str(corpus), block_length=BLOCK_LENGTH, search_fraction=0.2)
    return prepare(settings, teacher_folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(
    params=[(space, order) for space in ("coarse", "fine") for order in ("teacher", "importance")],
    ids="-".join,
)
def settings(request: pytest.FixtureRequest) -> SearchSettings:
    """Each space in each order."""
    space, order = request.param
    return replace(SETTINGS, space=f"{space}-uniform", order=order)


def timeless(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """search.json and search.jsonl without what a clock says."""
    result = json.loads((folder / "search.json").read_text())
    journal = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    assert result.pop("search_seconds") == sum(line.pop("seconds", 0) for line in journal)
    return result, journal


def dying_after(num_calls: int) -> Callable[[HeldOutLoss, Candidate], float]:
    """A fitness that is killed in its next call."""
    evaluate, calls = HeldOutLoss.__call__, []

    def call(self: HeldOutLoss, candidate: Candidate) -> float:
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        calls.append(candidate)
        return evaluate(self, candidate)

    return call


def test_the_winner_is_the_best_and_is_what_it_says(
    settings: SearchSettings, teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = search(teacher_folder, blocks, settings, folder)
    assert result == json.loads((folder / "search.json").read_text())
    by_importance = settings.order == "importance"
    kept = {"importance.safetensors"} if by_importance else set()
    assert {file.name for file in folder.iterdir()} == {"search.json", "search.jsonl"} | kept

    candidates = result["candidates"]
    assert len(candidates) == NUM_CANDIDATES
    assert all(25_000 <= one["parameters"] <= 35_000 for one in candidates)
    winner = candidates[result["winner"]]
    assert result["loss"] == winner["loss"] == min(one["loss"] for one in candidates)
    assert result["parameters"] == winner["parameters"]
    assert (result["bin"], result["space"]) == ([25_000, 35_000], settings.space)

    extract(teacher_folder, load_spec(folder / "search.json"), tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert student.num_parameters() == result["parameters"]
    tokens = torch.from_numpy(blocks.split("search")[:10].astype("int64"))  # 300 tokens round up
    with torch.no_grad():
        loss = float(student(input_ids=tokens, labels=tokens).loss)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["search_tokens"] == 10 * BLOCK_LENGTH * NUM_CANDIDATES
    assert (result["calibration_flops"] > 0) == by_importance


def test_coarse_candidates_keep_the_first_units_of_their_order(
    teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    def spec_in(order: Any) -> SubnetSpec:
        search(teacher_folder, blocks, replace(SETTINGS, order=order), tmp_path / order)
        return load_spec(tmp_path / order / "search.json")

    spec = spec_in("teacher")
    for units in (spec.layers, spec.embed, *spec.kv_groups, *spec.mlp):
        assert units == tuple(range(len(units)))

    spec = spec_in("importance")
    scores = load_file(tmp_path / "importance" / "importance.safetensors")

    def most_important(scores: torch.Tensor, units: tuple[int, ...]) -> bool:
        return set(units) == set(scores.topk(len(units)).indices.tolist())

    assert most_important(scores["layers"], spec.layers)
    assert most_important(scores["embed"], spec.embed)
    for position, layer in enumerate(spec.layers):
        assert most_important(scores["mlp"][layer], spec.mlp[position])
        assert most_important(scores["kv_groups"][layer], spec.kv_groups[position])


def test_a_finished_search_is_not_repeated(
    teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(teacher_folder, blocks, SETTINGS, tmp_path)
    monkeypatch.setattr(HeldOutLoss, "__call__", dying_after(0))
    monkeypatch.setattr("headstart.search.search.activation_importance", None)
    assert search(teacher_folder, blocks, SETTINGS, tmp_path) == first
    (tmp_path / "search.json").unlink()
    assert search(teacher_folder, blocks, SETTINGS, tmp_path) == first  # from the journal alone


def test_a_killed_search_ends_like_one_that_was_not(
    settings: SearchSettings, teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    search(teacher_folder, blocks, settings, tmp_path / "whole")
    for num_evaluations in (0, 7, NUM_CANDIDATES - 1):
        folder = tmp_path / str(num_evaluations)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(HeldOutLoss, "__call__", dying_after(num_evaluations))
            search(teacher_folder, blocks, settings, folder)
        assert not (folder / "search.json").exists()
        search(teacher_folder, blocks, settings, folder)
        assert timeless(folder) == timeless(tmp_path / "whole")


@pytest.mark.parametrize("num_evaluations", [None, 2], ids=["calibrating", "evaluating"])
def test_another_search_does_not_go_on_from_this_one(
    num_evaluations: int | None, teacher_folder: Path, blocks: TokenBlocks, tmp_path: Path
) -> None:
    """Neither the journal nor the importance of a killed search is taken for another's."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if num_evaluations is None:
            patch.setattr("headstart.search.search.activation_importance", killed)
        else:
            patch.setattr(HeldOutLoss, "__call__", dying_after(num_evaluations))
        search(teacher_folder, blocks, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"another search \(settings"):
        search(teacher_folder, blocks, replace(SETTINGS, unit_noise=0.1), tmp_path)
    other = TokenBlocks(blocks.folder, {**blocks.manifest, "fingerprint": "other"})
    with pytest.raises(ValueError, match=r"another search \(data is .* 'other' here"):
        search(teacher_folder, other, SETTINGS, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"another search \(teacher_hash"):
        search(tmp_path / "teacher", blocks, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 0}, "search.tokens is 0"),
        ({"calibration_tokens": -1}, "search.calibration_tokens is -1"),
        ({"batch_size": 0}, "search.batch_size is 0"),
        ({"unit_noise": 1.5}, "search.unit_noise is 1.5"),
    ],
)
def test_settings_errors_name_the_setting(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changed)


SPEC = SubnetSpec((0, 2), (1, 2, 3), ((0,), (1,)), ((4, 5), (5, 6)))


def test_a_spec_is_read_with_or_without_its_surroundings(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    for content in (SPEC.to_json(), {"loss": 3.0, "spec": SPEC.to_json()}):
        path.write_text(json.dumps(content))
        assert load_spec(path) == SPEC


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", "holds no spec"),
        ('{"spec": 3}', "holds no spec"),
        ('{"spec": null}', "holds no spec"),
        ('{"loss": 3.0}', "lacks embed, kv_groups, layers, mlp"),
        (json.dumps({**SPEC.to_json(), "embed": "1-"}), "'1-' is not a list of indices"),
    ],
)
def test_spec_errors_tell_the_mistake(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_spec(path)


def test_spec_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        load_spec(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="is a folder"):
        load_spec(tmp_path)
