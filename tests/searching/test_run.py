"""The whole search on a small teacher: what it writes, and that it is pinned and not repeated."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import extract, is_mapped
from tests.searching.conftest import BLOCK_LENGTH
from transformers import AutoConfig, AutoModelForCausalLM

from headstart.calibration import layer_by_layer
from headstart.calibration import start as start_module
from headstart.calibration.costs import propagation_flops, refit_flops, teacher_pass_flops
from headstart.losses.next_token import mean_loss
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import build_student
from headstart.model.spec import SubnetSpec, load_spec
from headstart.runs.extraction import extract_found
from headstart.searching import orders as orders_module
from headstart.searching import teacher as teacher_module
from headstart.searching.bins import Bin, BinSettings
from headstart.searching.candidate import Candidate
from headstart.searching.evolution import EvolutionSettings
from headstart.searching.finalists import FinalistSettings
from headstart.searching.fitness import HeldOutLoss
from headstart.searching.grid import GridSettings
from headstart.searching.importance import measure_importance
from headstart.searching.racing import RacingSettings
from headstart.searching.run import search, search_bins
from headstart.searching.settings import SearchSettings
from headstart.searching.space import Space
from headstart.searching.teacher import SearchedTeacher
from headstart.system.errors import UserError
from headstart.text.blocks import TokenBlocks

SETTINGS = SearchSettings(
    bin=BinSettings(low="25K", high="35K"),
    evolution=EvolutionSettings(population=5, generations=3, elites=2),
    tokens=300,
    calibration_tokens=600,
    refit_tokens=100,
    batch_size=4,
    racing=RacingSettings(rungs=3),
)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


def journal_of(folder: Path) -> list[dict[str, Any]]:
    """All scores."""
    return list(map(json.loads, (folder / "search.jsonl").read_text().splitlines()[1:]))


def dying_after(num_calls: int) -> Callable[..., float]:
    """A fitness that is killed in its next call."""
    evaluate, calls = HeldOutLoss.__call__, []

    def call(self: HeldOutLoss, candidate: Candidate, start: int, stop: int) -> float:
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        calls.append(candidate)
        return evaluate(self, candidate, start, stop)

    return call


@pytest.mark.parametrize("order", ["activation", "contribution", "magnitude", "taylor", "teacher"])
@pytest.mark.parametrize(
    "space", ["coarse-uniform", "fine-uniform", "coarse-layerwise", "fine-layerwise"]
)
def test_the_winner_is_the_best_and_is_what_it_says(
    space: Any, order: Any, checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    of_units_alone = ("activation", "contribution")
    depth = "block_influence" if order in of_units_alone else order
    settings = replace(SETTINGS, scored_as="slice", space=space, order=order, layer_order=depth)
    result = search(checkpoint, blocks, settings, folder)
    assert result == json.loads((folder / "search.json").read_text())
    candidates = result["candidates"]
    assert len(candidates) == 15
    assert all(
        25_000 <= candidate["parameters"] == candidate["amount"] <= 35_000
        for candidate in candidates
    )
    winner, whole = candidates[result["winner"]], 10 * BLOCK_LENGTH  # 300 tokens round up
    assert result["loss"] == winner["loss"]
    assert (winner["tokens"], result["parameters"]) == (whole, winner["parameters"])
    assert (
        result["search_tokens"] == sum(candidate["tokens"] for candidate in candidates) < 15 * whole
    )

    teacher = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    state = {
        name: tensor for name, tensor in teacher.state_dict().items() if name != "lm_head.weight"
    }
    spec = load_spec(folder / "search.json")
    student = build_student(state.items(), checkpoint.architecture, spec)
    assert student.num_parameters() == result["parameters"]
    assert mean_loss(student, blocks.sample("search", 300), 4) == pytest.approx(
        result["loss"], 1e-5
    )
    if space.endswith("uniform"):
        extract(checkpoint.folder, spec, tmp_path / "student")
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
        tokens = blocks.sample("search", 300)
        with torch.no_grad():
            loss = float(student(input_ids=tokens, labels=tokens).loss)
        assert result["loss"] == pytest.approx(loss, abs=1e-5)
    if space.startswith("coarse") and order in ("teacher", "activation"):
        batches = blocks.sample("train", 600).split(4)
        scores = measure_importance(teacher, batches)
        for layer, kept in zip(spec.layers, spec.mlp, strict=True):
            first = range(len(kept))
            ranks = first if order == "teacher" else scores.orders().mlp[layer][: len(kept)]
            assert set(kept) == set(ranks)


@pytest.mark.parametrize("measure", ["flops_per_token", "kv_cache_bytes_per_token", "weight_bytes"])
def test_bins_of_every_measure(
    measure: Any, checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    bins = {"flops_per_token": ("50K", "70K"), "weight_bytes": ("100K", "140K")}
    low, high = bins.get(measure, (512, 768))
    settings = replace(SETTINGS, bin=BinSettings(low, high, measure=measure))
    result = search(checkpoint, blocks, settings, tmp_path)
    low, high = result["bin"]
    assert all(low <= candidate["amount"] <= high for candidate in result["candidates"])


def test_narrower_heads_and_divergence_and_finals(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    settings = replace(
        SETTINGS,
        scored_as="slice",
        fitness="kl",
        grid=GridSettings(head_dim_min=4, head_dim_step=4),
        racing=RacingSettings(rungs=1),
        finalists=FinalistSettings(count=3, steps=4, batch_size=2),
    )
    result = search(checkpoint, blocks, settings, tmp_path)
    assert len({candidate["sizes"]["head_dim"] for candidate in result["candidates"]}) > 1
    finals = [candidate for candidate in result["candidates"] if "trained_loss" in candidate]
    assert len(finals) == 3
    winner = result["candidates"][result["winner"]]
    assert winner["trained_loss"] == min(candidate["trained_loss"] for candidate in finals)
    shapes = {(candidate["sizes"]["layers"], candidate["sizes"]["embed"]) for candidate in finals}
    assert len(shapes) == 3
    (tmp_path / "search.json").unlink()
    lines = (tmp_path / "search.jsonl").read_text()
    again = search(checkpoint, blocks, settings, tmp_path)
    assert (tmp_path / "search.jsonl").read_text() == lines
    assert again == result
    extract(checkpoint.folder, load_spec(tmp_path / "search.json"), tmp_path / "student")

    # The winner's score is the mean divergence from the teacher, told from all logits at once.
    tokens = blocks.sample("search", 300)
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[:, :-1].double()
            for folder in (tmp_path / "student", checkpoint.folder)
        )
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    divergence = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert result["loss"] == winner["loss"] == pytest.approx(divergence, rel=1e-4)
    last = next(entry for entry in journal_of(tmp_path) if entry["loss"] == winner["trained_loss"])
    assert last["steps"] == 4


@pytest.mark.parametrize(
    ("init", "refitted"),
    [("slice", True), ("slice", False), ("least_squares", True), ("rotate+least_squares", True)],
)
def test_finalists_are_scored_as_a_student_that_is_extracted(
    init: Any, refitted: bool, checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    """Without a step of training, on the same tokens; the proportional shape is among them."""
    num_tokens = SETTINGS.calibration_tokens
    finalists = FinalistSettings(count=2, refitted=refitted, calibration_tokens=num_tokens)
    settings = replace(SETTINGS, init=init, finalists=finalists)
    result = search(checkpoint, blocks, settings, tmp_path)
    finals = [candidate for candidate in result["candidates"] if "trained_loss" in candidate]
    assert "proportional" in [candidate["origin"] for candidate in finals]
    winner = result["candidates"][result["winner"]]
    assert winner["trained_loss"] == min(candidate["trained_loss"] for candidate in finals)
    tokens = blocks.sample("train", settings.calibration_tokens)
    spec_file = tmp_path / "search.json"
    judged_by = "least_squares" if init == "slice" and refitted else init
    extract_found(
        checkpoint, spec_file, tmp_path / "student", init=judged_by, calibration_blocks=tokens
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    held_out = blocks.sample("search", settings.tokens)
    with torch.no_grad():
        loss = float(student(input_ids=held_out, labels=held_out).loss)
    assert winner["trained_loss"] == pytest.approx(loss, abs=1e-5)


def test_what_is_paid_is_told(checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path) -> None:
    """docs/search.md, section search.json: every key, and the sums from the models' own counts."""
    finalists = FinalistSettings(count=2, calibration_tokens=600, steps=5, batch_size=3)
    settings = replace(SETTINGS, finalists=finalists, order="taylor")
    result = search(checkpoint, blocks, settings, tmp_path)
    assert result.keys() == {
        "format", "teacher", "spec", "loss", "parameters", "bin", "measure", "init", "scored_as",
        "space", "order", "layer_order", "fitness", "settings", "calibration_flops",
        "correction_flops", "search_flops",
        "search_tokens", "search_seconds", "candidates", "winner", "front",
    }  # fmt: skip
    assert result["format"] == "headstart-search-result/1"
    assert result["teacher"]["hash"] == Checkpoint.open(checkpoint.folder).hash
    assert result["settings"] == json.loads(json.dumps(asdict(settings)))
    assert [result[key] for key in ("bin", "measure", "fitness", "front")] == [
        [25_000, 35_000], "parameters", "loss", [],
    ]  # fmt: skip
    assert [result[key] for key in ("space", "order", "layer_order")] == [
        "coarse-uniform", "taylor", "block_influence",
    ]  # fmt: skip

    teacher = Architecture.of(AutoConfig.from_pretrained(checkpoint.folder))
    assert result["teacher"]["sizes"] == teacher.sizes
    forward = teacher.count(BLOCK_LENGTH).inference_flops_per_token
    assert result["calibration_flops"] == 19 * BLOCK_LENGTH * 3 * forward  # 600 tokens round up
    trained_tokens = 5 * 3 * BLOCK_LENGTH
    tokens, flops = 0, teacher_pass_flops(teacher, 4, BLOCK_LENGTH)  # 100 tokens round up
    scored = [line for line in journal_of(tmp_path) if not line["started"]]
    for candidate in result["candidates"]:
        sizes = candidate["sizes"]
        assert sizes.keys() == {"layers", "embed", "head_dim", "kv_groups", "mlp"}
        student = AutoConfig.from_pretrained(
            checkpoint.folder,
            num_hidden_layers=sizes["layers"],
            hidden_size=sizes["embed"],
            num_attention_heads=3 * sizes["kv_groups"],
            num_key_value_heads=sizes["kv_groups"],
            intermediate_size=sizes["mlp"],
        )
        cost = Architecture.of(student).count(BLOCK_LENGTH)
        assert cost.parameters == candidate["parameters"]
        tokens += candidate["tokens"]
        flops += candidate["tokens"] * cost.inference_flops_per_token
        rungs = [line for line in scored if line["parameters"] == candidate["parameters"]]
        assert len({json.dumps(line["candidate"]) for line in rungs}) == 1
        flops += len(rungs) * refit_flops(teacher, Architecture.of(student).sizes, 4, BLOCK_LENGTH)
        if "trained_loss" in candidate:
            tokens += 10 * BLOCK_LENGTH
            flops += 10 * BLOCK_LENGTH * cost.inference_flops_per_token
            flops += trained_tokens * cost.training_flops_per_token
            flops += propagation_flops(teacher, Architecture.of(student).sizes, 19, BLOCK_LENGTH)
    assert (result["search_tokens"], result["search_flops"]) == (tokens, flops)
    longest: dict[tuple[str, int], float] = {}  # a line tells the seconds of earlier rungs too
    for line in journal_of(tmp_path):
        key = (json.dumps(line["candidate"]), line["steps"])
        longest[key] = max(longest.get(key, 0), line["seconds"])
    assert result["search_seconds"] == pytest.approx(sum(longest.values()))


