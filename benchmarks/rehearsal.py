"""Does the paper's recipe start, go on after kills, and cost what its plan says? At a small size.

    python benchmarks/rehearsal.py
    python benchmarks/rehearsal.py --tokens 100000 --processes 1

A teacher of about 7M random parameters, shaped like Pythia, and 40 compressed shards of text that
hold twenty times what is needed. The recipe has three bins and four arms, one of which distils from
a cache, and runs under torchrun on several processes, from the first shard to the last report. It
is killed once in every stage and started again by the same command. What it has read, asked the
teacher, scored, trained and written is then held against what `headstart plan` says of it.

The last line is the worst of the smaller over the larger of planned and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from headstart.demo import demo_corpus
from headstart.recipe import Recipe, recipe_from_dict
from headstart.runs.plan import planned_text, print_plans, print_search_plans
from headstart.runs.run import bin_recipes
from headstart.runs.teachers import planned_teachers
from headstart.runs.vocabulary import planned_architecture
from headstart.training.cache import is_being_written
from headstart.training.plan import Hardware

GOAL = 0.9
VOCAB, NUM_SHARDS, TIMES_NEEDED, BYTES_PER_TOKEN = 2048, 40, 20, 3.0
BLOCK_LENGTH, BATCH_SIZE = 128, 8
TAIL = 4000
"""Characters of the log that are shown where a run fails."""
SECONDS = 5400
"""After which a run that does not end is given up."""


def documents() -> Iterator[str]:
    """The demo's documents, again and again, no two alike."""
    texts = [json.loads(line)["text"] for line in demo_corpus().read_text().splitlines()]
    number = 0
    while True:
        for text in texts:
            number += 1
            yield f"{number}. {text}"


def write_text(folder: Path, num_bytes: float) -> Path:
    """Shards of .jsonl.zst."""
    folder.mkdir()
    texts = documents()
    for shard in range(NUM_SHARDS):
        lines, size = list[str](), 0
        while size < num_bytes / NUM_SHARDS:
            text = next(texts)
            lines.append(json.dumps({"text": text}))
            size += len(text.encode())
        packed = zstandard.compress("\n".join(lines).encode() + b"\n")
        (folder / f"{shard:03}.jsonl.zst").write_bytes(packed)
    return folder


def write_teacher(folder: Path) -> Path:
    """A GPT-NeoX of about 7M parameters, and a tokenizer made of the demo's text."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=288, intermediate_size=1152, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=512, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = documents()
    tokenizer.train_from_iterator((next(texts) for _ in range(300)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def recipe_tree(place: Path, num_tokens: int) -> dict[str, Any]:
    """The paper's recipe, smaller."""
    cache = str(place / "teacher-cache")
    return {
        "teacher": str(place / "teacher"),
        "output": str(place / "run"),
        "data": {"source": str(place / "text"), "block_length": BLOCK_LENGTH},
        "search": {
            "bins": [
                {"low": "0.9M", "high": "1.1M", "name": "small"},
                {"low": "1.8M", "high": "2.2M", "name": "middle"},
                {"low": "3.6M", "high": "4.4M", "name": "large"},
            ],
            "tokens": 4096,
            "calibration_tokens": 4096,
            "evolution": {"population": 8, "generations": 2, "elites": 4},
        },
        "pretrain": {
            "tokens": num_tokens,
            "validation_tokens": 8192,
            "test_tokens": 16_384,
            "evaluations": 3,
            "arms": [
                {"name": "scratch", "init": "random"},
                {"name": "subnet"},
                {"name": "subnet+kd", "kd": {"alpha": 0.5, "beta": 0.5}},
                {"name": "subnet+cache", "kd": {"samples": 50, "cache": cache}},
            ],
        },
        "train": {"per_device_train_batch_size": BATCH_SIZE, "report_to": "none"},
    }


def kill_all(pid: int) -> None:
    """Kill a process and all that it has started, at once, as a node that fails does."""
    launcher = psutil.Process(pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes[1:])


