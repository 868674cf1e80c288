"""The command: instant help, exit codes, one sentence for every mistake before any model loads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from headstart.cli import main
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import SubnetSpec
from headstart.runs import stages

COMMANDS = [
    "run",
    "init",
    "list",
    "demo",
    "search",
    "extract",
    "pretrain",
    "evaluate",
    "generate",
    "report",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example:\n  headstart {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from headstart.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'jinja2', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_shell_is_told_how_words_go_on(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    line, answer = "headstart ex", tmp_path / "answer"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    shell |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, "-m", "headstart.cli"]
    subprocess.run(command, env={**os.environ, **shell}, check=True)
    assert {word.strip() for word in answer.read_text().splitlines()} == {"extract", "export"}


@pytest.fixture
def arguments(
    teacher_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Good arguments of `headstart run`, with a trap for any model that is loaded."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    return {
        "--teacher": str(teacher_folder),
        "--data": str(corpus),
        "--output": str(tmp_path / "run"),
        "--search.bin.low": "30000",
        "--search.bin.high": "45000",
    }


def run_with(arguments: dict[str, str], **changes: str) -> int:
    flags = arguments | {f"--{key.replace('__', '.')}": value for key, value in changes.items()}
    return main(["run", *(text for pair in flags.items() for text in pair)])


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("headstart: ")
    assert err.count("\n") == 1
    return err


def test_good_arguments_get_as_far_as_the_model(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What fails there is no mistake of the user's, and the run folder keeps its traceback."""
    assert run_with(arguments) == 1
    kept = Path(arguments["--output"]) / "error.txt"
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == (
        f"headstart: AssertionError: a model was loaded; the traceback is in {kept}"
    )
    assert "Traceback" in kept.read_text() and "in refuse" in kept.read_text()


def test_debug_shows_the_traceback_instead(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for pair in arguments.items() for part in pair]
    assert main(["run", *flags, "--debug"]) == 1
    assert "in refuse" in capsys.readouterr().err
    assert not (Path(arguments["--output"]) / "error.txt").exists()


