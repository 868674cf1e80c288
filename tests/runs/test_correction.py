"""A teacher that is tuned on the run's text first: what is made of it, and who pays for it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.runs.conftest import BLOCK_LENGTH, answer
from tests.runs.test_teachers import inference_flops
from transformers import AutoModelForCausalLM, AutoTokenizer

import headstart
from headstart.cli import main
from headstart.losses.next_token import mean_loss
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from headstart.runs import ahead, correction
from headstart.runs.ahead import run_cache_teacher, run_correct
from headstart.runs.plan import plan_correction, print_plans
from headstart.runs.run import needed_text
from headstart.runs.stages import run_recipe
from headstart.runs.vocabulary import planned_architecture
from headstart.system.errors import UserError
from headstart.system.files import shipped
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings
from headstart.training.plan import Hardware
from headstart.training.trainer import ReportStep

CLI = str(Path(__file__).parents[1] / "float32_cli.py")
STEP_TOKENS, TOKENS = 4 * BLOCK_LENGTH, 2500
STEPS = 20  # of 128 tokens


@pytest.fixture
def tree(recipe: dict[str, Any]) -> dict[str, Any]:
    """The small recipe with a correction of twenty steps."""
    recipe["search"] |= {"init": "slice", "scored_as": "slice", "calibration_tokens": 256}
    recipe["search"]["evolution"] = {"population": 2, "generations": 1, "elites": 1}
    recipe["pretrain"] |= {"tokens": 384, "evaluations": 1}
    recipe["teacher_correction"] = {"tokens": TOKENS, "learning_rate": 1e-3}
    return recipe


@pytest.fixture
def corrected(tree: dict[str, Any]) -> Checkpoint:
    return run_correct(recipe_from_dict(tree))


def test_who_begins_from_it_or_learns_from_it_pays(tree: dict[str, Any], tmp_path: Path) -> None:
    original = tree["teacher"]
    tree["pretrain"]["arms"] = [
        {"name": "scratch", "init": "random"},
        {"name": "learns", "init": "random", "kd": {}},
        {"name": "learns from the original", "init": "random", "kd": {"teacher": original}},
        {"name": "begins", "learning_rate": 1e-3},
        {"name": "begins, learns", "kd": {"top_k": 8, "cache": str(tmp_path / "cached")}},
        {"name": "begins, learns from the original", "kd": {"teacher": original}},
    ]
    (result,) = run_recipe(recipe_from_dict(tree))
    price = STEPS * STEP_TOKENS * 3 * inference_flops(4, 128)
    costs = result["costs"]
    assert costs["correction_flops"] == price
    search = costs["calibration_flops"] + costs["search_flops"]
    upfront = [0, price, 0, *[price + search] * 3]
    asked = 384 * inference_flops(4, 128)
    teachers = [0, asked, asked, 0, asked, asked]
    per_token = result["student"]["training_flops_per_token"]
    for arm, before, teacher in zip(result["arms"], upfront, teachers, strict=True):
        assert arm["curve"][0]["flops"] == before, arm["name"]
        assert arm["budgets"][-1]["flops"] == before + 384 * per_token + teacher
        ledger = {key: amount for key, amount in arm["flops"].items() if key != "evaluation"}
        assert sum(ledger.values()) == arm["budgets"][-1]["flops"]
        assert ledger["correction"] == before - (search if arm["init"] == "subnet" else 0)
    # All stages read the tuned weights, and the run knows them again.
    (folder,) = (tmp_path / "cache" / "corrected").iterdir()
    tuned, run = Checkpoint.open_whole(folder), Path(tree["output"])
    subnet = json.loads((run / "student" / "subnet.json").read_text())
    found = json.loads((run / "search.json").read_text())
    cache = json.loads((tmp_path / "cached" / "cache.json").read_text())
    hashes = (subnet["teacher_hash"], found["teacher"]["hash"], cache["teacher"])
    assert set(hashes) == {tuned.hash} and tuned.hash != Checkpoint.open(original).hash
    assert subnet["correction_flops"] == found["correction_flops"] == price
    assert result["teacher"]["correction"] == tuned.correction
    assert result["teacher"]["loss"] == pytest.approx(tuned.correction["loss_after"], abs=1e-5)
    assert "correction" in (run / "report.html").read_text()
    before = answer(run)
    run_recipe(recipe_from_dict(tree))
    assert answer(run) == before
    # Without the cache, and with a machine that rounds otherwise, it would be another teacher.
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the corrected teacher has changed since"):
        run_recipe(recipe_from_dict(tree))


@pytest.mark.exhaustive
def test_a_student_of_it_is_charged_wherever_it_is_trained(
    tree: dict[str, Any], corrected: Checkpoint, tmp_path: Path
) -> None:
    """Given by its folder, as the teacher of a run that corrects nothing itself."""
    del tree["teacher_correction"]
    tree["teacher"] = str(shutil.copytree(corrected.folder, tmp_path / "tuned"))
    (result,) = run_recipe(recipe_from_dict(tree))
    scratch, *others = (arm["flops"]["correction"] for arm in result["arms"])
    price = STEPS * STEP_TOKENS * 3 * inference_flops(4, 128)
    assert (scratch, others) == (0, [price, price])


def test_rates_rise_stay_and_fall(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: one step of twenty up, to 80 %, then down by one minus a root. The schedule of
    `train` is the arms'."""
    rates = list[float]()

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    monkeypatch.setattr(ReportStep, "on_step_begin", on_step_begin, raising=False)
    tree["train"] |= {"lr_scheduler_type": "linear", "warmup_steps": 7}
    run_correct(recipe_from_dict(tree))
    falling = [1 - math.sqrt(step / 4) for step in range(4)]
    expected = [0.0, *[1.0] * 15, *falling]
    assert rates == pytest.approx([1e-3 * share for share in expected], abs=1e-9)


