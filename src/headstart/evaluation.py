"""What is measured of a model, and kept: its loss on a text first of all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from headstart.assets import cache_root
from headstart.data import TokenBlocks
from headstart.device import default_device, load_frozen
from headstart.files import write_json
from headstart.held_out import bits_per_byte, mean_loss
from headstart.progress import progress
from headstart.subnet.extract import hash_checkpoint

Scores = dict[str, Any]
"""Of one model: "loss", "perplexity", "bits_per_byte" and "tokens" on a text, and "tasks"."""
BLOCKS_PER_BATCH = 8


def kept_scores(kind: str, identity: Sequence[Any], measure: Callable[[], Scores]) -> Scores:
    """What was measured before under the same identity, or what is measured now and then kept.

    Args:
        kind: of measurement, a folder of headstart's cache.
        identity: all that the scores depend on, as JSON can write it.
        measure: called if nothing is kept.
    """
    digest = xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())
    path = cache_root() / kind / f"{digest}.json"
    if not path.is_file():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    kept: Scores = json.loads(path.read_text())
    return kept


def validation_loss(model: Path, blocks: TokenBlocks, num_tokens: int) -> Scores:
    """Loss of a checkpoint on the first tokens of a corpus' validation split.

    Returns:
        "loss" in nats per token, "tokens" that were read, and "parameters" of the model.
    """
    tokens = blocks.first("validation", num_tokens)
    with progress("evaluate", tokens.numel(), "tokens") as advance:
        loaded = load_frozen(model, default_device())
        return {
            "loss": mean_loss(loaded, tokens, BLOCKS_PER_BATCH, advance, blocks.separator),
            "tokens": tokens.numel(),
            "parameters": loaded.num_parameters(),
        }


def text_scores(model: Path, blocks: TokenBlocks, num_tokens: int) -> Scores:
    """Loss, perplexity and bits per byte of a checkpoint on a corpus' validation split.

    Args:
        model: a checkpoint folder.
        blocks: made with the model's own tokenizer.
        num_tokens: at most so many.

    Returns:
        "parameters", "loss" in nats per token, "perplexity", "bits_per_byte" and "tokens".
    """
    identity = [hash_checkpoint(model), blocks.fingerprint, num_tokens, default_device().type]
    found = kept_scores("losses", identity, lambda: validation_loss(model, blocks, num_tokens))
    split = blocks.manifest["splits"]["validation"]
    loss: float = found["loss"]
    return {
        "parameters": found["parameters"],
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": bits_per_byte(loss, split["tokens"], split["text_bytes"]),
        "tokens": found["tokens"],
    }
