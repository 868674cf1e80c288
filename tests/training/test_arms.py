"""Arms that are killed, multiplied or repeated give what one quiet run gives."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file
from tests.conftest import extract, padded, random_teacher
from tests.model.oracles import random_layerwise_spec
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import EvalLoopOutput

from headstart.losses.distillation import DistillationSettings
from headstart.losses.next_token import mean_loss
from headstart.model.checkpoint import Checkpoint
from headstart.model.transformers_4 import old_entries
from headstart.system import device
from headstart.system.errors import UserError
from headstart.training import arguments, arms, interruption
from headstart.training.arguments import (
    LEAST,
    PASSED_OVER,
    PASSED_OVER_VALUES,
    RESERVED_ARGUMENTS,
    training_arguments,
)
from headstart.training.arms import ArmInputs, run_arm
from headstart.training.cache import CacheIdentity
from headstart.training.cache_writer import write_cache
from headstart.training.order import Reads, Wanted
from headstart.training.settings import Arm, PretrainSettings
from headstart.training.teacher import DistillationTeacher, Teacher
from headstart.training.trainer import DistillationTrainer, ReportStep
from headstart.training.trials import check_arguments, check_sharding

SCRATCH = Arm("scratch", init="random")
SUBNET = Arm("subnet")
DISTILLED = Arm("subnet+kd", kd=DistillationSettings())
STEP_TOKENS = 4 * 16
NUM_STEPS = 10  # checkpoints after 2, 4, 6, 8 and 10; an epoch has 12


@pytest.fixture(scope="session")
def inputs(student_checkpoint, teacher_checkpoint, blocks) -> ArmInputs:
    settings = PretrainSettings(tokens=NUM_STEPS * STEP_TOKENS, validation_tokens=80, evaluations=3)
    train = {"use_cpu": True, "per_device_train_batch_size": 4, "logging_steps": 1}
    return ArmInputs(student_checkpoint, teacher_checkpoint, blocks, settings, train)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="session")
def uninterrupted(inputs, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The distilled arm, trained in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        for module in (arguments, device):
            patch.setattr(module, "has_fast_bf16", lambda device: False)
        return folder, run_arm(DISTILLED, inputs, folder)


def evaluate_to(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let evaluations find these validation losses."""
    left = iter(losses)
    tested = {"test_loss": 9.0, "test_standard_error": 0.1}

    def evaluation_loop(*args: Any, metric_key_prefix: str, **kwargs: Any) -> EvalLoopOutput:
        metrics = tested if metric_key_prefix == "test" else {"eval_loss": next(left)}
        return EvalLoopOutput(None, None, metrics, 1)

    monkeypatch.setattr(DistillationTrainer, "evaluation_loop", evaluation_loop)


def assert_same_run(folder: Path, result: dict[str, Any], uninterrupted: Any, **close: Any) -> None:
    expected_folder, expected = uninterrupted
    assert [point["tokens"] for point in result["curve"]] == [
        point["tokens"] for point in expected["curve"]
    ]
    losses = [[point["loss"] for point in run["curve"]] for run in (result, expected)]
    torch.testing.assert_close(*map(torch.tensor, losses), **close)
    torch.testing.assert_close(weights_of(folder), weights_of(expected_folder), **close)


def test_result_of_an_arm(uninterrupted, inputs):
    folder, result = uninterrupted
    assert json.loads((folder / "arm.json").read_text()) == result
    assert result["tokens_per_step"] == STEP_TOKENS
    assert result["tokens"] == NUM_STEPS * STEP_TOKENS
    assert result["seconds"] > 0
    # Quadratic spacing of three evaluations over ten steps, after the one before training.
    steps = [point["tokens"] / STEP_TOKENS for point in result["curve"]]
    assert steps == [0, 1, 4, 10]
    assert list(folder.glob("runs/*/events.out.tfevents.*"))
    validation = inputs.blocks.sample("validation", 80)
    assert result["validation_tokens"] == validation.numel()
    before = AutoModelForCausalLM.from_pretrained(inputs.student.folder)
    after = AutoModelForCausalLM.from_pretrained(folder / "model")
    losses = [mean_loss(model.eval(), validation, 2) for model in (before, after)]
    assert [result["curve"][end]["loss"] for end in (0, -1)] == pytest.approx(losses, rel=1e-5)
    assert losses[1] < losses[0]
    test = inputs.blocks.sample("test", 80)
    assert result["test_tokens"] == test.numel()
    (budget,) = result["budgets"]
    for model, found in ((before, result["before"]), (after, budget)):
        of_blocks = torch.tensor([mean_loss(model.eval(), block[None], 1) for block in test])
        assert found["loss"] == pytest.approx(of_blocks.mean().item(), rel=1e-5)
        error = of_blocks.std().item() / len(of_blocks) ** 0.5
        assert found["standard_error"] == pytest.approx(error, rel=1e-4)
    assert budget["validation_loss"] == result["curve"][-1]["loss"]
    assert len(AutoTokenizer.from_pretrained(folder / "model")) == before.config.vocab_size