def test_it_is_an_ordinary_checkpoint_in_the_teachers_precision(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Of a teacher in bfloat16: its weights are those trained in float32, rounded at the end."""
    teacher = tmp_path / "half"
    shutil.copytree(tree["teacher"], teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    model.save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    trained = dict[str, torch.Tensor]()
    write = correction._write_corrected

    def kept(of: Checkpoint, folder: Path, target: Path) -> None:
        trained.update(load_file(folder / "model.safetensors"))
        write(of, folder, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correction, "_write_corrected", kept)
        tuned = run_correct(recipe_from_dict({**tree, "teacher": str(teacher)}))
    tuned.check()
    weights = load_file(tuned.folder / "model.safetensors")
    assert weights.keys() == load_file(teacher / "model.safetensors").keys() == trained.keys()
    for name, tensor in weights.items():
        assert trained[name].dtype == torch.float32
        torch.testing.assert_close(tensor, trained[name].bfloat16(), rtol=0, atol=0)
    for name in ("tokenizer.json", "README.md"):
        assert (tuned.folder / name).read_bytes() == (teacher / name).read_bytes()
    assert tuned.architecture.config.dtype == torch.bfloat16
    # It says what it was worth, on the test split.
    needed = needed_text(recipe_from_dict(tree), tuned.architecture)
    text = prepare(DataSettings(**tree["data"]), teacher, needed=needed)
    test = text.sample("test", needed.tokens["test"])
    record = tuned.correction
    for folder, loss in ((teacher, record["loss_before"]), (tuned.folder, record["loss_after"])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert mean_loss(model, test, 8) == pytest.approx(loss, abs=5e-3)
    assert record["loss_after"] < record["loss_before"] - 0.1


class Killed(BaseException):
    pass


def dies_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a training die after 13 steps, and what comes next live; the steps that were trained."""
    trained = list[int]()

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained.append(state.global_step)
        if len(trained) == 13:
            raise Killed

    monkeypatch.setattr(ReportStep, "on_step_end", on_step_end)
    return trained


def test_killed_it_goes_on_to_the_same_weights(
    tree: dict[str, Any], corrected: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "another cache"))
    trained = dies_once(monkeypatch)
    with pytest.raises(Killed):
        run_recipe(recipe_from_dict(tree))
    correcting = tmp_path / "another cache" / "correcting"
    assert list(correcting.glob("*/checkpoint-12"))
    again = run_correct(recipe_from_dict(tree))
    assert trained == [*range(1, 14), *range(13, 21)]
    weights = [load_file(of.folder / "model.safetensors") for of in (again, corrected)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert again.correction["flops"] == corrected.correction["flops"]
    assert not list(correcting.iterdir())


def test_another_number_of_processes_begins_anew(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, whose checkpoint would not do for one; nothing is left of it in the end."""
    trained = dies_once(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(correction, "world_size", lambda: 2)
        run_correct(recipe_from_dict(tree))
    correcting = tmp_path / "cache" / "correcting"
    assert list(correcting.glob("*-2/checkpoint-12"))
    run_correct(recipe_from_dict(tree))
    assert trained == [*range(1, 14), *range(1, 21)]
    assert not list(correcting.iterdir())


@pytest.mark.exhaustive
def test_a_job_for_each_arm_of_two_bins_gives_the_same(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    bins = [{"low": "30K", "high": "35K"}, {"low": "40K", "high": "45K"}]
    tree["search"] = {**tree["search"], "bins": bins}
    del tree["search"]["bin"]
    tree["pretrain"]["arms"] = [{"name": "scratch", "init": "random"}, {"name": "kd", "kd": {}}]
    run_recipe(recipe_from_dict(tree))
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump({**tree, "output": str(tmp_path / "jobs")}))
    for name in ("30K-35K", "40K-45K"):
        for arm in ("kd", "scratch"):
            assert main(["run", str(file), "--bin", name, "--arm", arm]) == 0
        assert answer(tmp_path / "jobs" / name) == answer(Path(tree["output"]) / name)
    run_recipe(recipe_from_dict({**tree, "output": str(tmp_path / "jobs")}))
    pinned = [json.loads(path.read_text()) for path in tmp_path.glob("jobs/**/inputs.json")]
    assert len(pinned) == 3 and len({inputs["corrected teacher"] for inputs in pinned}) == 1


@pytest.mark.exhaustive
def test_two_processes_give_what_one_gives(
    tree: dict[str, Any], corrected: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command, which goes on to its caches; also where one has begun and was killed."""
    cache, file = tmp_path / "another cache", tmp_path / "halves.yaml"
    tree["train"]["per_device_train_batch_size"] = 2
    kd = {"top_k": 8, "cache": str(tmp_path / "cached")}
    tree["pretrain"]["arms"] = [{"name": "cached", "kd": kd}]
    file.write_text(yaml.safe_dump(tree))
    dies_once(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setenv("HEADSTART_CACHE", str(cache))
        run_correct(recipe_from_dict(tree))
    assert list(cache.glob("correcting/*/checkpoint-*"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", CLI, "run", str(file)]
    subprocess.run(command, env={**os.environ, "HEADSTART_CACHE": str(cache)}, check=True)
    (folder,) = (cache / "corrected").iterdir()
    assert not list((cache / "correcting").iterdir())
    weights = [load_file(of / "model.safetensors") for of in (folder, corrected.folder)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    manifest = json.loads((tmp_path / "cached" / "cache.json").read_text())
    assert manifest["teacher"] == Checkpoint.open(folder).hash
    (arm,) = answer(Path(tree["output"]))["arms"]
    assert arm["flops"]["correction"] == corrected.correction["flops"]


def test_it_is_found_again_by_teacher_text_and_settings(
    tree: dict[str, Any], corrected: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "run_arm", None)
    assert run_correct(recipe_from_dict(tree)).folder == corrected.folder
    elsewhere = {**tree, "output": "another/place"}
    assert run_correct(recipe_from_dict(elsewhere)).folder == corrected.folder
    for changes in (
        {"teacher_correction": {**tree["teacher_correction"], "learning_rate": 2e-3}},
        {"data": {**tree["data"], "seed": 1}},
        {"train": {**tree["train"], "weight_decay": 0.0}},
    ):
        with pytest.raises(TypeError):  # it would train
            run_correct(recipe_from_dict({**tree, **changes}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": 256}, r"is 256, 2 steps of 128 tokens, which leaves none between .*; use more"),
        ({"tokens": -1}, r"teacher_correction.tokens is -1; use at least 0"),
        ({"learning_rate": 0.0}, r"teacher_correction.learning_rate is 0.0; it must be above 0"),
        ({"decay": 1.0}, r"teacher_correction.warmup is 0.05 and decay 1.0; they are shares"),
        ({"train": {"lr_scheduler_type": "cosine"}}, r"train sets lr_scheduler_type, and the rate"),
        ({"train": {"optim": "xyzzy"}}, "xyzzy"),
        ({"tokenz": 3}, "did you mean teacher_correction.tokens?"),
    ],
)
def test_mistakes_are_told_before_the_text_is_read(
    settings: dict[str, Any],
    sentence: str,
    tree: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("run", "stages"):
        monkeypatch.setattr(f"headstart.runs.{module}.prepare", lambda *a, **k: pytest.fail("read"))
    tree["teacher_correction"] |= settings
    with pytest.raises(UserError, match=sentence) as caught:
        run_recipe(recipe_from_dict(tree))
    assert "\n" not in str(caught.value)


def test_one_that_diverges_is_refused(tree: dict[str, Any]) -> None:
    tree["teacher_correction"] |= {"tokens": 3 * STEP_TOKENS, "learning_rate": 1e30}
    with pytest.raises(UserError, match=r"no finite loss after its correction; lower .* is 1e\+30"):
        run_correct(recipe_from_dict(tree))


def test_the_plan_shows_it(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    loaded = recipe_from_dict(tree)
    plan = plan_correction(loaded, planned_architecture(loaded), Hardware())
    assert plan is not None
    assert (plan.tokens, plan.teacher_flops) == (STEPS * STEP_TOKENS, 0)
    assert plan.student_flops == plan.tokens * 3 * inference_flops(4, 128)
    model = AutoModelForCausalLM.from_pretrained(tree["teacher"])
    assert plan.memory.state == 16 * sum(tensor.numel() for tensor in model.parameters())
    print_plans(loaded, Hardware())
    printed = capsys.readouterr().out.split("the teacher, tuned on the text")[1]
    rows = [line.split() for line in printed.splitlines() if "FLOPs" in line]
    assert rows[0] == ["teacher's", "FLOPs", f"{plan.student_flops:.2e}"]
    del tree["teacher_correction"]
    loaded = recipe_from_dict(tree)
    assert plan_correction(loaded, planned_architecture(loaded), Hardware()) is None


def test_its_text_is_read(tree: dict[str, Any]) -> None:
    tree["teacher_correction"]["tokens"] = 5_000_000
    loaded = recipe_from_dict(tree)
    needed = needed_text(loaded, planned_architecture(loaded))
    assert needed.tokens["train"] == 5_000_000


def test_only_a_cache_of_it_needs_it(tree: dict[str, Any], tmp_path: Path) -> None:
    kd = {"top_k": 8, "cache": str(tmp_path / "cached"), "teacher": tree["teacher"]}
    tree["pretrain"]["arms"] = [{"name": "original", "kd": kd}]
    (manifest,) = run_cache_teacher(recipe_from_dict(tree)).values()
    assert manifest["teacher"] == Checkpoint.open(tree["teacher"]).hash
    assert not (tmp_path / "cache" / "corrected").exists()


@pytest.mark.parametrize("work", [run_correct, run_cache_teacher])
def test_processes_have_joined_before_a_step_is_counted(
    work: Callable[[Recipe], Any], tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the Trainer's arguments, which count them, would join them with another time limit."""
    joined = list[bool]()

    @contextmanager
    def process_group() -> Iterator[None]:
        joined.append(True)
        yield
        joined.clear()

    def check_correction(recipe: Recipe) -> None:
        raise UserError("joined" if joined else "alone")

    monkeypatch.setattr(ahead, "process_group", process_group)
    monkeypatch.setattr(ahead, "check_correction", check_correction)
    kd = {"top_k": 8, "cache": "cached"}
    tree["pretrain"]["arms"] = [{"name": "cached", "kd": kd}]
    with pytest.raises(UserError, match="joined"):
        work(recipe_from_dict(tree))


def test_from_python_it_is_the_work_of_one_process(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several would write to the same folder what it has in memory."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process; under torchrun use `headstart run`"):
        headstart.correct(tree["teacher"], tree["data"]["source"], TOKENS, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_from_python(tree: dict[str, Any], corrected: Checkpoint, tmp_path: Path) -> None:
    """From memory, the same weights as from the folder."""
    model = AutoModelForCausalLM.from_pretrained(tree["teacher"])
    settings = headstart.CorrectionSettings(TOKENS, learning_rate=1e-3)
    path = headstart.correct(
        model,
        tree["data"]["source"],
        settings,
        tmp_path / "tuned",
        train=tree["train"],
        tokenizer=AutoTokenizer.from_pretrained(tree["teacher"]),
        data=headstart.DataSettings(block_length=BLOCK_LENGTH),
    )
    weights = [load_file(of / "model.safetensors") for of in (path, corrected.folder)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="tuned"):
        headstart.correct(tree["teacher"], tree["data"]["source"], TOKENS, tmp_path / "tuned")


@pytest.mark.exhaustive
def test_the_example_recipe(tree: dict[str, Any]) -> None:
    """With a small teacher in the place of the one that it names, and few tokens."""
    example = recipe_to_dict(load_recipe(shipped("teacher_correction.yaml")))
    for arm in example["pretrain"]["arms"]:
        if arm["kd"] and arm["kd"]["teacher"]:
            arm["kd"]["teacher"] = tree["teacher"]
    example["teacher_correction"] |= {"tokens": 10_000}
    pretrain = {**tree["pretrain"], "arms": example["pretrain"]["arms"]}
    small = {key: tree[key] for key in ("teacher", "output", "data", "search", "train")}
    (result,) = run_recipe(recipe_from_dict({**example, **small, "pretrain": pretrain}))
    paid = [arm["flops"]["correction"] > 0 for arm in result["arms"]]
    assert paid == [False, True, True, True]
    assert result["teacher"]["correction"]["tokens_per_step"] == 16 * BLOCK_LENGTH