def test_finals_decide(checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path) -> None:
    """By their losses in the journal, of which one that is no number never wins."""
    finalists = FinalistSettings(count=3, steps=2, batch_size=2)
    settings = replace(SETTINGS, racing=RacingSettings(rungs=1), finalists=finalists)
    search(checkpoint, blocks, settings, tmp_path)
    path = tmp_path / "search.jsonl"
    lines = path.read_text().splitlines()
    for losses, place in (((5.5, 5.0, 5.2), 1), ((None, 5.4, 5.3), 2), ((5.1, None, None), 0)):
        finals = [
            {**json.loads(line), "loss": loss}
            for line, loss in zip(lines[-3:], losses, strict=True)
        ]
        path.write_text("\n".join([*lines[:-3], *map(json.dumps, finals)]) + "\n")
        (tmp_path / "search.json").unlink()
        result = search(checkpoint, blocks, settings, tmp_path)
        json.loads((tmp_path / "search.json").read_text(), parse_constant=pytest.fail)
        told = [candidate for candidate in result["candidates"] if "trained_loss" in candidate]
        assert sorted(map(str, (candidate["trained_loss"] for candidate in told))) == sorted(
            map(str, losses)
        )
        winner = result["candidates"][result["winner"]]
        assert winner["trained_loss"] == losses[place]
        assert len(load_spec(tmp_path / "search.json").layers) == winner["sizes"]["layers"]
        assert result["parameters"] == winner["parameters"] == finals[place]["parameters"]


