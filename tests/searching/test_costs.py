"""What a search is charged is what torch counts while it happens, to the last operation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.flop_oracle import counted_flops
from tests.searching.conftest import BLOCK_LENGTH

from headstart.calibration.start import cut_architecture
from headstart.model.checkpoint import Checkpoint
from headstart.searching.bins import BinSettings
from headstart.searching.evolution import EvolutionSettings
from headstart.searching.finalists import FinalistSettings
from headstart.searching.racing import RacingSettings
from headstart.searching.run import search
from headstart.searching.settings import SearchSettings
from headstart.system import device
from headstart.text.blocks import TokenBlocks

SETTINGS = SearchSettings(
    init="slice",
    bin=BinSettings(low="25K", high="35K"),
    evolution=EvolutionSettings(population=4, generations=2, elites=2),
    racing=RacingSettings(rungs=2),
    tokens=8 * BLOCK_LENGTH,
    calibration_tokens=20 * BLOCK_LENGTH,
    refit_tokens=3 * BLOCK_LENGTH,
)
FINALS = FinalistSettings(count=2, steps=3, batch_size=2)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and float32 also where bfloat16 is fast."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"order": "teacher", "layer_order": "teacher"},
        {"order": "contribution", "layer_order": "magnitude"},
        {"order": "taylor"},
        {"fitness": "kl", "finalists": FINALS},
        {"scored_as": "slice", "finalists": FINALS},
        {"init": "least_squares", "finalists": FINALS, "racing": RacingSettings(rungs=1)},
        {"init": "rotate+least_squares", "fitness": "kl"},
        {"space": "fine-layerwise", "init": "rotate+least_squares"},
        {"space": "coarse-layerwise", "scored_as": "slice", "init": "rotate+least_squares"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) if changes else "defaults",
)
def test_a_search(
    changes: dict[str, Any], checkpoint: Checkpoint, blocks: TokenBlocks, tmp_path: Path
) -> None:
    settings, found = replace(SETTINGS, **changes), dict[str, Any]()
    counted = counted_flops(
        lambda: found.update(search(checkpoint, blocks, settings, tmp_path / "run"))
    )
    # Charged are all tokens, though the last of a block has no target and needs no logits.
    teacher = cut_architecture(checkpoint.architecture, settings.init).sizes
    spared = 0
    for candidate in found["candidates"]:
        width = candidate["sizes"]["embed"]
        if "trained_loss" in candidate:
            spared += (8 + 3 * FINALS.steps * FINALS.batch_size) * width
        width += teacher["embed"] if settings.fitness == "kl" else 0
        spared += candidate["tokens"] // BLOCK_LENGTH * width
    if settings.order == "taylor":
        spared += 3 * 20 * teacher["embed"]
    charged = found["calibration_flops"] + found["search_flops"]
    assert charged - 2 * teacher["vocab"] * spared == counted
