"""How much of a corpus is read: what a run needs, from all over its units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.text.blocks import halving_order
from headstart.text.local import is_packed
from headstart.text.settings import DataSettings, SplitName

LEAST_UNITS = 64
"""So many units are read from in any case, since each may be of another kind."""
UNIT_TOKENS = 1 << 20
"""More units are read from where each gives so many tokens: opening one should be worth it."""
BYTES_PER_TOKEN = 4.0
"""Of text that was not read yet; English has about so many. Packed, a token takes about a byte."""
MARGIN, MOST = 1.02, 2.0
"""What is missing is read in the next round with so much more, up to so many times as much."""


@dataclass(frozen=True)
class Needed:
    """How much text a run needs.

    Attributes:
        tokens: of each split, at least.
        train_bytes: of the training split's text, at least.
    """

    tokens: Mapping[SplitName, int] = field(default_factory=dict)
    train_bytes: int = 0

    def first_tokens(self, settings: DataSettings) -> int:
        """Tokens of all splits together that should hold what is needed."""
        tokens = {**self.tokens}
        if self.train_bytes:
            tokens["train"] = max(
                tokens.get("train", 0), math.ceil(self.train_bytes / BYTES_PER_TOKEN)
            )
        return max(math.ceil(count / settings.share(name)) for name, count in tokens.items())

    def growth(self, counts: Mapping[SplitName, Mapping[str, int]]) -> float:
        """How many times as much has to be read; 1 where there is enough.

        Args:
            counts: of what was read: tokens and text_bytes of each split.
        """
        missing = [count / max(counts[name]["tokens"], 1) for name, count in self.tokens.items()]
        missing.append(self.train_bytes / max(counts["train"]["text_bytes"], 1))
        return 1.0 if max(missing) <= 1 else min(MARGIN * max(missing), MOST)

    def share(self, share: float, least_tokens: int = 0) -> Needed:
        """What a part of a mixture has to give: its share, and at least so much of every split."""
        return Needed(
            {
                name: max(math.ceil(share * count), least_tokens)
                for name, count in self.tokens.items()
            },
            math.ceil(share * self.train_bytes),
        )

    def train_tokens(self, counts: Mapping[str, int]) -> int:
        """Of the training split that is needed, by the counts of what was read of it."""
        by_bytes = self.train_bytes * counts["tokens"] / max(counts["text_bytes"], 1)
        return max(self.tokens.get("train", 0), math.ceil(by_bytes))


def expected_tokens(inputs: Sequence[Mapping[str, Any]], num_units: int) -> list[float]:
    """About how many tokens each unit holds, by the size of its file; shards of the hub all have
    enough.

    Args:
        inputs: as `inputs_of` says.
        num_units: of the corpus.
    """
    if "size_bytes" not in inputs[0]:
        return [float(UNIT_TOKENS)] * num_units
    return [
        max(file["size_bytes"] / (1.0 if is_packed(Path(file["name"])) else BYTES_PER_TOKEN), 1.0)
        for file in inputs
    ]


def shares_of(expected: Sequence[float], num_tokens: float) -> dict[int, float]:
    """How many tokens are read of which units, so that they come to `num_tokens` together.

    Units lie at even distances, and give by their size. All of all units are read if `num_tokens`
    is infinite.

    >>> shares_of([4e6, 4e6, 8e6], 1e6)
    {0: 250000.0, 1: 250000.0, 2: 500000.0}
    """
    if math.isinf(num_tokens):
        return dict.fromkeys(range(len(expected)), math.inf)
    chosen, found = list[int](), 0.0
    for unit in halving_order(len(expected)):
        if found >= num_tokens and len(chosen) >= LEAST_UNITS:
            break
        chosen.append(unit)
        found += min(expected[unit], UNIT_TOKENS)
    total = sum(expected[unit] for unit in chosen)
    return {unit: num_tokens * expected[unit] / total for unit in sorted(chosen)}
