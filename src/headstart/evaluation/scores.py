"""What is measured of a model, and kept: its loss on a text first of all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from headstart.losses.next_token import mean_loss
from headstart.model.checkpoint import Checkpoint
from headstart.system.device import default_device, load_frozen
from headstart.system.files import write_json
from headstart.system.memo import remembered
from headstart.system.progress import progress
from headstart.text.blocks import TokenBlocks
from headstart.text.settings import SplitName

Scores = dict[str, Any]
"""Of one model: "loss", "perplexity", "bits_per_byte" and "tokens" on a text, and "tasks"."""
BLOCKS_PER_BATCH = 8
VERSION = 3
"""Of what the memo keeps; raise it when an equal key would give other scores."""


def remembered_scores(kind: str, key: Any, measure: Callable[[], Scores]) -> Scores:
    """What was measured before for an equal key, or what is measured now and then kept.

    Args:
        kind: of measurement, a folder of headstart's cache.
        key: all that the scores depend on, as JSON can write it.
        measure: called if nothing is remembered.
    """
    scores: Scores = remembered(
        kind,
        VERSION,
        key,
        make=lambda folder: write_json(folder / "scores.json", measure()),
        read=lambda folder: json.loads((folder / "scores.json").read_text()),
    )
    return scores


def text_loss(
    model: Checkpoint, blocks: TokenBlocks, num_tokens: int, split: SplitName = "test"
) -> Scores:
    """Loss of a checkpoint on tokens from all over a split of a corpus.

    Returns:
        "loss" in nats per token, "tokens" that were read, and "parameters" of the model.
    """
    tokens = blocks.sample(split, num_tokens)
    with progress("evaluate", tokens.numel(), "tokens") as advance:
        loaded = load_frozen(model.folder, default_device())
        return {
            "loss": mean_loss(loaded, tokens, BLOCKS_PER_BATCH, advance, blocks.separator),
            "tokens": tokens.numel(),
            "parameters": loaded.num_parameters(),
        }


def text_scores(model: Checkpoint, blocks: TokenBlocks, num_tokens: int) -> Scores:
    """Scores of a checkpoint on at most so many tokens of the test split of a text.

    The model's own tokenizer must have made the blocks.

    Returns:
        "parameters", "loss" in nats per token, "perplexity", "bits_per_byte" and "tokens".
    """
    key = [model.hash, blocks.fingerprint, num_tokens, default_device().type]
    found = remembered_scores("losses", key, lambda: text_loss(model, blocks, num_tokens))
    loss: float = found["loss"]
    return {
        "parameters": found["parameters"],
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": bits_per_byte(loss, blocks.bytes_per_token("test")),
        "tokens": found["tokens"],
    }


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token in bits per byte of text, which does not depend on the tokenizer."""
    return loss / bytes_per_token / math.log(2)
