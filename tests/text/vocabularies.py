"""Tokenizers of every kind whose vocabulary can be trimmed, trained on a little text."""

import random
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
SYLLABLES = ["ka", "lo", "mi", "tor", "ne", "sha", "ru", "é", "ß"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>says:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>says:{% endif %}"
)


def sentences(seed: int = 0, count: int = 400) -> list[str]:
    """Text in a made-up language, whose commoner words are more common than chance."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(120)]
    weights = [1 / rank for rank in range(1, 121)]
    return [" ".join(rng.choices(words, weights, k=rng.randint(3, 30))) for _ in range(count)]


def byte_level(ignores_merges: bool = False) -> Tokenizer:
    """As SmolLM2's, GPT-NeoX' or, where merges are ignored for whole words, Llama 3's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: a token may be merged in all ways that two others make it."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(
        sentences(), trainers.BpeTrainer(vocab_size=220, show_progress=False)
    )
    pieces = [token for token, _ in sorted(learnt.get_vocab().items(), key=lambda item: item[1])]
    tokens = [*SPECIAL, *(f"<0x{number:02X}>" for number in range(256)), *pieces]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [
        (piece[:end], piece[end:])
        for piece in pieces
        for end in range(1, len(piece))
        if piece[:end] in vocabulary and piece[end:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-level, whole words first": lambda: byte_level(ignores_merges=True),
    "byte fallback": byte_fallback,
    "unigram": unigram,
}


def saved_tokenizer(kind: str, folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with a post-processor, added tokens and a chat template."""
    backend = KINDS[kind]()
    backend.add_tokens([AddedToken("<|user|>", special=True), AddedToken("<|assistant|>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer
