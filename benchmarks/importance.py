"""How long one pass of importance scores takes, next to whittle 0.6.0.

    python benchmarks/importance.py

Both score layers, residual channels, KV groups and MLP neurons of the demo's teacher in float32 on
the CPU, on the same tokens in the same batches, with the same number of threads. headstart does so
in one pass, whittle in four functions with a pass each; their time is added up. Loading is left
out, and so is reading and tokenising, which whittle would repeat in each function.

Layers and MLP neurons are scored by the same formulas, so the benchmark also checks that both saw
the same model and the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.assets import demo_corpus, demo_teacher
from headstart.data import DataSettings, prepare
from headstart.search.importance import activation_importance
from peers.environment import ask_whittle, litgpt_checkpoint, num_threads

GOAL = 20
BLOCKS, BLOCK_TOKENS, BATCH_BLOCKS = 2, 128, 2
"""Few tokens, as whittle loops over every token, channel, neuron and group in Python."""
REPEATS, WHITTLE_REPEATS = 7, 3
RELATIVE_TOLERANCE = 1e-3


def headstart_scores(
    teacher: PreTrainedModel, batches: Sequence[Int[Tensor, "batch tokens"]]
) -> tuple[float, Float[Tensor, " layers"], Float[Tensor, " mlp"]]:
    """One pass: its seconds, the layers' scores, and the neurons' summed over layers."""
    start = time.perf_counter()
    scores = activation_importance(teacher, batches)
    seconds = time.perf_counter() - start
    return seconds, scores.layers, scores.mlp.sum(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS)
    parser.add_argument("--batch-blocks", type=int, default=BATCH_BLOCKS)
    options = parser.parse_args()
    torch.set_num_threads(num_threads())
    folder = demo_teacher()
    settings = DataSettings(source=str(demo_corpus()), block_length=options.block_tokens)
    blocks = prepare(settings, folder).split("train")[: options.blocks].astype("int64")

    theirs = ask_whittle(
        "importance",
        checkpoint=str(litgpt_checkpoint(folder, "SmolLM2-135M")),
        blocks=blocks,
        batch_size=options.batch_blocks,
        repeats=WHITTLE_REPEATS,
    )
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    batches = torch.from_numpy(blocks).split(options.batch_blocks)  # type: ignore[no-untyped-call]
    runs = [headstart_scores(teacher, batches) for _ in range(1 + REPEATS)]
    ours = statistics.median(seconds for seconds, _, _ in runs[1:])  # the first was the warm-up
    for axis, scores in (("layers", runs[0][1]), ("mlp", runs[0][2])):
        torch.testing.assert_close(
            scores, torch.tensor(theirs[axis]), rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE
        )

    whittle = sum(theirs["seconds"].values())
    num_blocks, block_tokens = blocks.shape
    print(f"{num_blocks} blocks of {block_tokens} tokens, {options.batch_blocks} in a batch")
    print(f"{num_threads()} threads")
    print(f"{'':20} seconds")
    for axis, seconds in theirs["seconds"].items():
        print(f"whittle {axis:12} {seconds:7.3f}")
    print(f"whittle {'all':12} {whittle:7.3f}")
    print(f"headstart {'all':10} {ours:7.3f}")
    print(f"ratio: {whittle / ours:.1f}x (goal {GOAL}x)")


if __name__ == "__main__":
    main()
