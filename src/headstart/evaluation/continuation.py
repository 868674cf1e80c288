"""How models continue a text, by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headstart.evaluation.scores import remembered_scores
from headstart.model.checkpoint import Checkpoint
from headstart.system.device import default_device, load_frozen
from headstart.system.errors import UserError
from headstart.system.settings import check_least
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import first_token, load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = Sequence[int]
"""A text in tokens."""


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is continued. The model's own generation settings have no say.

    Attributes:
        new_tokens: at most so many; fewer where the text ends, or the model's context does.
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest one.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: of the draws.
    """

    new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise UserError(f"--tokens is {self.new_tokens}; use at least 1")
        check_least(self, "--", seed=0)
        if self.temperature < 0:
            raise UserError(f"--temperature is {self.temperature}; use 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; use more than 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise UserError("--top-p is for draws; set --temperature above 0, or leave it out")


def run_generate(
    model: str, texts: Sequence[str], settings: GenerationSettings
) -> list[dict[str, str]]:
    """Continue texts with a model that a user names.

    Returns:
        For each text "prompt" and "text", its continuation.

    Raises:
        UserError: the model does not read, has no tokenizer, or has no room for a text and a token.
    """
    checkpoint = Checkpoint.open_whole(model)
    prompts = prompts_of(checkpoint, texts)
    found = continue_prompts(checkpoint, prompts, settings)
    return [
        {"prompt": text, "text": continued} for text, continued in zip(texts, found, strict=True)
    ]


def prompts_of(model: Checkpoint, texts: Sequence[str]) -> list[Prompt]:
    """Texts in a model's tokens, begun as documents are in its training.

    Raises:
        UserError: a text is empty, or too long.
    """
    tokenizer = load_tokenizer(model.folder)
    begin = first_token(tokenizer)
    limit = model.architecture.context_limit
    prompts: list[Prompt] = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(f"the prompt {text!r} is empty; write at least a word")
        prompts.append([begin, *tokens] if begin is not None else tokens)
        if limit is not None and len(prompts[-1]) >= limit:
            raise UserError(
                f"the prompt {text[:40]!r}... has {len(prompts[-1]):,} tokens, and the model's "
                f"context is {limit:,}; shorten it"
            )
    return prompts


def beginnings(blocks: TokenBlocks, count: int, num_tokens: int) -> list[Prompt]:
    """Beginnings of documents from all over the test split.

    Each is of another block, and of the first document in it that begins there and is long enough;
    of the block itself where none is.
    """
    end_token = blocks.manifest["end_token"]
    found: list[Prompt] = []
    for row in blocks.spread("test", count * blocks.manifest["settings"]["block_length"])[:]:
        block = [int(token) for token in row]
        starts = [place + 1 for place, token in enumerate(block) if token == end_token]
        pieces = (block[start : start + num_tokens] for start in starts)
        whole = (piece for piece in pieces if len(piece) == num_tokens and end_token not in piece)
        found.append(next(whole, block[:num_tokens]))
    return found[:count]


def continue_prompts(
    model: Checkpoint,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    tokenizer_folder: Path | None = None,
) -> list[str]:
    """What a model adds to each prompt; what was made before is read from the cache.

    Args:
        model: that continues them.
        prompts: in its tokens.
        settings: how.
        tokenizer_folder: whose tokenizer it is; None for the model's own.
    """
    tokenizer = load_tokenizer(tokenizer_folder or model.folder)
    key = [
        model.hash,
        tokenizer_hash(tokenizer_folder or model.folder),
        [list(prompt) for prompt in prompts],
        [settings.new_tokens, settings.temperature, settings.top_p, settings.seed],
        default_device().type,
    ]
    found = remembered_scores(
        "continuations", key, lambda: {"texts": _continued(model, tokenizer, prompts, settings)}
    )
    texts: list[str] = found["texts"]
    return texts


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Prompt) -> str:
    """Tokens as text, without those that stand for no text."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


def _continued(
    model: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
) -> list[str]:
    loaded = load_frozen(model.folder, default_device())
    texts = dict[int, str]()
    by_length: dict[int, list[int]] = {}  # together, and none is padded
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    for length, places in by_length.items():
        limit = model.architecture.context_limit
        room = settings.new_tokens if limit is None else min(settings.new_tokens, limit - length)
        rows = _generate(loaded, tokenizer, [prompts[place] for place in places], room, settings)
        for place, row in zip(places, rows, strict=True):
            before, after = (decoded(tokenizer, tokens) for tokens in (row[:length], row))
            # Decoded together, since some tokenizers drop the space before a text's first word.
            is_prefix = after.startswith(before)
            texts[place] = after[len(before) :] if is_prefix else decoded(tokenizer, row[length:])
    return [texts[place] for place in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    new_tokens: int,
    settings: GenerationSettings,
) -> list[list[int]]:
    """Prompts of one length with what the model adds, in tokens."""
    from transformers import GenerationConfig

    draws = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    chosen = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,  # behind a text that has ended before the others
        **(draws if settings.temperature else {}),
    )
    model.generation_config = chosen  # of which transformers would take what is not set here
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    torch.manual_seed(settings.seed)
    rows = model.generate(tokens, generation_config=chosen, attention_mask=torch.ones_like(tokens))
    return [[int(token) for token in row] for row in rows]
