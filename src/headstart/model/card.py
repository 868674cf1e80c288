"""The model card of a student: its README.md, from what its `subnet.json` and its training say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from headstart.model.architecture import Architecture
from headstart.system.files import write_whole
from headstart.system.hub import HubName

CARD = "README.md"
UNKNOWN_LICENCE = "unknown"


def licence_of(folder: Path) -> str:
    """The licence that a model folder's own card names, as the hub writes it, or "unknown"."""
    from huggingface_hub import metadata_load

    path = folder / CARD
    try:
        metadata = (metadata_load(path) or {}) if path.is_file() else {}
    except (yaml.YAMLError, ValueError):  # a card that nobody can read says nothing
        metadata = {}
    named = metadata.get("license_name") or metadata.get("license")
    return ", ".join(named) if isinstance(named, list) else str(named or UNKNOWN_LICENCE)


def write_card(folder: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write the card of a student, whole or not at all, into its folder with `subnet.json`.

    `notes` has the text of more sections by their headings, such as how it was trained.
    """
    write_whole(folder / CARD, card_text(folder, notes or {}))
    return folder / CARD


def card_text(folder: Path, notes: Mapping[str, str]) -> str:
    """The text of a student's card."""
    from huggingface_hub import ModelCardData

    origin: dict[str, Any] = json.loads((folder / "subnet.json").read_text())
    architecture = Architecture.read(folder)
    teacher = str(origin.get("teacher_name") or origin.get("teacher", "a model in memory"))
    licence = origin.get("teacher_licence", UNKNOWN_LICENCE)
    name = HubName.parse(teacher)
    is_on_hub = name is not None and "/" in name.repo and not Path(teacher).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence,
        base_model=name.repo if name and is_on_hub else None,
        tags=["headstart", "pruned"],
    )
    sizes = architecture.sizes
    rows = "\n".join(f"| {axis} | {_size_text(size)} |" for axis, size in sizes.items())
    parameters = architecture.count(1).parameters
    how = "It is a stock checkpoint, which loads in every tool that reads its family:"
    arguments = '"FOLDER"'
    if architecture.is_layerwise:
        from headstart.model.modeling import NEEDED

        how = (
            "No stock checkpoint has its shape, so it carries `modeling.py`, which needs "
            f"transformers {NEEDED[0]}.{NEEDED[1]} or newer. It loads after `import headstart`, or "
            "without headstart by `trust_remote_code=True`:"
        )
        arguments += ", trust_remote_code=True"
    stated = "its card does not say" if licence == UNKNOWN_LICENCE else licence
    found = [
        f"- cut by headstart {origin.get('headstart', '')} out of `{teacher}`",
        f"- licence of that teacher, which binds this model too: {stated}",
    ]
    if "bin" in origin:
        low, high = origin["bin"]
        found.append(f"- found by a search between {low:,} and {high:,}")
    if "loss" in origin:
        found.append(f"- loss in that search, before any training: {origin['loss']:.4f} nats")
    if others := origin.get("other_precisions"):
        named = ", ".join(f"{count:,} in {name}" for name, count in others.items())
        found.append(f"- numbers of another precision than most: {named}")
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# A sub-network of {Path(teacher).name}\n",
        f"{parameters:,} parameters.\n",
        "\n".join(found) + "\n",
        f"| axis | size |\n| :-- | --: |\n{rows}\n",
        "Which units of the teacher these are, `subnet.json` tells.\n",
        "## Loading it\n",
        f"{how}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n```\n",
        *(f"## {heading}\n\n{text.rstrip()}\n" for heading, text in notes.items()),
    ]
    return "\n".join(sections)


def training_note(arm: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What the card of a trained arm says of its training, from its entry in `result.json`."""
    data = result["recipe"]["data"]
    sources = [part["source"] for part in data["mixture"]] or [data["source"]]
    start = "the weights cut out of the teacher" if arm["init"] == "subnet" else "random weights"
    kd = arm["kd"]
    distilled = (
        f"{kd['alpha']:g} of cross-entropy and {kd['beta']:g} of {kd['divergence']} from "
        f"{kd.get('teacher') or 'the teacher'} at temperature {kd['temperature']:g}"
        if kd
        else "cross-entropy alone"
    )
    tuned = result["teacher"].get("correction")
    tuning = f"- teacher tuned before on {tuned['tokens']:,} tokens of text\n" if tuned else ""
    return (
        f"{tuning}- text: {', '.join(f'`{source}`' for source in sources)}\n"
        f"- tokens: {arm['tokens']:,}, begun from {start}\n"
        f"- loss trained on: {distilled}; learning rate {arm['learning_rate']:g}\n"
        f"- test loss: {arm['loss_before']:.4f} before, {arm['loss_final']:.4f} after "
        f"(teacher {result['teacher']['loss']:.4f}), in nats per token\n"
    )


def _size_text(size: int | tuple[int, ...]) -> str:
    if isinstance(size, int):
        return f"{size:,}"
    return f"{min(size):,} to {max(size):,}, by layer"
