"""Runs inside whittle's own environment; headstart is not there.

    python whittle_worker.py COMMAND < request.json

COMMAND is one of `proposals`, `importance`, `convert` and `search` below. The request holds its
arguments and `num_threads`. The last line of stdout is the answer as JSON; whittle and litgpt print
other things before it.
"""

# mypy: disable-error-code="import-not-found, no-any-return"

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

VALIDATION_LENGTH = 512
"""Context for which whittle keeps its rotary table: the default of its own search. A sub-network
has the table made again each time, so the models' full context would only slow whittle down."""


def proposals(
    model: str, space: str, bins: list[list[int]], candidates: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Time whittle's `RandomSampler.sample` and `RandomSampler.get_parameters`.

    Args:
        model: litgpt's name of the architecture. It is built without memory for its weights.
        space: a key of whittle's `search_spaces`.
        bins: (low, high) pairs in which candidates are counted.
        candidates: drawn and counted in each repeat.
        repeats: of which the median is taken.
        seed: of the sampler.

    Returns:
        Seconds per candidate of drawing and of counting, the number of candidates, how many of
        them lie in each bin, and the count of the whole model.
    """
    from litgpt import Config
    from whittle.models.gpt import GPT
    from whittle.sampling.random_sampler import RandomSampler
    from whittle.search.search_spaces import search_spaces

    with torch.device("meta"):
        gpt = GPT(Config.from_name(model))
    gpt.max_seq_length = VALIDATION_LENGTH
    sampler = RandomSampler(search_spaces[space](gpt.config), seed=seed)
    whole = sampler.get_parameters(gpt, sampler.get_largest_sub_network())
    sampling, counting, counts = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        drawn = [sampler.sample() for _ in range(candidates)]
        middle = time.perf_counter()
        counts += [sampler.get_parameters(gpt, config) for config in drawn]
        end = time.perf_counter()
        sampling.append((middle - start) / candidates)
        counting.append((end - middle) / candidates)
    return {
        "seconds_sampling": statistics.median(sampling),
        "seconds_counting": statistics.median(counting),
        "candidates": len(counts),
        "in_bins": [sum(low <= count <= high for count in counts) for low, high in bins],
        "parameters_whole": whole,
    }


def importance(
    checkpoint: str, blocks: str, batch_size: int, repeats: int, dtype: str
) -> dict[str, Any]:
    """Time whittle's four importance functions on given tokens.

    They are called directly, since in 0.6.0 the `compute_order_*` functions of its script do not
    pass on the `dataset_path` that they need.

    Args:
        checkpoint: litgpt folder.
        blocks: .npy of token ids, as many blocks as whole batches hold.
        batch_size: blocks per forward pass.
        repeats: of which the median is taken.
        dtype: of the model; whittle's script converts every model to "bfloat16".

    Returns:
        Seconds by function, and the scores of the layers and the MLP neurons, which can be checked
        against those of another tool.
    """
    from torch.utils.data import DataLoader
    from whittle.importance import block_importance, embd_size, intermediate_size, num_heads
    from whittle.importance.utils import TextDataset

    token_ids = _token_ids(blocks)
    model = _model(checkpoint, compute_importance=True).to(getattr(torch, dtype))
    model.max_seq_length = token_ids.shape[1]
    assert len(token_ids) % batch_size == 0, "whittle reshapes to full batches"

    # Replaced: `load_from_disk` and `get_dataloader`, which would read a text dataset, tokenise it
    # and shuffle its blocks, so that exactly the given tokens are used. That saves whittle time.
    for module in (block_importance, embd_size, intermediate_size, num_heads):
        module.load_from_disk = lambda dataset_path: None
        module.get_dataloader = lambda tokenizer, dataset, length, size: DataLoader(
            TextDataset(token_ids, token_ids), batch_size=size
        )

    common = {
        "max_length": token_ids.shape[1],
        "model": model,
        "tokenizer": None,
        "dataset_path": "",
        "batch_size": batch_size,
        "num_batches": len(token_ids) // batch_size,
    }
    # "mean" is mean |activation|. The layers' score, 1 - cos(input, output), has no such choice.
    calls = {
        "embed": (embd_size.compute_importance_embd, {"objective": "mean"}),
        "mlp": (intermediate_size.compute_importance_intermediate_size, {"objective": "mean"}),
        "kv_groups": (num_heads.compute_importance_head_groups, {"objective": "mean"}),
        "layers": (block_importance.compute_block_importance, {}),
    }
    with torch.no_grad():
        model(token_ids[:batch_size])  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    scores: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, (function, options) in calls.items():
            start = time.perf_counter()
            found = function(**common, **options)
            seconds[name].append(time.perf_counter() - start)
            scores[name] = [float(score) for score in found.values()]
    return {
        "seconds": {name: statistics.median(runs) for name, runs in seconds.items()},
        "layers": scores["layers"],
        "mlp": scores["mlp"],
    }


def convert(source: str, target: str, model: str) -> dict[str, Any]:
    """Convert a Hugging Face folder into a litgpt folder, unless that is done already.

    litgpt converts in place, so the files are copied first; the folder appears when it is whole.

    Args:
        source: Hugging Face folder with safetensors.
        target: the litgpt folder to make.
        model: litgpt's name of the architecture.
    """
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    finished, unfinished = Path(target), Path(target + ".unfinished")
    if not finished.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        convert_hf_checkpoint(unfinished, model_name=model)
        for weights in unfinished.glob("*.safetensors"):
            weights.unlink()
        unfinished.rename(finished)
    return {"checkpoint": target}


def search(
    checkpoint: str,
    blocks: str,
    space: str,
    bin: tuple[int, int],
    candidates: int,
    seconds: float,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """whittle's random search for the lowest loss inside a bin.

    whittle has no search for one bin, so candidates are drawn and counted as it does, those outside
    are dropped, and the rest are evaluated.

    Args:
        checkpoint: litgpt folder.
        blocks: .npy of token ids on which every candidate is scored.
        space: a key of whittle's `search_spaces`, one of those that `set_sub_network` takes.
        bin: smallest and largest count, a tied output matrix counted once.
        candidates: evaluate at most so many.
        seconds: begin no evaluation after so many.
        batch_size: blocks per forward pass.
        seed: of the sampler.

    Returns:
        For every evaluated candidate its loss, its count and the seconds since the search began;
        the best; how many were drawn, and the seconds that finding those in the bin took. Also
        loss and count of the whole model, from before the clock starts.
    """
    from whittle.sampling.random_sampler import RandomSampler
    from whittle.search.search_spaces import search_spaces

    token_ids = _token_ids(blocks)
    model = _model(checkpoint)
    model.max_seq_length = token_ids.shape[1]
    tied = json.loads((Path(checkpoint) / "config.json").read_text())["tie_word_embeddings"]
    sampler = RandomSampler(search_spaces[space](model.config), seed=seed)
    whole = {"loss_whole": _loss(model, token_ids, batch_size)}  # the warm-up, too
    whole["parameters_whole"] = _count(model, tied)

    drawn, illegal, seconds_evaluating = 0, 0, 0.0
    evaluated: list[dict[str, Any]] = []
    start = time.perf_counter()
    while len(evaluated) < candidates and time.perf_counter() - start < seconds:
        config = sampler.sample()
        drawn += 1
        if not _is_legal(model.config, config):
            illegal += 1
            continue
        model.set_sub_network(**config)
        parameters = _count(model, tied)
        if bin[0] <= parameters <= bin[1]:
            before = time.perf_counter()
            loss = _loss(model, token_ids, batch_size)
            now = time.perf_counter()
            seconds_evaluating += now - before
            evaluated.append({"seconds": now - start, "loss": loss, "parameters": parameters})
    elapsed = time.perf_counter() - start
    return {
        **whole,
        "seconds": elapsed,
        "seconds_finding": elapsed - seconds_evaluating,
        "drawn": drawn,
        "illegal": illegal,
        "evaluated": evaluated,
        "best": min(evaluated, key=lambda one: one["loss"], default=None),
    }


def _is_legal(config: Any, candidate: dict[str, Any]) -> bool:
    """Whether `set_sub_network` takes a candidate.

    whittle's spaces ignore grouped queries and the size of the MLP, and `set_sub_network` raises on
    what does not fit. Such candidates are dropped before they cost whittle more than their drawing.
    """
    return (
        candidate["sub_network_num_heads"][0] % config.n_query_groups == 0
        and candidate["sub_network_intermediate_size"][0] <= config.intermediate_size
    )


def _count(model: Any, tied: bool) -> int:
    """Parameters of the current sub-network.

    whittle counts input embedding and output matrix both, even where they are the same tensor.
    """
    from whittle.metrics.parameters import compute_parameters, params_embedding_layer

    twice = params_embedding_layer(model.transformer.wte) if tied else 0
    return int(compute_parameters(model)) - twice


@torch.no_grad()
def _loss(model: Any, token_ids: Tensor, batch_size: int) -> float:
    """Mean next-token cross-entropy in nats; the first token of a block is context only."""
    total = 0.0
    batch: Tensor
    for batch in token_ids.split(batch_size):  # type: ignore[no-untyped-call]
        # litgpt's chunks of the output matrix (`lm_head_chunk_size`) made this slower here.
        logits = model(batch)[:, :-1]
        for row, targets in zip(logits, batch[:, 1:], strict=True):
            total += float(functional.cross_entropy(row, targets, reduction="sum"))
    return total / (token_ids.shape[0] * (token_ids.shape[1] - 1))


def _model(checkpoint: str, compute_importance: bool = False) -> Any:
    """A litgpt checkpoint as whittle's model in float32."""
    from litgpt import Config
    from whittle.models.gpt import GPT

    folder = Path(checkpoint)
    model = GPT(Config.from_file(folder / "model_config.yaml"), compute_importance)
    model.load_state_dict(torch.load(folder / "lit_model.pth", map_location="cpu"))
    return model.float().eval()


def _token_ids(blocks: str) -> Tensor:
    return torch.from_numpy(np.load(blocks).astype("int64"))


COMMANDS = {function.__name__: function for function in (proposals, importance, convert, search)}

if __name__ == "__main__":
    request = json.load(sys.stdin)
    torch.set_num_threads(request.pop("num_threads"))
    print(json.dumps(COMMANDS[sys.argv[1]](**request)))
