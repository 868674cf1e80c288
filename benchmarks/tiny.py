"""A tiny teacher and a small text, for benchmarks that run headstart hundreds of times."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 128


def write_text(folder: Path, num_files: int = 1, num_documents: int = 200) -> Path:
    """A folder of .jsonl files, each with so many random documents."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 6))) for _ in range(60)]
    for number in range(num_files):
        texts = [" ".join(rng.choices(words, k=rng.randrange(8, 40))) for _ in range(num_documents)]
        lines = "".join(json.dumps({"text": text, "number": 1}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


def write_teacher(folder: Path, text: Path) -> Path:
    """A Llama of 0.1M parameters with random weights, and a tokenizer made of the text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, head_dim=16, max_position_embeddings=512,
        pad_token_id=None, bos_token_id=None, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<end>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train([str(file) for file in text.iterdir()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    return folder


def small_recipe(teacher: Path, text: Path, output: Path) -> dict[str, Any]:
    """A recipe whose stages take seconds, two arms with and without distillation among them."""
    return {
        "teacher": str(teacher),
        "output": str(output),
        "data": {
            "source": str(text), "block_length": 32, "validation_fraction": 0.1,
            "search_fraction": 0.1,
        },
        "search": {
            "bin": {"low": 30_000, "high": 45_000},
            "evolution": {"population": 4, "generations": 2, "elites": 2},
            "tokens": 256,
            "calibration_tokens": 512,
        },
        "pretrain": {
            "tokens": 1280,
            "validation_tokens": 256,
            "evaluations": 3,
            "arms": [
                {"name": "scratch", "init": "random"},
                {"name": "subnet"},
                {"name": "subnet+kd", "kd": {"alpha": 0.5}},
            ],
        },
        "train": {
            "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "logging_steps": 1,
        },
    }  # fmt: skip