def test_an_arm_has_its_teachers_tokenizer_byte_for_byte_and_both_kinds_of_keys(
    inputs, student_folder, teacher_folder, tmp_path, monkeypatch
):
    """In the folder of the best evaluation too, which is not the last one."""
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    written = json.loads((teacher / "tokenizer_config.json").read_text())
    theirs = {
        "tokenizer_config.json": json.dumps(written | {"tokenizer_class": "LlamaTokenizerFast"}),
        "tokenizer.model": "sentencepiece",
        "special_tokens_map.json": '{"eos_token":"<end>"}',
        "generation_config.json": '{"temperature":0.5,"do_sample":true}',
        "vocabulary.json": "[0,1]",
    }
    for name, text in theirs.items():
        (teacher / name).write_text(text)
    theirs["tokenizer.json"] = (teacher / "tokenizer.json").read_text()
    evaluate_to(monkeypatch, [5.0, 4.0, 3.0, 4.0])
    run_arm(SUBNET, replace(inputs, teacher=Checkpoint.open(teacher)), tmp_path / "arm")
    folders = [tmp_path / "arm" / "model", *tmp_path.glob("arm/best-*")]
    for folder in folders:
        assert {name: (folder / name).read_text() for name in theirs} == theirs
        student = json.loads((student_folder / "config.json").read_text())
        trained = json.loads((folder / "config.json").read_text())
        assert trained == student | old_entries(student)
    assert len(folders) == 2


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_teacher_with_padding_rows_teaches_what_it_teaches_without(
    inputs, uninterrupted, tmp_path, saved, is_cached
):
    teacher = saved(padded(AutoModelForCausalLM.from_pretrained(inputs.teacher.folder), 136))
    named = DistillationTeacher(Checkpoint.open(teacher), shared_rows=128)
    blocks = replace(inputs.blocks, manifest={**inputs.blocks.manifest, "fingerprint": "text"})
    with_other = replace(inputs, teachers={"wide": named}, blocks=blocks)
    kd = replace(DISTILLED.kd, teacher="wide")
    if is_cached:
        kd = replace(kd, top_k=128, cache=str(tmp_path / "cache"), cache_dtype="float32")
        identity = CacheIdentity.of(kd, named.checkpoint.hash, None, 128)
        asked = Teacher(device.load_frozen(teacher, torch.device("cpu")))
        train = blocks.split("train")
        everything = Wanted("text", (Reads(0, 0, len(train)),))
        write_cache(kd.cache, identity, 136, lambda: (asked, 8), train, everything)
    arm = replace(DISTILLED, kd=kd)
    result = run_arm(arm, with_other, tmp_path / "arm")
    assert_same_run(tmp_path / "arm", result, uninterrupted, rtol=1e-5, atol=1e-5)
    if not is_cached:
        apart = replace(with_other, teachers={"wide": DistillationTeacher(named.checkpoint)})
        with pytest.raises(UserError, match="has 136 vocabulary rows and the student 128"):
            run_arm(arm, apart, tmp_path / "refused")


def test_a_finished_arm_is_read_not_trained(uninterrupted, inputs, monkeypatch):
    folder, result = uninterrupted
    monkeypatch.setattr(DistillationTrainer, "train", None)
    monkeypatch.setattr(arms, "_initial_model", None)
    assert run_arm(DISTILLED, inputs, folder) == result