def test_sigterm_ends_in_one_sentence(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stages, "run_recipe", lambda recipe: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert run_with(arguments) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped; the same command goes on from here" in one_sentence(capsys)


def test_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in one_sentence(capsys)


def test_malformed_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: {")
    assert main(["run", str(path)]) == 2
    assert "not valid YAML" in one_sentence(capsys)


def test_unknown_key(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments, search__binn="3") == 2
    assert "did you mean search.bin?" in one_sentence(capsys)


def test_empty_corpus(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert run_with(arguments, data=str(empty)) == 2
    assert "empty.jsonl" in one_sentence(capsys)
    assert not Path(arguments["--output"]).exists()


def test_missing_corpus(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments, data="/nowhere/corpus.jsonl") == 2
    assert "/nowhere/corpus.jsonl" in one_sentence(capsys)


def test_unreachable_bin(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments, search__bin__low="1M", search__bin__high="2M") == 2
    message = one_sentence(capsys)
    assert "no sub-network has between 1,000,000 and 2,000,000 parameters" in message
    assert "reaches" in message


def test_no_bin(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments, search__bin__low="0", search__bin__high="0") == 2
    assert "search.bin needs" in one_sentence(capsys)


def test_teacher_without_safetensors(
    arguments: dict[str, str],
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    shutil.copy(teacher_folder / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert run_with(arguments, teacher=str(folder)) == 2
    assert "has neither model.safetensors nor model.safetensors.index.json" in one_sentence(capsys)


def test_unknown_family(
    arguments: dict[str, str],
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(teacher_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert run_with(arguments, teacher=str(folder)) == 2
    assert (
        "'gpt2' is not a family that headstart knows (gemma3_text, gpt_neox, llama, "
        in one_sentence(capsys)
    )


def damaged(teacher_folder: Path, tmp_path: Path, file: str, content: bytes) -> str:
    folder = tmp_path / "damaged"
    shutil.copytree(teacher_folder, folder)
    (folder / file).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("model.safetensors", b"version https://git-lfs", "model.safetensors is not a whole"),
        ("config.json", b"{", "config.json is no model config"),
        ("model.safetensors.index.json", b"{}", "is no index of shards"),
    ],
)
def test_damaged_teacher(
    arguments: dict[str, str],
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: bytes,
    sentence: str,
) -> None:
    folder = damaged(teacher_folder, tmp_path, file, content)
    assert run_with(arguments, teacher=folder) == 2
    assert sentence in one_sentence(capsys)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"intermediate_size": 96}, "has shape (48, 80), and the config says (48, 96)"),
        ({"num_hidden_layers": 5}, "the checkpoint lacks 'model.layers.4.input_layernorm.weight'"),
        ({"num_hidden_layers": 3}, "although its config says 3 layers"),
        ({"num_attention_heads": 0}, "is no config of a llama model"),
        ({"intermediate_size": -1}, "makes mlp -1; mend it or fetch the model again"),
        ({"hidden_size": "wide"}, "is no config of a llama model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantised by gptq"),
    ],
)
def test_a_config_of_other_weights(
    arguments: dict[str, str],
    teacher_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    entries: dict[str, Any],
    sentence: str,
) -> None:
    config = json.loads((teacher_folder / "config.json").read_text()) | entries
    content = json.dumps(config).encode()
    folder = damaged(teacher_folder, tmp_path, "config.json", content)
    assert run_with(arguments, teacher=folder) == 2
    assert sentence in one_sentence(capsys)
    assert not Path(arguments["--output"]).exists()


def test_a_dry_run_loads_nothing_and_leaves_nothing(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part for pair in arguments.items() for part in pair]
    assert main(["search", "--dry-run", *given]) == 0
    assert "shapes in the bin" in capsys.readouterr().out
    assert not Path(arguments["--output"]).exists()


def test_resume_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in one_sentence(capsys)


def test_output_of_another_run(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(arguments["--output"])
    output.mkdir()
    (output / "recipe.yaml").write_text("teacher: another\n")
    assert run_with(arguments) == 2
    assert "holds a run of another recipe (teacher is 'another' there" in one_sentence(capsys)
    assert [path.name for path in output.iterdir()] == ["recipe.yaml"]  # not even a lock


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_a_batch_of_nothing(
    key: str, arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(arguments, **{f"train.{key}": "0"}) == 2
    assert f"train.{key} is 0; use at least 1" in one_sentence(capsys)


def test_output_is_a_file(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(arguments["--output"])
    output.write_text("years of work")
    assert run_with(arguments) == 2
    assert f"{output} is a file; choose another --output" in one_sentence(capsys)
    assert output.read_text() == "years of work"


def test_reserved_train_key(arguments: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(arguments, train__max_steps="3") == 2
    assert "train.max_steps is set by pretrain.tokens" in one_sentence(capsys)


def test_commands_that_take_no_recipe_refuse_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["report", "somewhere", "--search.tokens", "3"])
    assert exit_.value.code == 2
    assert "report does not know --search.tokens" in capsys.readouterr().err


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "result.json" in one_sentence(capsys)


def test_extract_and_report_of_a_bad_spec(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"layers": "0-9", "embed": "0", "kv_groups": [], "mlp": []}))
    flags = ["--teacher", str(teacher_folder), "--spec", str(spec), "--out", str(tmp_path / "s")]
    assert main(["extract", *flags]) == 2
    assert "the spec keeps 10 layers but lists kv_groups for 0" in one_sentence(capsys)
    assert not (tmp_path / "s").exists()


def test_debug_shows_the_traceback_of_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (OSError("no space left on device"), "headstart: no space left on device"),
        (ValueError("not enough values"), "headstart: ValueError: not enough values"),
        (KeyError("layers"), "headstart: KeyError: 'layers'"),
    ],
)
def test_failures_that_are_no_mistake_exit_1(
    failure: Exception,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a run folder the traceback stands on standard error, and the sentence is last."""

    def fail(folder: Path) -> None:
        raise failure

    monkeypatch.setattr(stages, "run_report", fail)
    assert main(["report", "somewhere"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == sentence


def test_help_is_quick() -> None:
    """Well below the promised half second when idle; the bound here only catches heavy imports."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "headstart.cli", "--help"], check=True, stdout=subprocess.DEVNULL
    )
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"model_type": 3}, "model_type '3' is not a family that headstart knows"),
        ({"hidden_act": "unheard_of"}, "transformers makes no model of"),
        ({"dtype": "float99"}, "is no config of a llama model"),
        ({"quantization_config": "gptq"}, "quantised by an unknown method"),
        ({"rope_parameters": {"rope_type": "unheard_of"}}, "transformers makes no model of"),
    ],
)
def test_a_config_that_is_no_models(
    entries: dict[str, Any],
    sentence: str,
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(arguments["--teacher"], damaged)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | entries))
    assert run_with(arguments | {"--teacher": str(damaged)}) == 2
    assert sentence in one_sentence(capsys)