def test_a_search_of_nothing_but_nan_is_refused(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOutLoss, "__call__", lambda *arguments: math.nan)
    with pytest.raises(ValueError, match="no candidate of 15 has a finite loss"):
        search(checkpoint, blocks, SETTINGS, tmp_path)
    assert not (tmp_path / "search.json").exists()


def test_a_finished_search_is_not_repeated(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(checkpoint, blocks, SETTINGS, tmp_path)
    monkeypatch.setattr(HeldOutLoss, "__call__", dying_after(0))
    (tmp_path / "search.json").unlink()
    assert search(checkpoint, blocks, SETTINGS, tmp_path) == first  # from the journal alone
    monkeypatch.setattr(teacher_module, "load_frozen", None)
    assert search(checkpoint, blocks, SETTINGS, tmp_path) == first


@pytest.mark.parametrize(("scored_as", "shares"), [("refitted", True), ("slice", False)])
def test_processes_share_a_teacher_whose_candidates_are_refitted(
    scored_as: Any, shares: bool, checkpoint: Checkpoint, blocks: TokenBlocks
) -> None:
    """Nothing is written to its weights, which are its files in memory."""
    settings = replace(SETTINGS, scored_as=scored_as)
    loaded = SearchedTeacher.load(checkpoint, blocks, settings, {})
    space = Space.build(checkpoint.architecture, settings.space, Bin(25_000, 35_000))
    assert math.isfinite(loaded.fitness(space.sample(random.Random(0)), 0, 1))
    weights = loaded.fitness.state.values()
    assert all(is_mapped(weight, checkpoint.folder) is shares for weight in weights)


def test_another_search_does_not_go_on_from_this_one(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HeldOutLoss, "__call__", dying_after(2))
        search(checkpoint, blocks, SETTINGS, tmp_path)
    assert not (tmp_path / "search.json").exists()
    with pytest.raises(ValueError, match=r"another search \(settings"):
        search(checkpoint, blocks, replace(SETTINGS, unit_noise=0.1), tmp_path)
    other = TokenBlocks(blocks.folder, {**blocks.manifest, "fingerprint": "other"})
    with pytest.raises(ValueError, match=r"another search \(data is .* 'other' here"):
        search(checkpoint, other, SETTINGS, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"another search \(teacher_hash"):
        search(Checkpoint.open(tmp_path / "teacher"), blocks, SETTINGS, tmp_path)


def test_a_tradeoff_ends_with_its_front(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    evolution = replace(SETTINGS.evolution, tradeoff="parameters")
    settings = replace(SETTINGS, evolution=evolution, racing=RacingSettings(rungs=1))
    result = search(checkpoint, blocks, settings, tmp_path)
    points = [(candidate["loss"], candidate["parameters"]) for candidate in result["candidates"]]
    front = [
        place
        for place, (loss, size) in enumerate(points)
        if not any(a <= loss and b <= size and (a, b) != (loss, size) for a, b in points)
    ]
    assert sorted(result["front"]) == front and result["winner"] in front


def other_arithmetic(*arguments: Any) -> Any:
    """Importance as another machine might measure it: with other ranks."""
    found = measure_importance(*arguments)
    return replace(found, mlp=-found.mlp, embed=-found.embed)


def test_a_search_that_goes_on_with_other_arithmetic_reads_the_same_ranks(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(checkpoint, blocks, SETTINGS, tmp_path / "uninterrupted")
    folder = tmp_path / "moved"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HeldOutLoss, "__call__", dying_after(7))
        search(checkpoint, blocks, SETTINGS, folder)
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "another machine's"))
    monkeypatch.setattr(orders_module, "measure_importance", other_arithmetic)
    assert timeless(search(checkpoint, blocks, SETTINGS, folder)) == timeless(expected)

    # Without its orders the journal's ranks mean nothing.
    (folder / "orders.json").unlink()
    (folder / "search.json").unlink()
    with pytest.raises(UserError, match=r"another search \(orders is "):
        search(checkpoint, blocks, SETTINGS, folder)