def test_the_best_weights_are_kept_beside_the_last(inputs, tmp_path):
    """At this rate the loss falls first and rises then."""
    arm = Arm("wild", learning_rate=0.3, train={"lr_scheduler_type": "constant"})
    start = replace(inputs, settings=replace(inputs.settings, evaluations=10))
    result = run_arm(arm, start, tmp_path)
    losses = [point["loss"] for point in result["curve"]]
    gentle = run_arm(replace(arm, learning_rate=1e-3), start, tmp_path / "gentle")
    folders = {name: list((tmp_path / name).glob("best-*")) for name in ("", "gentle")}
    assert gentle["best"] == gentle["curve"][-1] and not folders["gentle"]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert result["best"] == result["curve"][best]
    if best:
        model = AutoModelForCausalLM.from_pretrained(folders[""][0]).eval()
        validation = inputs.blocks.sample("validation", 80)
        assert mean_loss(model, validation, 2) == pytest.approx(losses[best], rel=1e-5)
    assert len(folders[""]) == (best not in (0, len(losses) - 1))


def test_a_diverged_evaluation_is_not_the_best(inputs, tmp_path, monkeypatch):
    evaluate_to(monkeypatch, [5.0, math.nan, 4.0, math.nan])
    result = run_arm(SUBNET, inputs, tmp_path)
    assert result["best"] == {"tokens": result["curve"][2]["tokens"], "loss": 4.0}
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-4"]


def test_an_arms_own_train_keys_win(inputs, tmp_path):
    arm = Arm("small", train={"per_device_train_batch_size": 2})
    assert run_arm(arm, inputs, tmp_path)["tokens_per_step"] == 2 * 16


def test_muon_trains_and_goes_on_as_if_never_stopped(inputs, tmp_path, monkeypatch):
    arm = Arm("muon", optimizer="muon", learning_rate=1e-2)
    whole = run_arm(arm, inputs, tmp_path / "whole")
    assert whole["curve"][-1]["loss"] < whole["curve"][0]["loss"]

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ReportStep, "on_step_end", on_step_end)
        run_arm(arm, inputs, tmp_path / "killed")
    result = run_arm(arm, inputs, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", result, (tmp_path / "whole", whole), rtol=0, atol=1e-6)


class Killed(BaseException):
    pass


def test_going_on_with_other_steps_is_refused(inputs, tmp_path, monkeypatch):
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ReportStep, "on_step_end", on_step_end)
        run_arm(SUBNET, inputs, tmp_path)
    # As twice the processes would take.
    doubled = replace(inputs, train={**inputs.train, "per_device_train_batch_size": 8})
    with pytest.raises(ValueError, match=r"was begun with 10 steps and would go on with 5: start"):
        run_arm(SUBNET, doubled, tmp_path)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_broken_off_arm_goes_on(inputs, uninterrupted, tmp_path, monkeypatch, step):
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ReportStep, "on_step_end", on_step_end)
        run_arm(DISTILLED, inputs, tmp_path)
    result = run_arm(DISTILLED, inputs, tmp_path)
    assert_same_run(tmp_path, result, uninterrupted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 4, 10])  # after 4 and 10 an evaluation is due
def test_a_signal_saves_a_checkpoint_at_the_next_step_and_the_arm_goes_on(
    inputs, uninterrupted, tmp_path, monkeypatch, kind, step
):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), kind)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReportStep, "on_step_begin", on_step_begin, raising=False)
        run_arm(DISTILLED, inputs, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "arm.json").exists() and not (tmp_path / "model").exists()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    result = run_arm(DISTILLED, inputs, tmp_path)
    assert_same_run(tmp_path, result, uninterrupted, rtol=0, atol=1e-6)


def test_a_later_signal_stops_at_once(inputs, tmp_path, monkeypatch):
    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    for seconds, last_step in ((0.0, 4), (1.0, 5)):  # those that come at once are one
        folder = tmp_path / str(seconds)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ReportStep, "on_step_begin", on_step_begin, raising=False)
            patch.setattr(interruption, "REPEAT_SECONDS", seconds)
            run_arm(SUBNET, inputs, folder)
        assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{last_step}"]


def test_a_checkpoint_is_written_every_so_many_minutes(inputs, tmp_path, monkeypatch):
    """A step takes a minute here."""
    saved, minutes = [], iter(range(1000))
    monkeypatch.setattr(interruption.time, "monotonic", lambda: 60.0 * next(minutes))
    whole = interruption.SaveAndStop.on_save

    def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved.append(state.global_step)
        whole(self, args, state, control, **kwargs)

    monkeypatch.setattr(interruption.SaveAndStop, "on_save", on_save)
    rare = {**inputs.train, "save_steps": 1000, "save_minutes": 2.5}
    run_arm(SUBNET, replace(inputs, train=rare), tmp_path)
    gaps = [late - early for early, late in pairwise([0, *saved[:-1]])]
    assert len(saved) >= 4 and max(gaps) <= 3


