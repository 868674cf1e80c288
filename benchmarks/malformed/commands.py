"""Folders that commands cannot use, and arguments that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from malformed.world import Case, World


def folders(world: World) -> Iterator[Case]:
    taken = world.file("taken/notes.txt", "mine").parent
    a_file = world.file("a-file", "mine")
    other = world.folder / "other-run"
    recipe = world.recipe(
        "other-run", lambda tree: tree.update(output=str(other), teacher="another")
    )
    world.file("other-run/recipe.yaml", recipe.read_text())
    teacher, student = str(world.teacher), str(world.student)
    spec = str(world.student / "subnet.json")
    extract = ["extract", "--teacher", teacher, "--spec", spec, "--init", "slice", "--out"]
    new = str(world.folder / "x")
    commands = {
        "an output that is a file": world.run(output=a_file),
        "an output that holds something else": world.run(output=taken),
        "an output below a file": world.run(output=a_file / "run"),
        "an output of 300 letters": world.run(output="x" * 300),
        "a teacher of 300 letters": world.run(teacher="x" * 300),
        "a text of 300 letters": world.run(data="x" * 300),
        "a student of 300 letters": world.run(student="x" * 300),
        "an output whose recipe is garbage": world.run(
            output=world.file("garbled/recipe.yaml", "[").parent
        ),
        "an output whose recipe is a list": world.run(
            output=world.file("listed/recipe.yaml", "[]").parent
        ),
        "an output whose inputs are garbage": world.run(
            output=world.file("inputs/inputs.json", "{").parent
        ),
        "a student's folder below a file": [*extract, str(a_file / "student")],
        "an export below a file": [
            "export", student, "--to", "hf", "--out", str(a_file / "student")
        ],
        "a report of a file": ["report", str(a_file)],
        "a search to go on with that is a file": ["search", "--resume", str(a_file)],
        "a student that is not there": [
            "pretrain", str(world.folder / "good.yaml"), "--student", new
        ],
        "an output of another run": world.run(output=other),
        "a student's folder that is there": [*extract, str(taken)],
        "a student's folder that is a file": [*extract, str(a_file)],
        "a report of no run": ["report", str(taken)],
        "a report of nothing": ["report", str(world.folder / "nowhere")],
        "a search to go on with that is none": ["search", "--resume", str(taken)],
        "no student to pretrain": ["pretrain", str(world.folder / "good.yaml")],
        "an export over a folder": ["export", student, "--to", "hf", "--out", str(taken)],
        "an export of nothing": ["export", str(taken), "--to", "hf", "--out", new],
        "no cache in the recipe": ["cache-teacher", str(world.folder / "good.yaml")],
        "results that are garbage": [
            "report", str(world.file("garbage/result.json", "{").parent)
        ],
        "results of another format": [
            "report", str(world.file("format/result.json", '{"format": "x/9"}').parent)
        ],
    }  # fmt: skip
    for problem, command in commands.items():
        yield Case("folder", problem, command)


def arguments(world: World) -> Iterator[Case]:
    good, teacher, text = str(world.folder / "good.yaml"), str(world.teacher), str(world.text)
    evaluate = ["evaluate", teacher]
    extract = ["extract", "--teacher", teacher, "--spec", str(world.student / "subnet.json")]
    extract += ["--out", str(world.folder / "cut")]
    trim, new = ["trim", teacher, "--data", text], str(world.folder / "trimmed")
    commands = [
        [], ["unheard-of"], ["run", "--unheard-of", "1"], ["run", good, "--pretrain.tokens"],
        ["run", good, "stray"], ["run", good, "--search.bin", "{low: 1M"],
        ["run", good, "--data.source.deep", "1"], ["run", good, "--teacher", ""],
        ["search", "--resume"], ["search", good, "--dry-run", "--search.bin", "{low: 1, high: 2}"],
        ["extract"], ["extract", "--teacher", teacher], [*extract, "--init", "unheard_of"],
        [*extract, "--init", "slice", "--data", text], [*extract, "--init", "least_squares"],
        [*extract, "--data", text, "--calibration-tokens", "0"],
        [*extract, "--data", text, "--block-length", "4"],
        [*extract, "--data", text, "--block-length", "9999"],
        ["evaluate"], evaluate, [*evaluate, "--data", text, "--tokens", "0"],
        [*evaluate, "--data", text, "--tokens", "many"], [*evaluate, "--limit", "3"],
        [*evaluate, "--data", text, "--limit", "3"], [*evaluate, "--whole-text"],
        [*evaluate, "--tasks", "unheard_of", "--task-data", text], [*evaluate, "--task-data", text],
        [*evaluate, "--tasks", "piqa,piqa", "--task-data", text],
        ["evaluate", "nowhere/at-all-xyz", "--data", text],
        ["plan", good, "--gpus", "0"], ["plan", good, "--gpus", "-8"], ["plan", good, "--mfu", "2"],
        ["plan", good, "--mfu", "0"], ["plan", good, "--peak-tflops", "0"],
        ["plan", good, "--peak-tflops", "nan"], ["plan", good, "--mfu", "nan"],
        ["export", teacher, "--to", "unheard-of", "--out", "x"], ["export", teacher, "--to", "hf"],
        ["export", teacher, "--to", "hf", "--out", str(world.folder / "x"), "--precision", "int3"],
        ["export", teacher, "--to", "hf", "--out", str(world.folder / "x"), "--converter", good],
        ["export", teacher, "--to", "gguf", "--out", str(world.folder / "x.gguf"), "--converter",
         str(world.folder / "nowhere.py")],
        ["export", teacher, "--to", "gguf", "--out", str(world.folder / "x.gguf")],
        [*evaluate, "--data", text, "--tokens", "-1"],
        [*evaluate, "--tasks", "piqa", "--limit", "0"],
        [*evaluate, "--data", text, "--block-length", "9999"], [*evaluate, "--tasks", ","],
        ["plan", good, "--gpus", "x"], ["plan", good, "--mfu", "inf"],
        ["plan", "--teacher", teacher], ["run", good, "--student", "2024-13-45"],
        ["run", good, "--", "x"], ["run", good, "--a..b", "3"], ["cache-teacher"],
        ["report"], ["trim"], ["trim", teacher], trim, [*trim, "--vocabulary", "200"],
        [*trim, "--vocabulary", "96"], ["trim", teacher, "--data", text, "--out", new],
        [*trim, "--out", new, "--vocabulary", "-1"], [*trim, "--out", new, "--vocabulary", "9999"],
        [*trim, "--out", new, "--vocabulary", "3"], [*trim, "--out", new, "--vocabulary", "many"],
        [*trim, "--out", text, "--vocabulary", "96"], [*trim, "--table", "--width", "0"],
        [*trim, "--table", "--parameters", "many"], [*trim, "--table", "--block-length", "9999"],
        [*trim, "--out", new, "--vocabulary", "96", "--sample-characters", "0"],
        ["trim", "nowhere/at-all-xyz", "--data", text, "--table"],
        ["trim", teacher, "--data", str(world.folder / "nowhere"), "--table"],
    ]  # fmt: skip
    for command in commands:
        name = " ".join(Path(part).name if "/" in part else part for part in command)
        yield Case("argument", name or "nothing", command)
