"""headstart from Python, with models and documents in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import extract as extract_to_disk
from tests.conftest import random_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import headstart
from headstart.calibration.start import Calibration, calibrate
from headstart.losses.next_token import mean_loss
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import build_student
from headstart.runs.extraction import extract_found
from headstart.searching.evolution import EvolutionSettings
from headstart.searching.grid import GridSettings
from headstart.system import device
from headstart.text.prepare import prepare

TOKENS = torch.arange(1, 21)[None]
SETTINGS = headstart.SearchSettings(
    space="fine-layerwise",
    grid=GridSettings(embed_step=12, mlp_step=16),
    evolution=EvolutionSettings(population=4, generations=2, elites=2),
    tokens=256,
    calibration_tokens=256,
)


@pytest.fixture
def texts(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def test_from_a_model_in_memory_to_a_trained_student(
    texts: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    teacher = random_teacher("llama-untied-gqa")
    bin = headstart.Bin(30_000, 45_000)
    output = tmp_path / "run"
    data = headstart.DataSettings(block_length=32)

    def found() -> Any:
        return headstart.search(teacher, texts, bin, output, SETTINGS, tokenizer, data)

    first = found()
    journal = (output / "search.jsonl").read_bytes()
    assert found() == first and (output / "search.jsonl").read_bytes() == journal
    assert bin.low <= first.parameters <= bin.high

    student = headstart.extract(teacher, first.spec)
    assert headstart.count(student).parameters == first.parameters == student.num_parameters()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result = headstart.pretrain(
        student,
        teacher,
        texts,
        tmp_path / "trained",
        tokens=500,
        arms=[headstart.Arm("subnet")],
        settings=headstart.PretrainSettings(test_tokens=256, evaluations=1),
        train={"per_device_train_batch_size": 4, "use_cpu": True, "bf16": False},
        tokenizer=tokenizer,
        data=data,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    trained = tmp_path / "trained" / "arms" / "subnet" / "model"
    scores = {
        name: headstart.evaluate(model, texts, 256, tokenizer, data)["loss"]
        for name, model in {"before": student, "after": trained}.items()
    }
    (arm,) = result["arms"]
    assert scores["before"] == pytest.approx(arm["loss_before"], abs=0.02)
    assert scores["after"] == pytest.approx(arm["loss_final"], abs=0.02)


@pytest.mark.parametrize("kind", ["llama-tied-gqa", "gpt_neox-untied", "gemma3_text-tied"])
def test_extract_is_what_is_written_to_disk_and_shares_nothing(kind: str, tmp_path: Path) -> None:
    teacher = random_teacher(kind)
    teacher.save_pretrained(tmp_path / "teacher")
    sizes = Architecture.of(teacher.config).sizes
    spec = headstart.SubnetSpec(
        layers=(0, 2),
        embed=tuple(range(32)),
        kv_groups=((0, 1), (1,)),
        mlp=(tuple(range(sizes["mlp"])), tuple(range(0, 40, 2))),
    )
    written = AutoModelForCausalLM.from_pretrained(
        extract_to_disk(tmp_path / "teacher", spec, tmp_path / "written")
    )
    in_memory = headstart.extract(teacher, spec)
    from_disk = headstart.extract(tmp_path / "teacher", spec)
    architecture = Architecture.of(teacher.config)
    expected = build_student(teacher.state_dict().items(), architecture, spec)(TOKENS).logits
    with torch.no_grad():
        for student in (written, in_memory, from_disk):
            assert torch.equal(student(TOKENS).logits, expected)
    in_memory.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(TOKENS).logits, expected)
    assert all(parameter.requires_grad for parameter in in_memory.parameters())
    whole = teacher(TOKENS).logits.detach()
    with torch.no_grad():
        for parameter in in_memory.parameters():
            parameter.zero_()
    assert torch.equal(teacher(TOKENS).logits, whole)


@pytest.mark.parametrize("init", ["least_squares", "rotate+least_squares"])
def test_a_calibrated_student_is_what_was_scored_and_refitted(
    init: Any, corpus: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    data = headstart.DataSettings(block_length=32, search_fraction=0.2)
    settings = replace(SETTINGS, init=init, refit_tokens=128)

    def search() -> headstart.Found:
        bin = headstart.Bin(30_000, 45_000)
        return headstart.search(teacher_folder, corpus, bin, tmp_path / "run", settings, data=data)

    found = search()
    assert search() == found
    blocks = prepare(replace(data, source=str(corpus)), teacher_folder)
    text = blocks.sample("train", settings.calibration_tokens)
    source = calibrate(Checkpoint.open(teacher_folder), init, text)
    as_scored = Calibration(source.teacher, blocks=blocks.sample("train", settings.refit_tokens))
    losses = [
        mean_loss(
            headstart.extract(teacher_folder, found.spec, calibration),
            blocks.sample("search", settings.tokens),
            4,
        )
        for calibration in (as_scored, found.calibration)
    ]
    assert losses[0] == pytest.approx(found.loss, abs=1e-4)
    assert losses[1] != losses[0]  # refitted on more tokens


@pytest.mark.parametrize("init", ["slice", "least_squares"])
def test_the_python_path_charges_what_the_command_charges(
    init: Any, corpus: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search, calibration and refit are in FLOPs-to-match, however the student was cut out."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    data = headstart.DataSettings(block_length=32, search_fraction=0.2)
    bin = headstart.Bin(30_000, 45_000)
    settings = replace(SETTINGS, init=init)
    found = headstart.search(teacher_folder, corpus, bin, tmp_path / "run", settings, data=data)
    text = prepare(replace(data, source=str(corpus)), teacher_folder)
    blocks = None if init == "slice" else text.sample("train", settings.calibration_tokens)
    by_command = extract_found(
        Checkpoint.open(teacher_folder),
        tmp_path / "run" / "search.json",
        tmp_path / "student",
        calibration_blocks=blocks,
    )
    in_memory = headstart.extract(teacher_folder, found.spec, found.calibration)
    train = {"per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    settings = headstart.PretrainSettings(validation_tokens=64, evaluations=1)
    charged = [
        headstart.pretrain(
            student, teacher_folder, corpus, tmp_path / name, 128, [headstart.Arm("subnet")],
            settings, train, data=data,
        )
        for name, student in (("command", by_command), ("python", in_memory))
    ]  # fmt: skip
    costs = [result["costs"] for result in charged]
    assert costs[0] == costs[1] and costs[0]["search_flops"] == found.outcome["search_flops"] > 0
    assert costs[0]["calibration_flops"] >= found.outcome["calibration_flops"]
    first = [result["arms"][0]["curve"][0]["flops"] for result in charged]
    assert first[0] == first[1] == costs[0]["search_flops"] + costs[0]["calibration_flops"]


def test_a_trimmed_teacher_is_one_to_search(
    texts: list[str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    teacher, data = random_teacher("llama-tied-gqa"), headstart.DataSettings(block_length=32)
    wanted = headstart.VocabularySettings(96, keep=(texts[0],))
    folder = headstart.trim(teacher, texts, wanted, tmp_path / "trimmed", tokenizer, data)
    small = AutoTokenizer.from_pretrained(folder)
    plain = AutoTokenizer.from_pretrained(
        headstart.trim(teacher, texts, 96, tmp_path / "plain", tokenizer, data)
    )
    theirs = tokenizer(texts[0])["input_ids"]
    assert len(small) == len(plain) == 96
    assert len(small(texts[0])["input_ids"]) == len(theirs) <= len(plain(texts[0])["input_ids"])
    bin = headstart.Bin(30_000, 43_000)
    found = headstart.search(folder, texts, bin, tmp_path / "run", SETTINGS, data=data)
    student = headstart.extract(folder, found.spec, found.calibration)
    assert student.get_output_embeddings().weight.shape[0] == 96
    with pytest.raises(headstart.UserError, match=r"has no tokenizer\.json"):
        headstart.trim(teacher, texts, 96, tmp_path / "c")


def test_a_narrower_head_can_be_saved(tmp_path: Path) -> None:
    teacher = random_teacher("llama-untied-gqa")
    whole = headstart.SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    channels = (0, 2, 4, 6, 8, 10, 12, 14)
    spec = headstart.SubnetSpec(whole.layers, whole.embed, whole.kv_groups, whole.mlp, channels)
    student = headstart.extract(teacher, spec)
    student.save_pretrained(tmp_path / "saved")
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(TOKENS).logits, student(TOKENS).logits)


def test_a_model_from_elsewhere_is_no_student(texts: list[str], tmp_path: Path) -> None:
    teacher = random_teacher("llama-untied-gqa")
    with pytest.raises(ValueError, match=r"not cut out by headstart\.extract"):
        headstart.pretrain(teacher, teacher, texts, tmp_path / "run")


def test_a_tokenizer_that_comes_later_is_not_passed_over(
    texts: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    teacher = random_teacher("llama-untied-gqa")
    bin = headstart.Bin(1, 2)
    with pytest.raises(ValueError, match="no sub-network has between 1 and 2"):
        headstart.search(teacher, texts, bin, tmp_path / "run")
    with pytest.raises(ValueError, match="holds another model or tokenizer than the one in memory"):
        headstart.search(teacher, texts, bin, tmp_path / "run", tokenizer=tokenizer)


def test_a_number_that_is_none_is_refused_from_python_too(
    corpus: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, evolution=EvolutionSettings(crossover=float("nan")))
    bin = headstart.Bin(30_000, 45_000)
    with pytest.raises(headstart.UserError, match=r"search.evolution.crossover is nan; write a f"):
        headstart.search(teacher_folder, corpus, bin, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_other_documents_do_not_replace_those_of_a_run(
    texts: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    teacher, bin = random_teacher("llama-untied-gqa"), headstart.Bin(1, 2)
    for documents, message in ((texts, "no sub-network has"), (texts[:9], "holds other documents")):
        with pytest.raises(ValueError, match=message):
            headstart.search(teacher, documents, bin, tmp_path / "run", tokenizer=tokenizer)


def test_another_model_in_the_same_folder_is_refused(
    texts: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    for seed, message in (
        (0, "no sub-network has between 1 and 2"),
        (1, "holds another model or tokenizer than the one in memory"),
    ):
        teacher = random_teacher("llama-untied-gqa", seed)
        with pytest.raises(ValueError, match=message):
            headstart.search(
                teacher, texts, headstart.Bin(1, 2), tmp_path / "run", tokenizer=tokenizer
            )


def test_the_names_are_documented_and_come_late() -> None:
    from headstart import api

    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    for name in api.__all__:
        assert getattr(headstart, name) is getattr(api, name)
        assert f"`{name}" in text, name
    script = "import sys, headstart\nfrom headstart import cli\n"
    script += "assert 'torch' not in sys.modules\nheadstart.Bin\n"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="headstart has no serach; it has Arm"):
        _ = headstart.serach