@pytest.mark.parametrize("key", PASSED_OVER)
def test_arguments_that_would_have_no_effect_are_refused(key, tmp_path):
    default = getattr(TrainingArguments, key, None)
    changed = {None: "something", False: True, True: False}.get(default, 0.1)
    with pytest.raises(UserError, match=rf"train.{key} cannot be used: .*; remove it"):
        training_arguments({key: changed}, SUBNET, tmp_path)
    training_arguments({key: default, "use_cpu": True}, SUBNET, tmp_path)


def test_every_argument_that_is_passed_over_exists():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    of_values = {key for key, _ in PASSED_OVER_VALUES}
    assert set(PASSED_OVER) | set(RESERVED_ARGUMENTS) | set(LEAST) | of_values <= known


def test_the_text_is_sampled_in_no_way_but_the_default():
    """Of all that transformers offers, since headstart draws the order itself."""
    field = TrainingArguments.__dataclass_fields__["train_sampling_strategy"]
    refused = {value for key, value in PASSED_OVER_VALUES if key == field.name}
    assert refused == {*field.metadata["choices"]} - {field.default}


@pytest.mark.parametrize(("key", "value"), PASSED_OVER_VALUES)
def test_values_that_would_have_no_effect_are_refused(key, value, tmp_path):
    with pytest.raises(UserError, match=rf"train.{key} cannot be {value}: .*; use another"):
        training_arguments({key: value}, SUBNET, tmp_path)


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ({"weight_decai": 1}, "unknown key train.weight_decai; did you mean train.weight_decay?"),
        ({"xyzzy": 1}, "unknown key train.xyzzy; TrainingArguments has none such"),
        ({3: 1}, "unknown key train.3; "),
        ({"bf16": "no"}, "train.bf16 is 'no'; write true or false"),
        ({"gradient_checkpointing": 1}, "train.gradient_checkpointing is 1; write true or false"),
        ({"seed": 1.5}, "train.seed is 1.5; write a whole number"),
        ({"per_device_train_batch_size": None}, "size is None; write a whole number"),
        ({"per_device_train_batch_size": 0}, "size is 0; use at least 1"),
        ({"save_total_limit": "few"}, "train.save_total_limit is 'few'; write a whole number"),
        ({"max_grad_norm": [1]}, "train.max_grad_norm is [1]; write a number"),
        ({"weight_decay": -0.1}, "train.weight_decay is -0.1; use at least 0"),
        ({"save_steps": -1}, "train.save_steps is -1; use at least 0"),
        ({"debug": 3}, "train.debug is 3, and takes no number"),
        ({"seed": 2**32}, "train.seed is 4294967296; use at most 4294967295"),
        ({"log_level": "loud"}, "train.log_level is 'loud'; choose one of detail, debug, "),
        ({"include_num_input_tokens_seen": "some"}, "is 'some'; choose one of all, non_padding"),
        ({"deepspeed": "nowhere.json"}, "train: "),
        ({"fsdp": True, "fsdp_config": "nowhere.json"}, "No such file"),
    ],
)
def test_train_values_that_mean_nothing_give_one_sentence(train, sentence, tmp_path):
    with pytest.raises(UserError) as caught:
        training_arguments({"use_cpu": True, **train}, SUBNET, tmp_path)
    unset_hf_deepspeed_config()  # which the exception keeps alive, for every model of this process
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (
            {"report_to": ["tensorboard", "xyzzy"]},
            "report_to names 'xyzzy', which is unknown",
        ),
        ({"optim": "adamw_torch", "adam_beta1": 2.0}, "adamw_torch cannot be made (Invalid beta"),
        ({"adam_epsilon": -1.0}, "cannot be made (Invalid epsilon value: -1.0)"),
        ({"optim_args": "momentum"}, "cannot be made (not enough values"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be made (One of"),
        ({"lr_scheduler_kwargs": {"xyzzy": 1}}, "train.lr_scheduler_type cosine cannot be made ("),
        ({"torch_compile_backend": "xyzzy"}, "backend is 'xyzzy'; choose one of no, eager"),
        ({"torch_compile": True, "torch_compile_mode": "xyzzy"}, "mode is 'xyzzy'; choose one of"),
        ({"gradient_checkpointing_kwargs": {"xyzzy": 1}}, "{'use_reentrant': False, 'xyzzy': 1}"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_an_arm_could_not_begin_with_is_told_before_the_search(train, sentence, tmp_path):
    for arm in (SUBNET, replace(SUBNET, optimizer="muon")):
        made = training_arguments({"use_cpu": True, **train}, arm, tmp_path)
        if arm.optimizer and "optim_args" in train:
            check_arguments(arm, made)  # Muon has none
            continue
        with pytest.raises(UserError) as caught:
            check_arguments(arm, made)
        assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_optimizers_and_schedules_that_can_be_made_pass(tmp_path):
    trains = [
        {},
        {"optim": "adafactor"},
        {"optim": "sgd", "lr_scheduler_type": "constant"},
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine_with_min_lr"}
        | {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
        {"report_to": "none"},
    ]
    for train in trains:
        for arm in (SUBNET, replace(SUBNET, optimizer="muon")):
            check_arguments(arm, training_arguments({"use_cpu": True, **train}, arm, tmp_path))


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_checkpointed_activations_give_the_same_weights(
    key, inputs, uninterrupted, tmp_path, monkeypatch
):
    if key not in TrainingArguments.__dataclass_fields__:
        pytest.skip("this version of transformers has not renamed it")
    training_step, checkpointing = DistillationTrainer.training_step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        checkpointing.append(self.model.is_gradient_checkpointing)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", step)
    result = run_arm(replace(DISTILLED, train={key: True, "bf16": False}), inputs, tmp_path)
    assert checkpointing == [True] * NUM_STEPS
    assert_same_run(tmp_path, result, uninterrupted, rtol=1e-4, atol=1e-5)


def test_packages_that_are_not_installed_are_told_before_the_search(tmp_path, monkeypatch):
    made = training_arguments({"use_cpu": True, "use_liger_kernel": True}, SUBNET, tmp_path)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match="pip install liger-kernel, or remove it"):
        check_arguments(SUBNET, made)
    made = training_arguments({"use_cpu": True, "push_to_hub": True}, SUBNET, tmp_path)

    def whoami(token: str | None) -> None:
        raise ValueError("no token")

    monkeypatch.setattr("huggingface_hub.whoami", whoami)
    with pytest.raises(UserError, match=r"needs a login to the hub \(no token\); run `hf auth"):
        check_arguments(SUBNET, made)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    made = training_arguments({"use_cpu": True}, SUBNET, tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    with pytest.raises(UserError, match=r"4 GPUs are visible .* `torchrun --nproc-per-node 4 -m "):
        check_sharding(made)


@pytest.mark.parametrize("minutes", [0, -1, True, "soon", math.nan])
def test_save_minutes_that_mean_nothing_are_refused(minutes, tmp_path):
    with pytest.raises(UserError, match=r"train.save_minutes is .*; write a number above 0"):
        training_arguments({"save_minutes": minutes}, SUBNET, tmp_path)


def test_an_arm_broken_off_after_its_last_step_takes_no_more(
    inputs, uninterrupted, tmp_path, monkeypatch, seen
):
    save_model = DistillationTrainer.save_model

    def save_checkpoints_only(self: Any, folder: str, _internal_call: bool = False) -> None:
        if not _internal_call:
            raise Killed
        save_model(self, folder, _internal_call)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationTrainer, "save_model", save_checkpoints_only)
        run_arm(DISTILLED, inputs, tmp_path)
    result = run_arm(DISTILLED, inputs, tmp_path)
    assert len(seen) == NUM_STEPS
    assert_same_run(tmp_path, result, uninterrupted, rtol=0, atol=0)


def start_worker(launcher: list[str], tmp_path: Path, *call: Any) -> int:
    pickled = tmp_path / "call.pickle"
    pickled.write_bytes(pickle.dumps(call))
    worker = Path(__file__).with_name("run_arm_worker.py")
    return subprocess.run([sys.executable, *launcher, str(worker), str(pickled)]).returncode


@pytest.mark.exhaustive
def test_processes_that_are_told_to_stop_save_after_the_same_step(inputs, tmp_path):
    """One of two gets the signal, and both go on from one checkpoint."""
    halves = replace(inputs, train={**inputs.train, "per_device_train_batch_size": 2})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert start_worker(launcher, tmp_path, DISTILLED, halves, whole, None) == 0
    told = (*launcher, "--max-restarts", "0")
    assert start_worker(list(told), tmp_path, DISTILLED, halves, stopped, -5) != 0
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert checkpoint.name in ("checkpoint-5", "checkpoint-6")
    assert start_worker(launcher, tmp_path, DISTILLED, halves, stopped, None) == 0
    result, expected = (
        json.loads((folder / "arm.json").read_text()) for folder in (stopped, whole)
    )
    assert_same_run(stopped, result, (whole, expected), rtol=0, atol=1e-6)


@pytest.mark.exhaustive
def test_a_killed_process_goes_on_and_its_seconds_add_up(inputs, uninterrupted, tmp_path):
    folder = tmp_path / "arm"
    assert start_worker([], tmp_path, DISTILLED, inputs, folder, 7) == -signal.SIGKILL
    assert not (folder / "arm.json").exists()
    state = folder / "checkpoint-6" / "trainer_state.json"
    history = json.loads(state.read_text())
    history["log_history"][-1]["seconds"] = 1000.0  # as if it had been slow
    state.write_text(json.dumps(history))
    result = run_arm(DISTILLED, inputs, folder)
    assert_same_run(folder, result, uninterrupted, rtol=0, atol=1e-6)
    assert 1000 < result["seconds"] < 1100


@pytest.mark.exhaustive
def test_two_processes_train_as_one_with_twice_the_batch(inputs, uninterrupted, tmp_path):
    folder = tmp_path / "arm"
    halved = replace(inputs, train={**inputs.train, "per_device_train_batch_size": 2})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert start_worker(launcher, tmp_path, DISTILLED, halved, folder, None) == 0
    result = json.loads((folder / "arm.json").read_text())
    assert result["tokens_per_step"] == STEP_TOKENS
    assert_same_run(folder, result, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
def test_sharded_processes_train_as_one_and_go_on(inputs, uninterrupted, tmp_path):
    """FSDP2 over two CPU processes, killed on the way."""
    folder = tmp_path / "arm"
    sharding = {"per_device_train_batch_size": 2, "fsdp": True}
    halved = replace(inputs, train={**inputs.train, **sharding})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert start_worker(launcher, tmp_path, DISTILLED, halved, folder, 5) != 0
    assert (folder / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file(), "it was not sharded"
    assert start_worker(launcher, tmp_path, DISTILLED, halved, folder, None) == 0
    result = json.loads((folder / "arm.json").read_text())
    assert_same_run(folder, result, uninterrupted, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
def test_a_layerwise_student_trains_sharded_as_in_one_process(inputs, teacher_folder, tmp_path):
    spec = random_layerwise_spec(random_teacher("llama-tied-gqa"), seed=1, layers=3, embed=36)
    student = extract(teacher_folder, spec, tmp_path / "student")
    inputs = short(replace(inputs, student=Checkpoint.open(student)))
    whole = run_arm(SUBNET, inputs, tmp_path / "whole")
    sharding = {"per_device_train_batch_size": 2, "fsdp": True}
    halved = replace(inputs, train={**inputs.train, **sharding})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = tmp_path / "sharded"
    assert start_worker(launcher, tmp_path, SUBNET, halved, folder, None) == 0
    result = json.loads((folder / "arm.json").read_text())
    losses = [[point["loss"] for point in run["curve"]] for run in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    left, right = (weights_of(run) for run in (folder, tmp_path / "whole"))
    for name, tensor in right.items():
        torch.testing.assert_close(left[name], tensor, rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(model).__name__ == "LayerwiseLlamaForCausalLM"


@pytest.mark.exhaustive
def test_a_sharded_teacher_says_what_a_whole_one_says(inputs, uninterrupted, tmp_path):
    folder = tmp_path / "arm"
    halved = replace(inputs, train={**inputs.train, "per_device_train_batch_size": 2})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sharded = replace(DISTILLED, kd=DistillationSettings(shard_teacher=True))
    assert start_worker(launcher, tmp_path, sharded, halved, folder, None) == 0
    result = json.loads((folder / "arm.json").read_text())
    assert_same_run(folder, result, uninterrupted, rtol=0, atol=1e-5)


def test_sharding_that_would_not_happen_is_refused(inputs, tmp_path):
    arguments = training_arguments({**inputs.train, "fsdp": True}, SUBNET, tmp_path)
    with pytest.raises(ValueError, match=r"train\.fsdp needs several GPUs: accelerate passes over"):
        check_sharding(arguments)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_may_not_split_the_output_matrix(stage, inputs, tmp_path):
    """With transformers' own reading of the stage; DeepSpeed itself is not needed for that."""
    arguments = training_arguments(inputs.train, SUBNET, tmp_path)
    settings = {"zero_optimization": {"stage": stage}}
    arguments.deepspeed = settings
    arguments.hf_deepspeed_config = HfDeepSpeedConfig(settings)
    if stage < 3:
        check_sharding(arguments)
        return
    with pytest.raises(ValueError, match=r"ZeRO stage 3, which splits .* use stage 1 or 2"):
        check_sharding(arguments)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The training batches, as they come."""
    batches: list[Tensor] = []
    compute_loss = DistillationTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            batches.append(inputs["input_ids"].clone())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", spy)
    return batches


def short(inputs: ArmInputs, **settings: Any) -> ArmInputs:
    """The same inputs for a run of three steps."""
    settings = {"tokens": 3 * STEP_TOKENS, "evaluations": 1, **settings}
    return replace(inputs, settings=replace(inputs.settings, **settings))


def test_arms_see_the_same_text_in_the_same_order(inputs, tmp_path, seen):
    for arm in (SCRATCH, SUBNET, DISTILLED):
        run_arm(arm, short(inputs), tmp_path / arm.name)
    by_arm = torch.stack(seen).reshape(3, 3, 4, 16)
    assert torch.equal(by_arm[0], by_arm[1]) and torch.equal(by_arm[0], by_arm[2])
    assert len(by_arm[0].flatten(0, 1).unique(dim=0)) == 12  # no block comes twice


def test_random_init_is_its_own_and_repeats_by_seed(inputs, tmp_path):
    folder = inputs.student.folder
    student = load_file(folder / "model.safetensors")
    initial = [arms._initial_model(SCRATCH, inputs, seed).state_dict() for seed in (42, 42, 7)]
    assert initial[0].keys() >= student.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(initial[0][name], initial[1][name])
    assert not torch.equal(initial[0][name], initial[2][name])
    assert not torch.equal(initial[0][name], student[name])
    runs = [run_arm(SCRATCH, short(inputs), tmp_path / name) for name in ("one", "two")]
    assert runs[0]["curve"] == runs[1]["curve"]
    torch.testing.assert_close(*(weights_of(tmp_path / name) for name in ("one", "two")))


@pytest.mark.parametrize("init", ["random", "subnet"])
def test_a_padding_token_that_ends_documents_is_trained_as_any_other(inputs, tmp_path, init):
    student = tmp_path / "student"
    shutil.copytree(inputs.student.folder, student)
    config = AutoConfig.from_pretrained(student)
    config.pad_token_id = separator = int(inputs.blocks.split("train")[0, 0])
    config.save_pretrained(student)
    inputs = replace(inputs, student=Checkpoint.open(student))
    before = arms._initial_model(Arm("a", init=init), inputs, 42).get_input_embeddings()
    run_arm(Arm("a", init=init), inputs, tmp_path / "arm")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "arm" / "model")
    assert trained.config.pad_token_id == separator
    moved = (trained.get_input_embeddings().weight - before.weight)[separator]
    assert before.weight[separator].std() > 0.01
    assert moved.abs().max() > 1e-3


def test_more_validation_tokens_than_there_are_use_them_all(inputs, tmp_path):
    result = run_arm(SUBNET, short(inputs, validation_tokens=65_536), tmp_path)
    assert result["validation_tokens"] == 7 * 16


def test_the_budget_is_rounded_up_to_whole_steps(inputs, tmp_path):
    result = run_arm(SUBNET, short(inputs, tokens=STEP_TOKENS + 1), tmp_path)
    assert result["tokens"] == result["curve"][-1]["tokens"] == 2 * STEP_TOKENS


def test_a_teacher_of_another_vocabulary_is_refused(inputs, teacher_folder, tmp_path):
    config = AutoConfig.from_pretrained(teacher_folder, vocab_size=160)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "padded")
    inputs = replace(inputs, teacher=Checkpoint.open(tmp_path / "padded"))
    with pytest.raises(UserError, match="teacher has 160 vocabulary rows and the student 128"):
        run_arm(DISTILLED, inputs, tmp_path / "arm")


def test_the_arms_learning_rate_is_the_peak(inputs, tmp_path):
    arm = replace(SUBNET, learning_rate=0.02)
    train = {**inputs.train, "warmup_steps": 1}
    run_arm(arm, replace(short(inputs), train=train), tmp_path)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    assert max(rates) == pytest.approx(0.02)


def test_train_keys_pass_verbatim_over_the_defaults(tmp_path):
    train = {"optim": "adafactor", "adam_beta2": 0.95, "weight_decay": 0.0, "use_cpu": True}
    arguments = training_arguments(train, replace(SUBNET, learning_rate=0.5), tmp_path, 17)
    assert {key: getattr(arguments, key) for key in train} == train
    assert arguments.lr_scheduler_type == "cosine"
    assert (arguments.output_dir, arguments.learning_rate) == (str(tmp_path), 0.5)
    assert arguments.max_steps == 17


@pytest.mark.parametrize(("key", "mend"), RESERVED_ARGUMENTS.items())
def test_train_keys_that_the_recipe_sets_are_refused(tmp_path, key, mend):
    with pytest.raises(ValueError, match=rf"train\.{key} is set by {mend}; set that instead"):
        training_arguments({key: 1}, SUBNET, tmp_path)


@pytest.mark.parametrize("train", [{"batch_sise": 8}, {"optim": "sdg"}])
def test_train_keys_that_are_unknown_give_one_sentence(tmp_path, train):
    with pytest.raises(ValueError, match=r"train.*(batch_sise|sdg)") as error:
        training_arguments({"use_cpu": True, **train}, SUBNET, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_used_where_it_is_fast_unless_the_recipe_says(tmp_path, monkeypatch, fast):
    monkeypatch.setattr(arguments, "has_fast_bf16", lambda device: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_arguments({}, SUBNET, tmp_path).bf16 is fast
    assert not training_arguments({"bf16": False}, SUBNET, tmp_path).bf16


def test_a_gpu_is_fed_by_processes_that_stay_unless_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(arguments.os, "sched_getaffinity", lambda pid: set(range(16)))

    def workers(**train: Any) -> tuple[int, bool, str | None]:
        made = training_arguments({"use_cpu": True, **train}, SUBNET, tmp_path)
        how = made.dataloader_multiprocessing_context
        return made.dataloader_num_workers, made.dataloader_persistent_workers, how

    assert workers() == (2, True, "fork")
    assert workers(dataloader_num_workers=5) == (5, True, "fork")
    assert workers(dataloader_num_workers=0) == (0, False, None)
    assert workers(dataloader_persistent_workers=False) == (2, False, "fork")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers() == (1, True, "fork")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers() == (0, False, None)
    monkeypatch.setattr(arguments, "default_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert workers() == (0, False, None)


def test_adamw_is_the_fused_one(tmp_path):
    assert training_arguments({"use_cpu": True}, SUBNET, tmp_path).optim == "adamw_torch_fused"


def test_loaders_that_stay_read_each_split_for_what_it_is(inputs, tmp_path):
    """transformers keeps the loader of the first evaluation for all later ones."""
    staying = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    train = {**inputs.train, "bf16": False}
    plain, kept = (
        run_arm(SUBNET, replace(short(inputs), train={**train, **more}), tmp_path / name)
        for name, more in (("plain", {}), ("kept", staying))
    )
    assert kept["curve"] == plain["curve"] and kept["before"] == plain["before"]
    assert kept["budgets"][0]["loss"] == plain["budgets"][0]["loss"] != kept["curve"][-1]["loss"]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Arm(""), "cannot be a folder's name"),
        (lambda: Arm("a/b"), "cannot be a folder's name"),
        (lambda: Arm(".hidden"), "cannot be a folder's name"),
        (lambda: Arm("a", learning_rate=0.0), "learning_rate 0.0; it must be above 0"),
        (lambda: PretrainSettings(tokens=0), "pretrain.tokens is 0; use at least 1"),
        (lambda: PretrainSettings(evaluations=0), "pretrain.evaluations is 0"),
        (lambda: PretrainSettings(validation_tokens=0), "pretrain.validation_tokens is 0"),
        (lambda: PretrainSettings(arms=()), "named nothing; give at least one arm"),
        (lambda: PretrainSettings(arms=(SUBNET, SUBNET)), "named subnet, subnet; give"),
    ],
)
def test_settings_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
