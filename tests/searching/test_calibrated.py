"""A search whose candidates are calibrated scores the very students that are cut out later."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from tests.conftest import extract, random_teacher
from tests.searching.conftest import BLOCK_LENGTH
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from headstart.calibration.costs import propagation_flops, slice_refit_flops
from headstart.calibration.start import Init, calibrate, calibration_flops, cut_architecture
from headstart.losses.next_token import mean_loss
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import load_spec
from headstart.runs.extraction import extract_found
from headstart.searching.bins import BinSettings
from headstart.searching.evolution import EvolutionSettings
from headstart.searching.grid import GridSettings
from headstart.searching.plan import plan_search
from headstart.searching.racing import RacingSettings
from headstart.searching.run import search, space_of
from headstart.searching.settings import SearchSettings
from headstart.searching.space import SpaceName
from headstart.system import device
from headstart.text.blocks import TokenBlocks

SETTINGS = SearchSettings(
    bin=BinSettings(low="25K", high="35K"),
    evolution=EvolutionSettings(population=5, generations=2, elites=2),
    racing=RacingSettings(rungs=1),
    tokens=300,
    calibration_tokens=600,
    refit_tokens=100,
)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and float32 also where bfloat16 is fast."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)


@pytest.mark.parametrize("fitness", ["loss", "kl"])
@pytest.mark.parametrize("space", get_args(SpaceName))
@pytest.mark.parametrize("scored_as", ["slice", "refitted"])
@pytest.mark.parametrize("init", get_args(Init))
def test_the_winners_score_is_that_of_the_student_cut_so(
    init: Init,
    scored_as: Literal["slice", "refitted"],
    space: SpaceName,
    fitness: Literal["loss", "kl"],
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    tmp_path: Path,
) -> None:
    """As transformers reads it from disk, where a run writes it; heads are whole, or narrower."""
    head_dim = 8 if fitness == "kl" and space.startswith("coarse") else 0
    grid = GridSettings(head_dim_min=head_dim, head_dim_step=head_dim)
    settings = replace(
        SETTINGS, init=init, scored_as=scored_as, space=space, fitness=fitness, grid=grid
    )
    found = search(checkpoint, blocks, settings, tmp_path)
    source = calibrate(checkpoint, init, blocks.sample("train", settings.calibration_tokens))
    refit_blocks = blocks.sample("train", settings.refit_tokens)
    as_scored = extract(
        source.teacher.folder,
        load_spec(tmp_path / "search.json"),
        tmp_path / "as-scored",
        blocks=refit_blocks if scored_as == "refitted" else None,
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (as_scored, checkpoint.folder)
    )
    held_out = blocks.sample("search", settings.tokens)
    with torch.no_grad():
        ours, theirs = (model(held_out).logits.log_softmax(-1) for model in (student, teacher))
    nats = -ours[:, :-1].gather(-1, held_out[:, 1:, None])
    if fitness == "kl":
        nats = (theirs.exp() * (theirs - ours)).sum(-1)[:, :-1]
    assert found["loss"] == pytest.approx(float(nats.mean()), abs=1e-4)
    assert student.num_parameters() == found["parameters"]


@pytest.mark.parametrize("init", get_args(Init))
def test_the_student_is_started_as_the_search_says(
    init: Init, checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    """With as many tokens, least squares ends with the very weights that were scored."""
    found = search(checkpoint, blocks, replace(SETTINGS, init=init), tmp_path)
    text = blocks.sample("train", SETTINGS.refit_tokens)
    out = extract_found(
        checkpoint, tmp_path / "search.json", tmp_path / "out", calibration_blocks=text
    )
    student = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    loss = mean_loss(student, blocks.sample("search", SETTINGS.tokens), 4)
    is_scored_so = init == "least_squares"
    assert (abs(loss - found["loss"]) < 1e-4) == is_scored_so
    written = json.loads((out / "subnet.json").read_text())
    assert written["init"] == found["init"] == init
    assert written["teacher"] == found["teacher"]["name"] == str(checkpoint.folder)
    assert written["teacher_hash"] == found["teacher"]["hash"]


def test_calibration_is_charged(
    checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    costs = {}
    for init in get_args(Init):
        settings = replace(SETTINGS, init=init, order="teacher", layer_order="teacher")
        costs[init] = search(checkpoint, blocks, settings, tmp_path / init)["calibration_flops"]
    shape = blocks.sample("train", SETTINGS.calibration_tokens).shape
    teacher = checkpoint.architecture
    rotation = calibration_flops(teacher, "rotate+least_squares", *shape)
    assert costs == {"slice": 0, "least_squares": 0, "rotate+least_squares": rotation}


@pytest.mark.parametrize("head_dim", [None, 8])
@pytest.mark.parametrize("init", get_args(Init))
def test_extraction_pays_for_what_was_not_measured_yet(
    init: Init,
    head_dim: int | None,
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    tmp_path: Path,
) -> None:
    grid = GridSettings(head_dim_min=head_dim or 0)
    settings = replace(SETTINGS, init=init, grid=grid)
    found = search(checkpoint, blocks, settings, tmp_path)
    text = blocks.sample("train", settings.calibration_tokens)
    out = extract_found(
        checkpoint, tmp_path / "search.json", tmp_path / "out", calibration_blocks=text
    )
    paid = json.loads((out / "subnet.json").read_text())["calibration_flops"]
    teacher = cut_architecture(checkpoint.architecture, init)
    outputs = 2 * teacher.sizes["vocab"] * teacher.sizes["embed"]
    forward = teacher.count(BLOCK_LENGTH).inference_flops_per_token - outputs
    importance = text.numel() * forward
    measured = calibration_flops(teacher, init, *text.shape)
    kept = load_spec(tmp_path / "search.json")
    has_narrow_heads, sizes = kept.head_dim is not None, kept.sizes(teacher.sizes)
    needs = init == "rotate+least_squares" or has_narrow_heads
    refit = propagation_flops(teacher, sizes, *text.shape) if init != "slice" else 0
    if init != "slice" and (init == "rotate+least_squares" or has_narrow_heads):
        # What is cut is refitted by the moments first.
        refit += slice_refit_flops(teacher, sizes, is_rotated=init == "rotate+least_squares")
    assert paid == importance + measured * needs + refit
    assert found["calibration_flops"] <= paid


def test_the_student_of_a_rotated_teacher_has_an_output_matrix_of_its_own(
    checkpoint: Checkpoint,
) -> None:
    """And the bin counts it."""
    teacher, config = checkpoint.architecture, checkpoint.architecture.config
    assert config.tie_word_embeddings
    plain, rotated = (
        space_of(teacher, replace(SETTINGS, init=init), BLOCK_LENGTH).rows
        for init in ("least_squares", "rotate+least_squares")
    )
    # The largest reachable size is the whole teacher's.
    assert rotated.largest == plain.largest + config.vocab_size * config.hidden_size


def test_a_plan_charges_calibration_too(checkpoint: Checkpoint) -> None:
    teacher = checkpoint.architecture
    sliced, refitted = (
        plan_search(teacher, replace(SETTINGS, init=init), BLOCK_LENGTH)
        for init in ("slice", "least_squares")
    )
    refits = [
        propagation_flops(teacher, teacher.sizes | {"layers": layers}, 19, BLOCK_LENGTH)
        for layers in (1, teacher.sizes["layers"])
    ]
    assert refits[0] < refitted.flops[0] - sliced.flops[0] < refits[1]


@pytest.mark.parametrize("fitness", ["loss", "kl"])
@pytest.mark.parametrize("scored_as", ["slice", "refitted"])
@pytest.mark.parametrize("init", ["slice", "rotate+least_squares"])
@pytest.mark.parametrize("rungs", [1, 3])
def test_a_plan_of_one_shape_is_what_its_search_is_charged(
    rungs: int,
    init: Any,
    scored_as: Any,
    fitness: Any,
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    tmp_path: Path,
) -> None:
    """Where there is nothing to sample, a plan is no estimate."""
    settings = replace(SETTINGS, init=init, scored_as=scored_as, fitness=fitness)
    teacher = cut_architecture(checkpoint.architecture, init)
    smallest = space_of(checkpoint.architecture, settings, BLOCK_LENGTH).rows.smallest
    bin, racing = BinSettings(low=smallest, high=smallest), RacingSettings(rungs=rungs)
    settings = replace(settings, bin=bin, racing=racing)
    plan = plan_search(checkpoint.architecture, settings, BLOCK_LENGTH)
    found = search(checkpoint, blocks, settings, tmp_path)
    assert plan.num_shapes == plan.num_candidates == len(found["candidates"]) == 1
    paid = found["calibration_flops"] + found["search_flops"]
    if init != "slice":  # the plan has the student's refit too, which extraction is charged with
        spec = load_spec(tmp_path / "search.json")
        paid += propagation_flops(teacher, spec.sizes(teacher.sizes), 19, BLOCK_LENGTH)
    assert plan.flops == (paid, paid)
    assert plan.finals_flops == 0


def test_a_teacher_that_cannot_be_rotated_is_refused_from_its_config() -> None:
    teacher = Architecture.of(random_teacher("olmo2-tied").config)
    with pytest.raises(ValueError, match="olmo2 teacher cannot be rotated"):
        space_of(teacher, replace(SETTINGS, init="rotate+least_squares"), BLOCK_LENGTH)


def test_extraction_without_its_text_is_refused(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    spec = {"layers": "0-3", "embed": "0-47", "kv_groups": ["0-1"] * 4, "mlp": ["0-79"] * 4}
    (tmp_path / "spec.json").write_text(json.dumps({"spec": spec, "init": "least_squares"}))
    with pytest.raises(ValueError, match="least_squares needs text to calibrate with"):
        extract_found(checkpoint, tmp_path / "spec.json", tmp_path / "out")
    extract_found(checkpoint, tmp_path / "spec.json", tmp_path / "out", init="slice")


@pytest.mark.parametrize(
    ("searched", "init"), [("rotate+least_squares", "slice"), ("slice", "rotate+least_squares")]
)
def test_channels_of_another_basis_are_refused(
    searched: str, init: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    spec = {"layers": "0-3", "embed": "0-23", "kv_groups": ["0-1"] * 4, "mlp": ["0-79"] * 4}
    (tmp_path / "spec.json").write_text(json.dumps({"spec": spec, "init": searched}))
    with pytest.raises(
        ValueError, match=rf"channels of a teacher that is .*; use --init {re.escape(searched)}"
    ):
        extract_found(checkpoint, tmp_path / "spec.json", tmp_path / "out", init=init)
    assert not (tmp_path / "out").exists()
