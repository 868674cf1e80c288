"""Several corpora as one: which block of which corpus comes when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt


@dataclass(frozen=True)
class MixedBlocks:
    """Chosen blocks of one or several corpora, read like one memory-mapped array of token ids.

    Attributes:
        parts: The token ids of each corpus, [num_blocks, block_length].
        order: The part and the row in it of each block.
    """

    parts: Sequence[UInt[np.ndarray, "num_blocks block_length"] | MixedBlocks]
    order: Int[np.ndarray, "num_blocks 2"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | slice) -> UInt[np.ndarray, ...]:
        """One block, or a copy of several."""
        if isinstance(index, slice):
            rows = [self.parts[part][row] for part, row in self.order[index]]
            return np.stack(rows) if rows else np.empty((0, self.shape[1]), self.dtype)
        part, row = self.order[index]
        block: UInt[np.ndarray, " block_length"] = self.parts[part][row]
        return block

    def __iter__(self) -> Iterator[UInt[np.ndarray, " block_length"]]:
        return (self[index] for index in range(len(self)))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.order), self.parts[0].shape[1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return self.parts[0].dtype


def mixed_order(
    num_blocks: Sequence[int], weights: Sequence[float], repeats: bool, most: int | None = None
) -> Int[np.ndarray, "mixed 2"]:
    """Which part, and which row of it, comes when, so that every stretch has the weights' shares.

    Args:
        num_blocks: Of each part.
        weights: Share of each part, in any unit.
        repeats: Whether parts are read again until every block of every part has come; otherwise
            the order ends where the first part would have to be repeated.
        most: At which number of blocks it ends in any case, about.

    >>> mixed_order([2, 4], [1, 1], repeats=True).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1], [0, 0], [1, 2], [0, 1], [1, 3]]
    >>> mixed_order([2, 4], [1, 1], repeats=False).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    shares = np.array(weights, dtype=float) / sum(weights)
    lengths = np.array(num_blocks) / shares
    length = lengths.max() if repeats else lengths.min()
    length = length if most is None else min(length, most)
    places, order = [], []
    for part, (available, share) in enumerate(zip(num_blocks, shares, strict=True)):
        count = round(length * share)
        rows = np.arange(count)
        places.append((rows + 0.5) / share)
        order.append(np.stack([np.full(count, part), rows % available], axis=1))
    return np.concatenate(order)[np.argsort(np.concatenate(places), kind="stable")]
