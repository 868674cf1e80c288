"""The search as a whole: axis orders, candidates in the bin, finals, and the winner."""

from __future__ import annotations

import json
import math
import statistics
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headstart.assets import cache_root
from headstart.data import TokenBlocks
from headstart.device import default_device, load_frozen
from headstart.distributed import is_main, main_first, process_group
from headstart.files import write_json
from headstart.progress import progress
from headstart.search.bins import BinSettings
from headstart.search.candidate import Candidate, Orders
from headstart.search.evolution import EvolutionSettings, evolve, ranked
from headstart.search.finalists import FinalistSettings, choose_finalists, run_finals
from headstart.search.fitness import (
    DivergenceFromTeacher,
    HeldOutLoss,
    fitting_batch_size,
    put_in_order,
)
from headstart.search.grid import GridSettings
from headstart.search.importance import (
    DepthImportance,
    UnitImportance,
    cached_importance,
    measure_importance,
)
from headstart.search.journal import Evaluated, Journal
from headstart.search.live import GenerationRow, SearchTable
from headstart.search.pareto import nondominated_fronts
from headstart.search.racing import Race, RacingSettings
from headstart.search.space import Space, SpaceName
from headstart.subnet.calibrate import ROTATED, Calibration, Init, calibrate, cut_config
from headstart.subnet.count import Measure, amount, inference_flops_per_token
from headstart.subnet.extract import hash_checkpoint
from headstart.subnet.rules import layouts_of, read_config, sizes_of
from headstart.subnet.spec import SubnetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPORTANCE_FLOPS = {
    "activation": 1, "contribution": 1, "block_influence": 1, "magnitude": 0, "taylor": 3,
}  # fmt: skip
"""Forward passes that a kind of importance costs; a backward pass counts as two."""


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and how.

    Attributes:
        init: how candidates and the student get their weights from the teacher: a plain "slice",
            refitted by "least_squares", or that of a teacher rotated before.
        scored_as: whether candidates are scored as a plain "slice", or "refitted" by the moments of
            the teacher's activations where `init` is not "slice".
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
        finalists: the short training that decides among the best.
        tokens: held-out tokens on which candidates are scored.
        calibration_tokens: training tokens of the importance pass, and of what `init` needs.
        batch_size: blocks per forward pass; 0 for as many as fit.
    """

    init: Init = "least_squares"
    scored_as: Literal["slice", "refitted"] = "slice"
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
    tokens: int = 16_384
    calibration_tokens: int = 32_768
    batch_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("calibration_tokens", 1), ("batch_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"search.{name} is {getattr(self, name)}; use at least {least}")
        if not 0 <= self.unit_noise <= 1:
            raise ValueError(f"search.unit_noise is {self.unit_noise}; it must be in [0, 1]")
        if self.bins and self.bin != BinSettings():
            raise ValueError("search.bin and search.bins are both set; keep one of them")
        labels = [bin.label() for bin in self.bins]
        if twins := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(
                f"search.bins holds {twins.pop()!r} twice; give the bins names of their own"
            )
        if self.evolution.tradeoff != "none" and self.racing.rungs > 1:
            raise ValueError(
                "search.evolution.tradeoff needs every candidate's full loss; set "
                "search.racing.rungs to 1"
            )


def is_measured(init: Init, scored_as: str | None) -> bool:
    """Whether a search measures the teacher's activations, for its candidates or a rotation."""
    return init == ROTATED or (init != "slice" and scored_as == "refitted")


def space_of(config: PreTrainedConfig, settings: SearchSettings, context_length: int) -> Space:
    """The search space of a teacher, from its config alone.

    Args:
        config: the teacher's config.
        settings: space, grid and bin.
        context_length: tokens that attention spans, for bins in FLOPs.

    Raises:
        ValueError: the bin or grid is malformed, no candidate can meet the bin, or the teacher
            cannot be rotated.
    """
    bin = settings.bin.resolve(context_length)
    config = cut_config(config, settings.init)
    return Space.build(config, settings.space, bin, settings.grid, settings.unit_noise)


def search(
    teacher: Path,
    blocks: TokenBlocks,
    settings: SearchSettings,
    folder: Path,
    teacher_hash: str = "",
) -> dict[str, Any]:
    """Find the best sub-network in the bin, or go on from the journal.

    Under torchrun the processes share every generation.

    Args:
        teacher: folder of the teacher.
        blocks: calibration and finals read its "train" split, fitness its "search" split.
        settings: space, bin and evolution.
        folder: receives `search.jsonl` and `search.json`.
        teacher_hash: of the teacher's files, where it is known already.

    Returns:
        The content of `search.json`; docs/search.md documents it.
    """
    with process_group():
        identity = {
            "teacher_hash": teacher_hash or hash_checkpoint(teacher),
            "data": blocks.manifest["fingerprint"],
            "settings": asdict(settings),
        }
        with main_first():
            journal = Journal(folder / "search.jsonl", identity)
        finished = folder / "search.json"
        if finished.is_file():
            result: dict[str, Any] = json.loads(finished.read_text())
            return result
        tokens = blocks.spread("train", settings.calibration_tokens)
        with main_first():
            source = Calibration(teacher)
            if is_measured(settings.init, settings.scored_as):
                source = calibrate(teacher, settings.init, tokens, identity["teacher_hash"])
        model = load_frozen(source.teacher, default_device())
        # The config as it is on disk: loading may change its precision, which bins in bytes read.
        config = read_config(source.teacher)
        config.name_or_path = str(teacher)
        searched = _Search(model, config, blocks, settings, journal, identity, source)
        result = json.loads(json.dumps(searched.run()))  # the same as read from the file later
        if is_main():
            write_json(finished, result)
        return result


