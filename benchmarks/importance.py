"""How long one pass of importance scores takes, next to whittle 0.6.0.

    python benchmarks/importance.py

Both score layers, residual channels, KV groups and MLP neurons of the demo's teacher on the CPU, on
the same tokens in the same batches, with the same number of threads. headstart does so in one pass,
whittle in four functions with a pass each; their time is added up. Loading is left out, and so is
reading and tokenising, which whittle would repeat in each function.

whittle's `compute_importance.py` converts every model to bfloat16, on a CPU too, while headstart
uses it only where it is fast. The ratio is that of both as they come; the one above it has whittle
in float32 as well.

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

from headstart.demo import demo_corpus, demo_teacher
from headstart.searching.importance import measure_importance
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings
from peers.environment import ask_whittle, litgpt_checkpoint, num_threads

GOAL = 20
BLOCKS, BLOCK_TOKENS, BATCH_BLOCKS = 2, 128, 2
"""Few tokens, as whittle loops over every token, channel, neuron and group in Python."""
REPEATS, WHITTLE_REPEATS = 7, 3
TOLERANCE = 1e-3


def headstart_scores(
    teacher: PreTrainedModel, batches: Sequence[Int[Tensor, "batch tokens"]]
) -> tuple[float, Float[Tensor, " layers"], Float[Tensor, " mlp"]]:
    """One pass: its seconds, the layers' scores, and the neurons' summed over layers."""
    start = time.perf_counter()
    scores = measure_importance(teacher, batches)
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

    theirs = {
        dtype: ask_whittle(
            "importance",
            checkpoint=str(litgpt_checkpoint(folder, "SmolLM2-135M")),
            blocks=blocks,
            batch_size=options.batch_blocks,
            repeats=WHITTLE_REPEATS,
            dtype=dtype,
        )
        for dtype in ("float32", "bfloat16")
    }
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher.eval().requires_grad_(False)
    batches = torch.from_numpy(blocks).split(options.batch_blocks)  # type: ignore[no-untyped-call]
    runs = [headstart_scores(teacher, batches) for _ in range(1 + REPEATS)]
    ours = statistics.median(seconds for seconds, _, _ in runs[1:])  # the first was the warm-up
    for axis, scores in (("layers", runs[0][1]), ("mlp", runs[0][2])):
        torch.testing.assert_close(
            scores,
            torch.tensor(theirs["float32"][axis]),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )

    num_blocks, block_tokens = blocks.shape
    print(f"{num_blocks} blocks of {block_tokens} tokens, {options.batch_blocks} in a batch")
    print(f"{num_threads()} threads; seconds")
    print(f"{'':10} {'whittle float32':>16} {'bfloat16':>9} {'headstart float32':>18}")
    for axis in theirs["float32"]["seconds"]:
        single, half = (theirs[dtype]["seconds"][axis] for dtype in theirs)
        print(f"{axis:10} {single:16.3f} {half:9.3f}")
    single, half = (sum(one["seconds"].values()) for one in theirs.values())
    print(f"{'all':10} {single:16.3f} {half:9.3f} {ours:18.3f}")
    print(f"both in float32: {single / ours:.1f}x")
    print(f"ratio: {half / ours:.1f}x (goal {GOAL}x)")


if __name__ == "__main__":
    main()
