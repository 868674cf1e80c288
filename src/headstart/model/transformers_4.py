"""What transformers 4 reads of a config under other keys than transformers 5.

Transformers 5 keeps all rotary positions in `rope_parameters`. Transformers 4, on which most
servers still run, knows no such key and takes its default of `rope_theta` without a word. So what
headstart writes has both, and transformers 5 reads the old keys alike. A layer-wise student has the
new ones alone, since `modeling` needs transformers 5 anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.model.families import FAMILIES
from headstart.system.files import write_whole

ON_ITS_OWN = ("rope_theta", "partial_rotary_factor")
"""Entries of `rope_parameters` that are keys of an old config; the others are in `rope_scaling`."""
PERIOD = "sliding_window_pattern"


def add_old_keys(folder: Path) -> None:
    """Add the keys of transformers 4 to the config.json that transformers 5 has written.

    The period of windows goes, since `layer_types` says which layers have one; after layers were
    removed the two would differ.
    """
    path = folder / "config.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    if entries["model_type"] in FAMILIES:
        if entries.get("layer_types"):
            entries = {key: entries[key] for key in entries if not key.endswith(PERIOD)}
        text = json.dumps(entries | old_entries(entries), indent=2, sort_keys=True)
        write_whole(path, text + "\n")


def old_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that transformers 4 reads, from those of transformers 5.

    >>> rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    >>> old_entries({"model_type": "llama", "rope_parameters": rope})
    {'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}
    """
    old: dict[str, Any] = {}
    if "dtype" in entries:
        old["torch_dtype"] = entries["dtype"]
    names = FAMILIES[entries["model_type"]].old_names
    rope = entries["rope_parameters"]
    if "rope_type" not in rope:  # one for each kind of layer, where sliding ones are never scaled
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    named = {name: rope[key] for key in rope if (name := names.get(key, key))}
    alone = {names.get(key) or key for key in ON_ITS_OWN}
    old |= {name: value for name, value in named.items() if name in alone}
    scaling = {name: value for name, value in named.items() if name not in alone}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if rope["rope_type"] == "longrope":  # which reads it there alone
        old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return old