def test_a_baseline_that_is_not_there_is_told_before_text_is_read(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(arguments, pretrain__baselines=f"[{tmp_path / 'nowhere'}]") == 2
    assert "nowhere' is neither a folder nor a model" in one_sentence(capsys)
    assert not (tmp_path / "cache" / "data").exists()


def test_a_plan_for_hardware_of_no_speed(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for pair in arguments.items() for part in pair]
    assert main(["plan", *flags, "--peak-tflops", "nan"]) == 2
    assert "--peak-tflops is nan; write a number above 0" in one_sentence(capsys)


@pytest.mark.parametrize("key", ["--teacher", "--output", "--data", "--student"])
def test_a_name_that_no_disk_takes(
    key: str, arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(arguments | {key: "x" * 300}) == 2
    assert "too long" in one_sentence(capsys)


def test_an_output_that_cannot_be_made(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").write_text("mine")
    assert run_with(arguments | {"--output": str(tmp_path / "a-file" / "run")}) == 2
    assert "a-file/run cannot be made (Not a directory); choose another --output" in one_sentence(
        capsys
    )


@pytest.mark.parametrize("name", ["recipe.yaml", "inputs.json"])
def test_a_run_folder_that_is_garbled(
    name: str, arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(arguments["--output"])
    folder.mkdir()
    (folder / name).write_text("[")
    assert run_with(arguments) == 2
    assert f"{name} is no" in one_sentence(capsys)
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_student_below_a_file_is_told_before_it_is_cut(
    arguments: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"layers": "0", "embed": "0-7", "kv_groups": ["0"], "mlp": ["0-7"]}))
    out = str(spec / "student")
    teacher = arguments["--teacher"]
    assert main(["export", teacher, "--to", "hf", "--out", out]) == 2
    assert "lies below" in one_sentence(capsys)
    monkeypatch.setattr(Checkpoint, "open", None)
    assert main(["extract", "--teacher", teacher, "--spec", str(spec), "--out", out]) == 2
    assert "spec.json, a file; choose another --out" in one_sentence(capsys)


def lacking_a_tensor(teacher: str, folder: Path) -> str:
    shutil.copytree(teacher, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("command", ["evaluate", "export", "extract", "run", "baseline"])
def test_no_command_reads_a_model_that_lacks_a_tensor(
    command: str, arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would fill it with random numbers."""
    model, out = lacking_a_tensor(arguments["--teacher"], tmp_path / "model"), str(tmp_path / "out")
    identity = SubnetSpec.identity(Checkpoint.open(model).architecture.sizes)
    (tmp_path / "spec.json").write_text(json.dumps(identity.to_json()))
    spec = str(tmp_path / "spec.json")
    cut = ["extract", "--teacher", model, "--spec", spec, "--out", out, "--init", "slice"]
    lines = {
        "evaluate": ["evaluate", model, "--data", arguments["--data"]],
        "export": ["export", model, "--to", "hf", "--out", out],
        "extract": cut,
    }
    if command in lines:
        assert main(lines[command]) == 2
    else:
        changed = {"run": {"--teacher": model}, "baseline": {"--pretrain.baselines": f"[{model}]"}}
        assert run_with(arguments | changed[command]) == 2
    assert "lacks 'model.layers.1.mlp.down_proj.weight'" in one_sentence(capsys)
    assert not Path(out).exists() and not (tmp_path / "cache" / "data").exists()


def test_more_likely_tokens_than_the_teacher_has(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(arguments, pretrain__arms="[{name: a, kd: {top_k: 9999}}]") == 2
    assert "kd.top_k is 9999 and the teacher has 128 tokens; use fewer" in one_sentence(capsys)


def test_a_cache_at_no_known_place(
    arguments: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "[{name: a, kd: {top_k: 3, cache: 'xyzzy://place'}}]"
    assert run_with(arguments, pretrain__arms=arms) == 2
    assert "kd.cache xyzzy://place cannot be read (Protocol not known" in one_sentence(capsys)


def test_an_optimizer_that_is_not_installed_is_told_before_text_is_read(
    arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(arguments, train="{optim: galore_adamw}") == 2
    assert "train.optim galore_adamw cannot be made (You need to install" in one_sentence(capsys)
    assert not (tmp_path / "cache" / "data").exists() and not (tmp_path / "run").exists()
