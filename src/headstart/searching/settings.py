"""What is searched, and how: the `search` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from headstart.calibration.start import ROTATED, Init, calibration_tokens
from headstart.model.architecture import Architecture
from headstart.searching.bins import BinSettings
from headstart.searching.evolution import EvolutionSettings
from headstart.searching.finalists import FinalistSettings
from headstart.searching.grid import GridSettings
from headstart.searching.racing import RacingSettings
from headstart.searching.space import SpaceName
from headstart.system.errors import UserError
from headstart.system.settings import check_least


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and how.

    Attributes:
        init: how candidates and the student get their weights from the teacher: a plain "slice",
            refitted by "least_squares", or that of a teacher rotated before.
        scored_as: whether candidates are scored as a plain "slice", or as one that was "refitted"
            layer by layer, whatever `init` is; both of the rotated teacher if there is one.
        refit_tokens: training tokens of that refit.
        space: "coarse" keeps the first units of each axis, "fine" any of them; "uniform" has one
            size for all layers, "layerwise" one for each.
        order: what "first" means for channels, groups and neurons: most important first by one of
            the measures, or the teacher's own order.
        layer_order: the same for layers.
        fitness: what candidates are scored by: held-out "loss", or "kl" from the teacher.
        bin: what every candidate meets.
        bins: instead of `bin`, several of them, each searched in its own folder.
        grid: sizes that each axis may take.
        unit_noise: see `Space.unit_noise`.
        evolution: population and operators.
        racing: token budgets on which poor candidates are dropped early.
        finalists: the last round, which decides among the best.
        tokens: held-out tokens on which candidates are scored.
        calibration_tokens: training tokens of the importance pass, and of what `init` needs; 0 for
            as many as suit the teacher.
        batch_size: blocks per forward pass; 0 for as many as fit.
    """

    init: Init = "slice"
    scored_as: Literal["slice", "refitted"] = "refitted"
    refit_tokens: int = 1024
    space: SpaceName = "coarse-uniform"
    order: Literal["activation", "contribution", "magnitude", "taylor", "teacher"] = "activation"
    layer_order: Literal["block_influence", "magnitude", "taylor", "teacher"] = "block_influence"
    fitness: Literal["loss", "kl"] = "loss"
    bin: BinSettings = field(default_factory=BinSettings)
    bins: tuple[BinSettings, ...] = ()
    grid: GridSettings = field(default_factory=GridSettings)
    unit_noise: float = 0.5
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    racing: RacingSettings = field(default_factory=RacingSettings)
    finalists: FinalistSettings = field(default_factory=FinalistSettings)
    tokens: int = 4096
    calibration_tokens: int = 0
    batch_size: int = 0

    def for_teacher(self, teacher: Architecture) -> SearchSettings:
        """The same with `calibration_tokens` that suit a teacher, unless they are given."""
        tokens = self.calibration_tokens or calibration_tokens(teacher, self.init)
        return replace(self, calibration_tokens=tokens)

    @property
    def is_measured(self) -> bool:
        """Whether the search measures the moments of the teacher's activations, to rotate it."""
        return self.init == ROTATED

    @property
    def finals_init(self) -> Init:
        """How finalists get their weights."""
        return "least_squares" if self.init == "slice" and self.finalists.refitted else self.init

    @property
    def finals_calibration_tokens(self) -> int:
        """Of each finalist's refit: those that the teacher was measured on, if it was."""
        return self.calibration_tokens if self.is_measured else self.finalists.calibration_tokens

    def __post_init__(self) -> None:
        least = {"tokens": 1, "calibration_tokens": 0, "refit_tokens": 1, "batch_size": 0}
        check_least(self, "search.", **least)
        if not 0 <= self.unit_noise <= 1:
            raise UserError(f"search.unit_noise is {self.unit_noise}; it must be in [0, 1]")
        if self.bins and self.bin != BinSettings():
            raise UserError("search.bin and search.bins are both set; keep one of them")
        labels = [bin.label() for bin in self.bins]
        if duplicates := {label for label in labels if labels.count(label) > 1}:
            raise UserError(
                f"search.bins holds {duplicates.pop()!r} twice; give the bins names of their own"
            )
        if self.evolution.tradeoff != "none" and self.racing.rungs > 1:
            raise UserError(
                "search.evolution.tradeoff needs every candidate's full loss; set "
                "search.racing.rungs to 1"
            )