def timeless(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if key != "search_seconds"}


@pytest.mark.parametrize("order", ["activation", "taylor"])
def test_importance_reads_batches_of_a_fixed_size_whatever_memory_is_free(
    order: Any,
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, found = [], []

    def watch(model: Any, batches: Any, *more: Any) -> Any:
        sizes.append([batch.numel() for batch in batches])
        return measure_importance(model, batches, *more)

    monkeypatch.setattr(layer_by_layer, "TOKENS_PER_BATCH", 4 * BLOCK_LENGTH)
    monkeypatch.setattr(orders_module, "measure_importance", watch)
    for batch_size in (1, 16):
        monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / f"cache-{batch_size}"))
        monkeypatch.setattr(teacher_module, "fitting_batch_size", lambda *_, size=batch_size: size)
        settings = replace(SETTINGS, order=order)
        folder = tmp_path / str(batch_size)
        search(checkpoint, blocks, settings, folder)
        found.append((folder / "orders.json").read_text())
    assert sizes == [[4 * BLOCK_LENGTH] * 4 + [3 * BLOCK_LENGTH]] * 2
    assert found[0] == found[1]


def test_tokens_of_calibration_that_are_left_open_are_those_that_suit_the_teacher(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a journal that was begun with their number."""
    monkeypatch.setattr(start_module.calibration_tokens, "__defaults__", (600,))
    given = search(checkpoint, blocks, SETTINGS, tmp_path)
    assert SETTINGS.calibration_tokens == 600
    (tmp_path / "search.json").unlink()
    assert search(checkpoint, blocks, replace(SETTINGS, calibration_tokens=0), tmp_path) == given


def test_importance_is_measured_once_for_a_teacher_and_its_text(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = orders_module.measure_importance

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(orders_module, "measure_importance", counted)
    for place, settings in enumerate(
        (SETTINGS, replace(SETTINGS, space="fine-uniform"), replace(SETTINGS, order="magnitude"))
    ):
        search(checkpoint, blocks, settings, tmp_path / str(place))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 0}, "search.tokens is 0"),
        ({"calibration_tokens": -1}, "search.calibration_tokens is -1"),
        ({"refit_tokens": 0}, "search.refit_tokens is 0"),
        ({"batch_size": -1}, "search.batch_size is -1"),
        ({"unit_noise": 1.5}, "search.unit_noise is 1.5"),
        ({"bins": (BinSettings(around="1M"),)}, "search.bin and search.bins are both set"),
        ({"bin": BinSettings(), "bins": (BinSettings(around="1M"),) * 2}, "holds '1M' twice"),
        ({"evolution": EvolutionSettings(tradeoff="parameters")}, "racing.rungs to 1"),
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


def test_bins_share_one_teacher_and_find_what_each_finds_alone(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bins = {"small": BinSettings(low="25K", high="30K"), "large": BinSettings(around="40K")}
    searches = {tmp_path / name: replace(SETTINGS, bin=bin) for name, bin in bins.items()}
    alone = [
        search(checkpoint, blocks, settings, tmp_path / f"{folder.name} alone")
        for folder, settings in searches.items()
    ]
    loads = []
    load = SearchedTeacher.load
    monkeypatch.setattr(SearchedTeacher, "load", lambda *given: loads.append(given) or load(*given))
    together = list(search_bins(checkpoint, blocks, searches))
    assert len(loads) == 1
    for ours, theirs in zip(together, alone, strict=True):
        assert without_times(ours) == without_times(theirs)
    assert list(search_bins(checkpoint, blocks, searches)) == together
    assert len(loads) == 1, "what is finished needs no teacher"


def without_times(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if not key.endswith("seconds")}
