"""The search as a whole: axis orders, candidates in the bin, finals, and the winner."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.calibration.start import (
    Calibration,
    calibrate,
    cut_architecture,
    start_flops,
    student_tensors,
)
from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint
from headstart.model.count import Measure
from headstart.model.cut import assemble_student
from headstart.model.spec import SubnetSpec
from headstart.searching.candidate import Candidate, Orders
from headstart.searching.costs import (
    candidate_cut_flops,
    fitness_flops_per_token,
    fitness_preparation_flops,
)
from headstart.searching.evolution import evolve, ranked
from headstart.searching.finalists import choose_finalists, run_finals
from headstart.searching.journal import Evaluated, Journal
from headstart.searching.live import SearchTable
from headstart.searching.orders import keep_orders, kept_orders
from headstart.searching.outcome import outcome_of
from headstart.searching.racing import Race, rung_blocks
from headstart.searching.settings import SearchSettings
from headstart.searching.space import Space
from headstart.searching.teacher import SearchedTeacher
from headstart.system.distributed import from_main, is_main, process_group
from headstart.system.errors import UserError
from headstart.system.files import read_json, write_json
from headstart.system.hashing import hash_json
from headstart.system.progress import progress
from headstart.text.blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def space_of(teacher: Architecture, settings: SearchSettings, context_length: int) -> Space:
    """The search space of a teacher, from its config alone.

    Args:
        teacher: as it is, not yet rotated.
        context_length: tokens that attention spans, for bins in FLOPs.

    Raises:
        UserError: the bin or grid is malformed, no candidate can meet the bin, or the teacher
            cannot be rotated.
    """
    bin = settings.bin.resolve(context_length)
    teacher = cut_architecture(teacher, settings.init)
    return Space.build(teacher, settings.space, bin, settings.grid, settings.unit_noise)


def search(
    teacher: Checkpoint, blocks: TokenBlocks, settings: SearchSettings, folder: Path
) -> dict[str, Any]:
    """Find the best sub-network in a bin, or go on from the journal; see `search_bins`."""
    return next(search_bins(teacher, blocks, {folder: settings}))


def search_bins(
    teacher: Checkpoint, blocks: TokenBlocks, searches: Mapping[Path, SearchSettings]
) -> Iterator[dict[str, Any]]:
    """Find the best sub-network in each of several bins, or go on from the journals.

    The teacher is loaded and measured once, for the first search that is not finished. Under
    torchrun the processes share every generation.

    Args:
        blocks: calibration and finals read its "train" split, fitness its "search" split.
        searches: the folder of each, which receives `search.jsonl` and `search.json`, and its
            settings, which differ in the bin alone.

    Yields:
        The content of each `search.json`; docs/search.md documents it.
    """
    with process_group():
        identity = {"teacher_hash": teacher.hash, "data": blocks.manifest["fingerprint"]}
        loaded: SearchedTeacher | None = None
        for folder, given in searches.items():
            settings = given.for_teacher(teacher.architecture)
            outcome: dict[str, Any] | None = from_main(partial(read_json, folder / "search.json"))
            orders = kept_orders(folder)
            if outcome is not None and orders is not None:
                _journal(folder, identity, orders, settings)  # refuses another search's folder
                yield outcome
                continue
            if loaded is not None and orders not in (None, loaded.orders):
                loaded = None  # or two of them would be in memory
            if loaded is None:
                loaded = SearchedTeacher.load(teacher, blocks, settings, identity, orders)
            if orders is None:
                from_main(partial(keep_orders, folder, loaded.orders))
            journal = _journal(folder, identity, loaded.orders, settings)
            searched = _Search(loaded, blocks, settings, journal, teacher.hash)
            # Through JSON, so that it is the same as what is read from the file later.
            outcome = json.loads(json.dumps(searched.run(name=str(teacher.folder))))
            if is_main():
                write_json(folder / "search.json", outcome)
            yield outcome


def _journal(
    folder: Path, identity: dict[str, Any], orders: Orders, settings: SearchSettings
) -> Journal:
    """The journal of a search; its ranks mean something in these orders alone."""
    return Journal(
        folder / "search.jsonl", {**identity, "orders": hash_json(orders.to_json())}, settings
    )


class _Search:
    """One search with its teacher in memory."""

    def __init__(
        self,
        loaded: SearchedTeacher,
        blocks: TokenBlocks,
        settings: SearchSettings,
        journal: Journal,
        teacher_hash: str,
    ) -> None:
        self.loaded, self.fitness, self.orders = loaded, loaded.fitness, loaded.orders
        self.blocks, self.settings, self.journal = blocks, settings, journal
        self.teacher, self.teacher_hash = loaded.architecture, teacher_hash
        self.context_length = self.fitness.block_length
        # The teacher was rotated already, if it is to be.
        self.bin = settings.bin.resolve(self.context_length)
        self.space = Space.build(
            self.teacher, settings.space, self.bin, settings.grid, settings.unit_noise
        )

    def amount(self, candidate: Candidate, measure: Measure) -> int:
        """What a candidate comes to in one measure."""
        sizes = {**self.teacher.sizes, **candidate.sizes()}
        return int(self.teacher.amount(sizes, measure, self.context_length))

    def run(self, name: str) -> dict[str, Any]:
        """Search, and say what was found; `name` is the teacher's."""
        scores = self._evolve()
        best = ranked(scores)[0]
        if not math.isfinite(best.loss):
            raise UserError(
                f"no candidate of {len(scores)} has a finite loss; the teacher's weights or "
                "precision are at fault"
            )
        finals = self._finals(scores)
        winner = (ranked(finals) or [best])[0].candidate
        return {
            "format": "headstart-search-result/1",
            "teacher": {"name": name, "hash": self.teacher_hash, "sizes": self.teacher.sizes},
            "spec": winner.spec(self.teacher, self.orders).to_json(),
            **outcome_of(
                scores,
                finals,
                winner,
                self.settings,
                self.bin,
                self.amount,
                search_flops=self._search_flops(scores, finals),
            ),
            "calibration_flops": self.loaded.calibration_flops,
            "correction_flops": self.loaded.whole.correction_flops,
        }

    def _search_flops(self, scores: list[Evaluated], finals: list[Evaluated]) -> int:
        """Of all scores, and of the finals."""
        settings, context_length = self.settings, self.context_length
        finalists = settings.finalists
        train_tokens = finalists.steps * finalists.batch_size * context_length
        rungs = rung_blocks(self.fitness.num_blocks, settings.racing)
        num_tokens = self.fitness.blocks.numel()
        refit_blocks = self.fitness.refit_blocks
        num_refits = 0 if refit_blocks is None else len(refit_blocks)
        flops = fitness_preparation_flops(
            self.teacher, settings, num_refits, num_tokens, context_length
        )
        for score in scores:
            sizes = {**self.teacher.sizes, **score.candidate.sizes()}
            per_token = fitness_flops_per_token(self.teacher, sizes, settings, context_length)
            num_cuts = sum(blocks * context_length <= score.tokens for blocks in rungs)
            flops += score.tokens * int(per_token)
            flops += num_cuts * candidate_cut_flops(self.teacher, sizes, num_refits, context_length)
        measured = 0
        for final in finals:
            spec = final.candidate.spec(self.teacher, self.orders)
            calibration = self._finals_calibration(spec)
            measured = max(measured, calibration.flops)
            flops += start_flops(calibration, spec)
            per_token = self.amount(final.candidate, "flops_per_token")
            flops += (final.tokens + 3 * train_tokens) * per_token
        same_tokens = settings.finals_calibration_tokens == settings.calibration_tokens
        is_the_students = settings.init != "slice" and same_tokens
        # Measured once, and then counted with the search itself or with the student.
        return flops if settings.is_measured or is_the_students else flops + measured

    def _finals_calibration(self, spec: SubnetSpec) -> Calibration:
        """What a finalist is cut out of, and how."""
        settings = self.settings
        if settings.finals_init == "slice":
            return self.loaded.source
        tokens = self.blocks.sample("train", settings.finals_calibration_tokens)
        return calibrate(self.loaded.whole, settings.finals_init, tokens, spec)

    def _started(self, candidate: Candidate) -> PreTrainedModel:
        """A candidate with the weights that it has in the finals."""
        if self.settings.finals_init == "slice":
            return self.fitness.sliced(candidate)
        spec = candidate.spec(self.teacher, self.orders)
        tensors = student_tensors(self._finals_calibration(spec), spec)
        on_device = (
            (name, tensor.to(self.loaded.model.device)) for name, tensor in tensors.items()
        )
        return assemble_student(on_device, self.teacher, spec)

    def _evolve(self) -> list[Evaluated]:
        settings, evolution = self.settings, self.settings.evolution
        table = SearchTable(evolution.generations, self.fitness.blocks.numel())
        race = Race(
            self.fitness,
            self._parameters,
            self.journal,
            settings.racing,
            evolution.elites,
            on_score=table.scored,
        )
        tradeoff = evolution.tradeoff
        burden = None if tradeoff == "none" else lambda chosen: self.amount(chosen, tradeoff)
        with table:
            return evolve(self.space, race, evolution, burden, table.start, table.finish)

    def _parameters(self, candidate: Candidate) -> int:
        return self.amount(candidate, "parameters")

    def _finals(self, scores: list[Evaluated]) -> list[Evaluated]:
        settings = self.settings.finalists
        if not settings.count:
            return []
        # Those that lost a race are among them: shapes have to differ.
        (always,) = self.space.proportional(1)
        finalists = choose_finalists(ranked(scores), settings.count, always)
        needed = settings.steps * settings.batch_size * self.context_length
        train_blocks = self.blocks.sample("train", needed)
        with progress("finals", len(finalists), "finalists") as advance:
            return run_finals(
                finalists,
                self.fitness,
                train_blocks,
                settings,
                self.journal,
                start=self._started,
                on_score=lambda score: advance(1, f"{score.loss:.3f} nats"),
            )