class _Search:
    """One search with its teacher in memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PreTrainedConfig,
        blocks: TokenBlocks,
        settings: SearchSettings,
        journal: Journal,
        identity: dict[str, Any],
        source: Calibration,
    ) -> None:
        self.model, self.config, self.settings, self.journal = model, config, settings, journal
        self.blocks, self.identity = blocks, identity
        self.layouts, self.sizes = layouts_of(self.config), sizes_of(self.config)
        held_out = blocks.first("search", settings.tokens)
        self.context_length = held_out.shape[1]
        self.space = space_of(self.config, settings, self.context_length)
        self.bin = settings.bin.resolve(self.context_length)
        self.batch_size = settings.batch_size or fitting_batch_size(
            self.config, self.context_length, model.device, model.dtype.itemsize
        )
        self.orders, order_flops = self._orders()
        self.calibration_flops = order_flops + source.flops
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        state = {name: one for name, one in model.state_dict().items() if name not in tied}
        orders = self.orders
        moments = source.statistics if settings.scored_as == "refitted" else None
        if moments is None:  # refitted candidates are no views in any order
            orders = put_in_order(state, self.config, orders)
        place = (held_out.to(model.device), self.batch_size, moments)
        parts = (state, self.config, orders, *place)
        self.fitness = (
            DivergenceFromTeacher(*parts, teacher=model)
            if settings.fitness == "kl"
            else HeldOutLoss(*parts)
        )

    def amount(self, candidate: Candidate, measure: Measure) -> int:
        return int(amount(self.config, self._sizes(candidate), measure, self.context_length))

    def _sizes(self, candidate: Candidate) -> dict[str, Any]:
        sizes = candidate.sizes()
        return self.sizes | {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}

    def run(self) -> dict[str, Any]:
        scores = self._evolve()
        best = ranked(scores)[0]
        if not math.isfinite(best.loss):
            raise ValueError(
                f"no candidate of {len(scores)} has a finite loss; the teacher's weights or "
                "precision are at fault"
            )
        finals = self._finals(scores)
        return self._result(scores, finals, (ranked(finals) or [best])[0].candidate)

    def _orders(self) -> tuple[Orders, int]:
        """The axis orders and the FLOPs they cost; scores are kept in the cache."""
        settings, orders = self.settings, Orders.of_teacher(self.config)
        if settings.order == settings.layer_order == "teacher":
            return orders, 0
        units: UnitImportance = "magnitude" if settings.order == "teacher" else settings.order
        depth: DepthImportance = (
            "magnitude" if settings.layer_order == "teacher" else settings.layer_order
        )
        calibration = self.blocks.first("train", settings.calibration_tokens)
        batches = calibration.split(self.batch_size)  # type: ignore[no-untyped-call]
        batching = [calibration.numel(), self.batch_size, str(self.model.dtype), settings.init]
        key = {**self.identity, "settings": [units, depth, *batching]}

        def measure() -> Any:
            with progress("calibrate", calibration.numel(), "tokens") as advance:
                return measure_importance(self.model, batches, units, depth, advance)

        with main_first():
            found = cached_importance(cache_root() / "importance", key, measure).orders()
        passes = max(IMPORTANCE_FLOPS[units], IMPORTANCE_FLOPS[depth])
        flops_per_token = inference_flops_per_token(self.layouts, self.sizes, self.context_length)
        by_units = orders if settings.order == "teacher" else found
        by_depth = orders if settings.layer_order == "teacher" else found
        # Channels of a rotated teacher have an order already.
        embed = (orders if settings.init == ROTATED else by_units).embed
        mixed = Orders(by_depth.layers, embed, by_units.kv_groups, by_units.mlp)
        return mixed, passes * calibration.numel() * flops_per_token

    def _evolve(self) -> list[Evaluated]:
        settings, evolution = self.settings, self.settings.evolution
        table = SearchTable(evolution.generations) if is_main() else None
        started, best, generation_tokens = time.perf_counter(), math.inf, 0
        best_parameters, all_tokens = 0, 0

        def on_score(score: Evaluated, tokens: int, replayed: bool) -> None:
            nonlocal best, best_parameters, generation_tokens
            generation_tokens += tokens
            if score.tokens == race.all_tokens and score.loss < best:
                best, best_parameters = score.loss, score.parameters
            if table:
                table.advance(
                    int(not replayed and score.tokens == race.rungs[0] * race.fitness.block_length),
                    tokens,
                    best if math.isfinite(best) else None,
                )

        def on_generation(generation: int, candidates: int) -> None:
            nonlocal started, generation_tokens
            started, generation_tokens = time.perf_counter(), 0
            if table:
                table.start(generation + 1, candidates)

        def on_scored(generation: int, scores: list[Evaluated]) -> None:
            nonlocal all_tokens
            all_tokens += generation_tokens
            losses = [one.loss for one in scores if math.isfinite(one.loss)]
            if table:
                median = statistics.median(losses) if losses else math.nan
                seconds = time.perf_counter() - started
                row = (len(scores), best, median, best_parameters, all_tokens, seconds)
                table.finish(GenerationRow(generation + 1, *row))

        race = Race(
            self.fitness,
            lambda candidate: self.amount(candidate, "parameters"),
            self.journal,
            settings.racing,
            evolution.elites,
            on_score,
        )
        tradeoff = evolution.tradeoff
        burden = None if tradeoff == "none" else lambda one: self.amount(one, tradeoff)
        with table or nullcontext():
            return evolve(self.space, race, evolution, burden, on_generation, on_scored)

    def _finals(self, scores: list[Evaluated]) -> list[Evaluated]:
        settings = self.settings.finalists
        if not settings.count:
            return []
        whole = [one for one in ranked(scores) if one.tokens == self.fitness.blocks.numel()]
        finalists = choose_finalists(whole, settings.count)
        needed = settings.steps * settings.batch_size * self.context_length
        train_blocks = self.blocks.first("train", needed)
        with ExitStack() as stack:
            advance = None
            if is_main():
                advance = stack.enter_context(progress("finals", len(finalists), "finalists"))

            def on_score(score: Evaluated) -> None:
                if advance:
                    advance(1, f"{score.loss:.3f} nats after {score.steps} steps")

            return run_finals(
                finalists, self.fitness, train_blocks, settings, self.journal, on_score
            )

    def _result(
        self, scores: list[Evaluated], finals: list[Evaluated], winner: Candidate
    ) -> dict[str, Any]:
        settings, evolution = self.settings, self.settings.evolution
        flops = {
            one.candidate: inference_flops_per_token(
                self.layouts, self._sizes(one.candidate), self.context_length
            )
            for one in scores
        }
        trained = {one.candidate: _number(one.loss) for one in finals}
        train_tokens = settings.finalists.steps * settings.finalists.batch_size
        train_tokens *= self.context_length
        place = [one.candidate for one in scores].index(winner)
        front: list[int] = []
        if evolution.tradeoff != "none":
            import numpy as np

            points = [[one.loss, self.amount(one.candidate, evolution.tradeoff)] for one in scores]
            front = nondominated_fronts(np.array(points))[0]
        return {
            "format": "headstart-search-result/1",
            "teacher": {
                "name": str(self.config.name_or_path),
                "hash": self.identity["teacher_hash"],
                "sizes": self.sizes,
            },
            "spec": winner.spec(self.config, self.orders).to_json(),
            "loss": scores[place].loss,
            "parameters": scores[place].parameters,
            "bin": [self.bin.low, self.bin.high],
            "measure": self.bin.measure,
            "init": settings.init,
            "scored_as": settings.scored_as,
            "space": settings.space,
            "order": settings.order,
            "layer_order": settings.layer_order,
            "fitness": settings.fitness,
            "settings": asdict(settings),
            "calibration_flops": self.calibration_flops,
            "search_flops": sum(one.tokens * flops[one.candidate] for one in scores)
            + sum((one.tokens + 3 * train_tokens) * flops[one.candidate] for one in finals),
            "search_tokens": sum(one.tokens for one in (*scores, *finals)),
            "search_seconds": sum(one.seconds for one in (*scores, *finals)),
            "candidates": [
                {
                    "generation": one.generation,
                    "origin": one.origin,
                    "parameters": one.parameters,
                    "amount": self.amount(one.candidate, self.bin.measure),
                    "loss": _number(one.loss),
                    "tokens": one.tokens,
                    "sizes": one.candidate.sizes(),
                    **(
                        {"trained_loss": trained[one.candidate]} if one.candidate in trained else {}
                    ),
                }
                for one in scores
            ],
            "winner": place,
            "front": front,
        }


def _number(loss: float) -> float | None:
    """A loss for JSON, which knows neither NaN nor infinity."""
    return loss if math.isfinite(loss) else None


def load_spec(path: Path) -> SubnetSpec:
    """Read a spec from `search.json`, `subnet.json` or a file that holds only the spec.

    Raises:
        ValueError: the file is missing, a folder, not JSON, or holds no spec.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a spec such as search.json") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a spec in it, such as search.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    spec = content.get("spec", content) if isinstance(content, dict) else None
    if not isinstance(spec, dict):
        raise ValueError(f"{path} holds no spec; give search.json or subnet.json")
    return SubnetSpec.from_json(spec)
