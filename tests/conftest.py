"""Small random teachers of every family, and a small text corpus with a tokenizer of its own."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headstart.calibration import start
from headstart.calibration.moments import Statistics
from headstart.calibration.start import Calibration
from headstart.model.checkpoint import Checkpoint
from headstart.model.spec import SubnetSpec
from headstart.runs.extraction import extract_student
from headstart.searching import plan
from headstart.system import device
from headstart.training import arguments

torch.set_num_threads(1)  # on models this small, threads only wait for one another

VOCAB_SIZE = 128

TEACHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-tied-gqa": lambda: _llama(num_key_value_heads=2, tie_word_embeddings=True),
    "llama-untied-gqa": lambda: _llama(num_key_value_heads=3, tie_word_embeddings=False),
    "llama-untied-mha-biases": lambda: _llama(
        num_key_value_heads=6, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "gpt_neox-untied": lambda: _gpt_neox(tie_word_embeddings=False),
    "gpt_neox-tied": lambda: _gpt_neox(tie_word_embeddings=True),
    "gpt_neox-serial-no-attention-bias": lambda: _gpt_neox(
        use_parallel_residual=False, attention_bias=False
    ),
}


DESCENDANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral-untied": lambda: MistralForCausalLM(
        _shaped(MistralConfig, tie_word_embeddings=False, sliding_window=7)
    ),
    "mistral-tied": lambda: MistralForCausalLM(_shaped(MistralConfig, tie_word_embeddings=True)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(_shaped(Qwen2Config, tie_word_embeddings=True)),
    "qwen2-untied": lambda: Qwen2ForCausalLM(
        _shaped(
            Qwen2Config,
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=2,
        )
    ),
    "qwen3-tied": lambda: Qwen3ForCausalLM(_shaped(Qwen3Config, tie_word_embeddings=True)),
    "qwen3-untied-biases": lambda: Qwen3ForCausalLM(
        _shaped(Qwen3Config, tie_word_embeddings=False, attention_bias=True)
    ),
    "gemma3_text-tied": lambda: _gemma3(tie_word_embeddings=True),
    "gemma3_text-untied": lambda: _gemma3(tie_word_embeddings=False),
    "phi3-untied": lambda: Phi3ForCausalLM(_phi3_shaped(tie_word_embeddings=False)),
    "phi3-tied-partial": lambda: Phi3ForCausalLM(
        _phi3_shaped(tie_word_embeddings=True, partial_rotary_factor=0.5, sliding_window=7)
    ),
    "olmo2-tied": lambda: Olmo2ForCausalLM(_shaped(Olmo2Config, tie_word_embeddings=True)),
    "olmo2-untied-biases": lambda: Olmo2ForCausalLM(
        _shaped(Olmo2Config, tie_word_embeddings=False, attention_bias=True)
    ),
}
"""Families that differ from Llama in parts; the others are in `TEACHERS`."""

GATE = ("llama-tied-gqa", "gpt_neox-untied", "gemma3_text-tied", "phi3-untied")
"""One of each mechanism: tied and grouped; fused with LayerNorms and biases; norms that write to
the stream; parts of different heights fused. The gate runs every test on these alone."""


@pytest.hookimpl(tryfirst=True)  # before the marks are selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only `make test-all` runs: the other families, of every test that has one of these.

    A test that has none of them keeps the first of its own.
    """
    by_function: dict[tuple[Path, str], list[tuple[str, pytest.Item]]] = {}
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for value in parameters.values():
            if isinstance(value, str) and value in TEACHERS | DESCENDANTS:
                name = getattr(item, "originalname", item.name)
                by_function.setdefault((item.path, name), []).append((value, item))
    for families in by_function.values():
        found = {family for family, _ in families}
        kept = found.intersection(GATE) or {families[0][0]}
        for family, item in families:
            if family not in kept:
                item.add_marker(pytest.mark.exhaustive)


def _shaped(kind: Any, **settings: Any) -> Any:
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return kind(**shape | settings)


def _phi3_shaped(**settings: Any) -> Any:
    config = _shaped(Phi3Config, hidden_size=96, **settings)
    del config.head_dim  # which it derives
    return config


def _gemma3(**settings: Any) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = _shaped(
        Gemma3TextConfig, layer_types=kinds, sliding_window=6, query_pre_attn_scalar=24, **settings
    )
    return Gemma3ForCausalLM(config)


def _llama(**settings: Any) -> PreTrainedModel:
    return LlamaForCausalLM(_shaped(LlamaConfig, **settings))


def _gpt_neox(**settings: Any) -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        **settings,
    )
    return GPTNeoXForCausalLM(config)


def random_teacher(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode whose norms and biases are random too.

    Freshly made norms are ones and biases zeros, which would hide a wrong slice.
    """
    torch.manual_seed(seed)
    model = (TEACHERS | DESCENDANTS)[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter.normal_(std=scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def padded(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The same model with so many rows of its vocabulary, of which the new ones are loud: no text
    has them, and to compare with them would show."""
    generator = torch.Generator().manual_seed(7)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if (missing := rows - len(module.weight)) > 0:
            noise = torch.randn(missing, module.weight.shape[1], generator=generator)
            module.weight = torch.nn.Parameter(torch.cat([module.weight.detach(), noise]))
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.vocab_size = rows
    return model


def extract(
    teacher: Path,
    spec: SubnetSpec,
    out_folder: Path,
    statistics: Statistics | None = None,
    blocks: torch.Tensor | None = None,
    **settings: Any,
) -> Path:
    """Cut a student out of a folder and write it."""
    source = Calibration(Checkpoint.open(teacher), statistics, blocks=blocks)
    return extract_student(source, spec, Path(out_folder), **settings)


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is that of a file in a folder, to which nobody here has written."""
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        pytest.skip("only Linux tells what memory is of which file")
    is_there = False
    for line in maps.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(address, 16) for address in span.groups())
            is_there = start <= tensor.data_ptr() < end and str(folder.resolve()) in line
        elif is_there and line.startswith("Anonymous:"):
            return line.split()[1] == "0"
    return False


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32, also where bfloat16 is fast."""
    for module in (arguments, device, plan, start):
        monkeypatch.setattr(module, "has_fast_bf16", lambda device: False)


@pytest.fixture(params=TEACHERS)
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each kind of teacher in turn."""
    return random_teacher(request.param)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a model and return its folder."""

    def save(model: PreTrainedModel, name: str = "teacher", **settings: Any) -> Path:
        model.save_pretrained(tmp_path / name, **settings)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 400 documents in a made-up language with some structure to learn."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 5))) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as stream:
        for _ in range(400):
            start, stride = generator.randrange(60), generator.choice([1, 7, 11])
            length = generator.randint(20, 60)
            text = " ".join(words[(start + stride * i) % 60] for i in range(length))
            stream.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 128 entries; id 0 ends a text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<end>"], show_progress=False
    )
    trained.train_from_iterator(corpus.read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<end>")


@pytest.fixture(scope="session")
def teacher_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A small Llama teacher on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    random_teacher("llama-tied-gqa").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