class Rehearsal:
    """The run, started, watched and killed."""

    def __init__(self, place: Path, num_processes: int) -> None:
        self.place, self.run, self.num_processes = place, place / "run", num_processes
        self.data = place / "cache" / "data"

    def stages(self) -> dict[str, Callable[[], bool]]:
        """Name of a stage -> whether the run is in the middle of it."""
        return {
            "text": lambda: any(self.data.glob("units/*/batches.jsonl")) and not self._is_read(),
            "search": lambda: (
                self._lines("small/search.jsonl") > 5
                and not (self.run / "small" / "search.json").exists()
            ),
            "teacher cache": lambda: (
                any((self.place / "teacher-cache").glob("*.npy"))
                and is_being_written(str(self.place / "teacher-cache"))
            ),
            **{
                f"training of {arm}": lambda arm=arm: (
                    any(  # type: ignore[misc]
                        (self.run / "small" / "arms" / arm).glob("checkpoint-*")
                    )
                    and not (self.run / "small" / "arms" / arm / "arm.json").exists()
                )
                for arm in ("scratch", "subnet", "subnet+kd", "subnet+cache")
            },
        }

    def _is_read(self) -> bool:
        return any(self.data.glob("*/manifest.json"))

    def _lines(self, name: str) -> int:
        file = self.run / name
        return len(file.read_text().splitlines()) if file.exists() else 0

    def go(self) -> list[str]:
        """Run to the end, killed once in every stage; the stages in which it was."""
        waiting, killed = self.stages(), list[str]()
        end = time.monotonic() + SECONDS
        while True:
            process = self._start()
            while process.poll() is None:
                if time.monotonic() > end:
                    kill_all(process.pid)
                    sys.exit("missed: the run did not end")
                stage = next((name for name, is_in in waiting.items() if is_in()), None)
                if stage is None:
                    time.sleep(0.02)
                    continue
                kill_all(process.pid)
                process.wait()
                del waiting[stage]
                killed.append(stage)
                print(f"killed in the stage: {stage}", flush=True)
            if process.returncode == 0:
                return killed
            if process.returncode != -signal.SIGKILL:
                print((self.place / "log").read_text(errors="replace")[-TAIL:])
                sys.exit(f"missed: exit code {process.returncode}, with the log's end above")

    def _start(self) -> subprocess.Popen[bytes]:
        launcher = ["torch.distributed.run", "--standalone"]
        command = [
            sys.executable, "-m", *launcher, "--nproc-per-node", str(self.num_processes), "-m",
            "headstart.cli", "run", str(self.place / "recipe.yaml"),
        ]  # fmt: skip
        environment = {**os.environ, "HEADSTART_CACHE": str(self.place / "cache")}
        with (self.place / "log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def planned(recipe: Recipe, num_processes: int) -> dict[str, float]:
    """What `headstart plan` says."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        searches = print_search_plans(recipe, planned_architecture(recipe))
        bins = print_plans(recipe, Hardware(gpus=num_processes))
    text = planned_text(recipe, planned_teachers(recipe))
    (cache,) = text.cache_bytes.values()
    plans: dict[str, float] = {
        "tokens read of the text": text.tokens,
        "teacher cache, bytes": cache,
    }
    for of_bin, search, arms in zip(bin_recipes(recipe), searches, bins, strict=True):
        label = of_bin.search.bin.label()
        plans[f"{label}: candidates"] = search.num_candidates
        plans[f"{label}: search FLOPs"] = max(search.flops) + search.finals_flops
        plans |= {f"{label}: tokens of {arm.name}": arm.tokens for arm in arms}
    return plans


def counted(place: Path, recipe: Recipe) -> dict[str, float]:
    """What lies on disk after the run."""
    batches = [
        json.loads(line)
        for log in place.glob("cache/data/units/*/batches.jsonl")
        for line in log.read_text().splitlines()
    ]
    read = sum(split["tokens"] for batch in batches for split in batch.get("counts", {}).values())
    shards = place.glob("teacher-cache/*.safetensors")
    counts: dict[str, float] = {
        "tokens read of the text": read,
        "teacher cache, bytes": sum(shard.stat().st_size for shard in shards),
    }
    for of_bin in bin_recipes(recipe):
        label, folder = of_bin.search.bin.label(), Path(of_bin.output)
        search = json.loads((folder / "search.json").read_text())
        result = json.loads((folder / "result.json").read_text())
        counts[f"{label}: candidates"] = len(search["candidates"])
        counts[f"{label}: search FLOPs"] = search["search_flops"] + search["calibration_flops"]
        counts |= {f"{label}: tokens of {arm['name']}": arm["tokens"] for arm in result["arms"]}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of training, for each arm")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_teacher(place / "teacher")
        write_text(place / "text", TIMES_NEEDED * BYTES_PER_TOKEN * max(options.tokens, 1_000_000))
        tree = recipe_tree(place, options.tokens)
        (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
        recipe = recipe_from_dict(tree)
        rehearsal = Rehearsal(place, options.processes)
        killed = rehearsal.go()
        missing = rehearsal.stages().keys() - killed
        plan, counts = planned(recipe, options.processes), counted(place, recipe)
    print("\n| | planned | counted | smaller over larger |")
    print("| :-- | --: | --: | --: |")
    ratios = {}
    for name, number in plan.items():
        ratios[name] = min(number, counts[name]) / max(number, counts[name])
        print(f"| {name} | {number:,.4g} | {counts[name]:,.4g} | {ratios[name]:.2f} |")
    if missing:
        print(f"not killed in: {', '.join(sorted(missing))}")
    print(f"ratio: {min(ratios.values()):.2f} (goal {GOAL})")


if __name__ == "__main__":
    main()
