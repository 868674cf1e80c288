"""Speed and memory of preparing text, next to the tokenizer's own batches.

    python benchmarks/tokenise.py

400 MB of the demo's text, as a .jsonl file, become token blocks of the demo teacher's tokenizer in
a process of its own, whose peak resident memory is read; a second one is killed half way and goes
on. Before and after, the bare tokenizer encodes a tenth of the same documents, already in memory,
on the same threads. The ratio is headstart's megabytes a second over the tokenizer's.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from transformers import AutoTokenizer

from headstart.demo import demo_corpus, demo_teacher
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings

GOAL, MEMORY_GOAL_BYTES = 0.8, 1.5e9
TEXT_BYTES, RAW_SHARE = 400e6, 0.1
BATCH_CHARACTERS = 1 << 20


def raw_rate(texts: list[str]) -> float:
    """Bytes a second of the tokenizer alone, in batches of about a million characters."""
    tokenizer = AutoTokenizer.from_pretrained(demo_teacher()).backend_tokenizer
    batches, batch, size = [], list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            batches.append(batch)
            batch, size = [], 0
    tokenizer.encode_batch(batches[0], add_special_tokens=False)  # warms up
    start = time.perf_counter()
    for batch in batches:
        tokenizer.encode_batch(batch, add_special_tokens=False)
    seconds = time.perf_counter() - start
    return sum(len(text.encode()) for batch in batches for text in batch) / seconds


def work(source: Path, cache: Path) -> None:
    start = time.perf_counter()
    blocks = prepare(DataSettings(source=str(source)), demo_teacher(), cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.blake2b()
    for name in ("train", "search", "validation"):
        digest.update((blocks.folder / f"{name}.bin").read_bytes())
    answer = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "digest": digest.hexdigest(),
        "bytes": sum(split["text_bytes"] for split in blocks.manifest["splits"].values()),
        "tokens": sum(split["tokens"] for split in blocks.manifest["splits"].values()),
    }
    print(json.dumps(answer))


def main() -> None:
    documents = [json.loads(line)["text"] for line in demo_corpus().read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / "corpus.jsonl"
        written, number = 0, 0
        with source.open("w") as lines:
            for number, text in enumerate(cycle(documents)):
                text = f"{number}. {text}"  # no two alike
                lines.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= TEXT_BYTES:
                    break
        raw_texts = list(islice(cycle(documents), int(number * RAW_SHARE)))
        command = [sys.executable, __file__, str(source)]
        rates = [raw_rate(raw_texts)]
        whole = subprocess.run(
            [*command, str(folder / "whole")], check=True, capture_output=True, text=True
        )
        rates.append(raw_rate(raw_texts))
        answer = json.loads(whole.stdout.splitlines()[-1])
        process = subprocess.Popen(
            [*command, str(folder / "killed")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        time.sleep(answer["seconds"] / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = subprocess.run(
            [*command, str(folder / "killed")], check=True, capture_output=True, text=True
        )
        again = json.loads(resumed.stdout.splitlines()[-1])

    rate = answer["bytes"] / answer["seconds"]
    print(f"{answer['bytes'] / 1e6:,.0f} MB, {answer['tokens']:,} tokens, {os.cpu_count()} cores")
    print(f"tokenizer alone: {', '.join(f'{rate / 1e6:.2f}' for rate in rates)} MB/s")
    print(f"headstart: {rate / 1e6:.2f} MB/s, peak {answer['peak_bytes'] / 1e6:,.0f} MB")
    print(
        f"killed half way: {again['seconds'] / answer['seconds']:.0%} of the time remained, and "
        f"the tokens are {'the same' if again['digest'] == answer['digest'] else 'OTHERS'}"
    )
    ratio = rate / statistics.mean(rates)
    print(f"ratio: {ratio:.2f}x (goal {GOAL:.2f}x)")
    if again["digest"] != answer["digest"] or answer["peak_bytes"] > MEMORY_GOAL_BYTES:
        sys.exit("missed: the resumed tokens differ, or memory; see above")


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:])) if len(sys.argv) > 1 else main()
