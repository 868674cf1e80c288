"""The teacher of a search in memory: loaded, measured and put in order once for all bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headstart.calibration.start import Calibration, calibrate
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.searching.candidate import Orders
from headstart.searching.costs import importance_flops
from headstart.searching.fitness import (
    DivergenceFromTeacher,
    HeldOutLoss,
    fitting_batch_size,
    put_in_order,
    state_of,
)
from headstart.searching.orders import measure_orders, measured_kinds
from headstart.searching.settings import SearchSettings
from headstart.system.device import default_device, load_frozen
from headstart.text.blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SearchedTeacher:
    """A teacher whose sub-networks can be scored.

    Attributes:
        whole: its checkpoint.
        source: what candidates are cut out of: the checkpoint, or that of a rotated teacher.
        model: of the source; with units in the places of their ranks, if candidates are slices.
        orders: what ranks mean in the source's own numbering.
        fitness: scores candidates.
        calibration_flops: of all this, whether or not it was remembered.
    """

    whole: Checkpoint
    source: Calibration
    model: PreTrainedModel
    orders: Orders
    fitness: HeldOutLoss
    calibration_flops: int

    @staticmethod
    def load(
        whole: Checkpoint,
        blocks: TokenBlocks,
        settings: SearchSettings,
        identity: dict[str, Any],
        orders: Orders | None = None,
    ) -> SearchedTeacher:
        """Load a teacher as some settings say, in which the bin plays no part.

        Args:
            blocks: orders and refits read its "train" split, scores its "search" split.
            identity: hashes of teacher and text.
            orders: that were measured before; None to measure them.
        """
        source = Calibration(whole)
        if settings.is_measured:
            tokens = blocks.sample("train", settings.calibration_tokens)
            source = calibrate(whole, settings.init, tokens, together=True)
        # As it is on disk: loading may change its precision, which bins in bytes read.
        architecture = source.teacher.architecture
        model = load_frozen(source.teacher.folder, default_device())
        orders = orders or measure_orders(model, settings, blocks, identity)
        held_out = blocks.sample("search", settings.tokens)
        block_length = held_out.shape[1]
        batch_size = settings.batch_size or fitting_batch_size(
            architecture.sizes, block_length, model.device, model.dtype.itemsize
        )
        is_refitted = settings.scored_as == "refitted"
        kind = DivergenceFromTeacher if settings.fitness == "kl" else HeldOutLoss
        # Slices of a teacher in order are views, but writing it ends that processes share its
        # files' memory. What is refitted is a copy anyway.
        places = orders if is_refitted else put_in_order(state_of(model), architecture, orders)
        fitness = kind(
            model=model,
            teacher=architecture,
            orders=places,
            blocks=held_out.to(model.device),
            batch_size=batch_size,
            refit_blocks=blocks.sample("train", settings.refit_tokens) if is_refitted else None,
        )
        num_tokens = blocks.spread("train", settings.calibration_tokens).size
        flops = importance_flops(
            architecture, measured_kinds(settings) or (), num_tokens, block_length
        )
        return SearchedTeacher(whole, source, model, orders, fitness, source.flops + flops)

    @property
    def architecture(self) -> Architecture:
        """Of what candidates are cut out of."""
        return self.source.teacher.architecture
