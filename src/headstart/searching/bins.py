"""Bins: the closed range of sizes that every candidate of a search lies in."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headstart.model.checkpoint import read_architecture
from headstart.model.count import Measure
from headstart.system.errors import UserError
from headstart.system.formats import COUNT_PATTERN, parse_count


@dataclass(frozen=True)
class Bin:
    """A closed range of one measure of size.

    Attributes:
        low: smallest amount.
        high: largest amount.
        measure: what is measured, see `headstart.model.count.MEASURES`.
        context_length: tokens that attention spans, for FLOPs.

    >>> Bin.around(400_000_000, 0.05)
    Bin(low=380000000, high=420000000, measure='parameters', context_length=512)
    """

    low: int
    high: int
    measure: Measure = "parameters"
    context_length: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise UserError(
                f"the bin {self.low:,} to {self.high:,} is empty; low must be above 0 and at most "
                "high"
            )

    @staticmethod
    def around(
        reference: int, tolerance: float, measure: Measure = "parameters", context_length: int = 512
    ) -> Bin:
        """The bin from `reference * (1 - tolerance)` to `reference * (1 + tolerance)`."""
        if not 0 <= tolerance < 1:
            raise UserError(f"the bin's tolerance is {tolerance}; it must be in [0, 1)")
        low, high = round(reference * (1 - tolerance)), round(reference * (1 + tolerance))
        return Bin(low, high, measure, context_length)


@dataclass(frozen=True)
class BinSettings:
    """A bin in a recipe: either `low` and `high`, or `around` and `tolerance`.

    Attributes:
        low: smallest amount, such as 385M.
        high: largest amount, such as 426M.
        around: an amount such as 410M, or a model folder or hub id that is measured.
        tolerance: half the bin's width as a fraction of `around`.
        measure: parameters, FLOPs of one token's forward pass at the recipe's block length, bytes
            of one token's KV cache, or bytes of the weights; bytes at the teacher's precision.
        name: of the bin's folder where a run has several; made of the numbers if empty.
    """

    low: int | str = 0
    high: int | str = 0
    around: int | str = 0
    tolerance: float = 0.05
    measure: Measure = "parameters"
    name: str = ""

    def resolve(self, context_length: int) -> Bin:
        """The bin in numbers, where attention spans `context_length` tokens.

        Raises:
            UserError: neither or both forms are given, or an amount cannot be read.
        """
        if bool(self.around) == bool(self.low or self.high):
            raise UserError(
                "search.bin needs either low and high (such as 385M and 426M) or around (such as "
                "410M, or a model to count) with tolerance"
            )
        if not self.around:
            low, high = parse_count(self.low), parse_count(self.high)
            return Bin(low, high, self.measure, context_length)
        if COUNT_PATTERN.fullmatch(str(self.around)):
            reference = parse_count(self.around)
            return Bin.around(reference, self.tolerance, self.measure, context_length)
        try:
            model = read_architecture(str(self.around))
        except UserError as error:
            raise UserError(
                f"search.bin.around {self.around!r} is neither a count such as 410M nor a model "
                f"folder or hub id ({error})"
            ) from error
        reference = model.amount(model.sizes, self.measure, context_length)
        return Bin.around(reference, self.tolerance, self.measure, context_length)

    def label(self) -> str:
        """A folder's name for this bin: its own, or made of what was given."""
        text = self.name or (str(self.around) if self.around else f"{self.low}-{self.high}")
        return re.sub(r"[^\w.-]+", "-", text).strip("-.")
