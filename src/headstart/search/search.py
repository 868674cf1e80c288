"""The search as a whole: axis orders, candidates in the bin, and the winner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from headstart.data import SplitName, TokenBlocks
from headstart.files import write_json
from headstart.progress import progress
from headstart.search.evolution import (
    Evaluated,
    EvolutionSettings,
    Journal,
    evolve,
    ranked,
)
from headstart.search.importance import Importance, activation_importance
from headstart.search.space import (
    SEARCHED_AXES,
    BinSettings,
    Candidate,
    GridSettings,
    Orders,
    Space,
    shapes_in_bin,
)
from headstart.subnet.count import inference_flops_per_token, parameters
from headstart.subnet.extract import hash_checkpoint
from headstart.subnet.rules import layouts_of, sizes_of
from headstart.subnet.spec import SubnetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and how.

    Attributes:
        space: "coarse-uniform" keeps the first units of each axis, "fine-uniform" any of them.
        order: what "first" means: the teacher's own order, or most important first.
        bin: the parameter bin.
        grid: sizes that each axis may take.
        unit_noise: see `Space.unit_noise`.
        evolution: population and operators.
        tokens: held-out tokens on which every candidate is scored.
        calibration_tokens: training tokens of the importance pass.
        batch_size: blocks per forward pass.
    """

    space: Literal["coarse-uniform", "fine-uniform"] = "coarse-uniform"
    order: Literal["teacher", "importance"] = "importance"
    bin: BinSettings = field(default_factory=BinSettings)
    grid: GridSettings = field(default_factory=GridSettings)
    unit_noise: float = 0.5
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    tokens: int = 16_384
    calibration_tokens: int = 32_768
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("tokens", "calibration_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} is {getattr(self, name)}; use at least 1")
        if not 0 <= self.unit_noise <= 1:
            raise ValueError(f"search.unit_noise is {self.unit_noise}; it must be in [0, 1]")


def space_of(config: PreTrainedConfig, settings: SearchSettings) -> Space:
    """The search space of a teacher, from its config alone.

    Raises:
        ValueError: the bin or grid is malformed, or no candidate can meet the bin.
    """
    sizes = sizes_of(config)
    return Space(
        shapes=shapes_in_bin(config, settings.grid, settings.bin.resolve()),
        totals=tuple(sizes[axis] for axis in SEARCHED_AXES),
        fine=settings.space.startswith("fine"),
        unit_noise=settings.unit_noise,
    )


def search(
    teacher: Path, blocks: TokenBlocks, settings: SearchSettings, folder: Path
) -> dict[str, Any]:
    """Find the sub-network with the lowest held-out loss, or go on from the journal.

    Args:
        teacher: folder of the teacher.
        blocks: calibration comes from its "train" split, fitness from its "search" split.
        settings: space, bin and evolution.
        folder: receives `importance.safetensors`, `search.jsonl` and `search.json`.

    Returns:
        The content of `search.json`: the winner's spec and every candidate; see docs/design.md.
    """
    from transformers import AutoModelForCausalLM

    finished = folder / "search.json"
    if finished.is_file():
        result: dict[str, Any] = json.loads(finished.read_text())
        return result
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Half precisions are slow on most CPUs; a GPU takes the teacher's own.
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype).to(device)
    model.eval().requires_grad_(False)
    config = model.config
    space = space_of(config, settings)
    journal = Journal(
        folder / "search.jsonl",
        {
            "teacher_hash": hash_checkpoint(teacher),
            "data": blocks.manifest["fingerprint"],
            "settings": asdict(settings),
        },
    )
    orders, calibration_tokens = Orders.of_teacher(config), 0
    if settings.order == "importance":
        importance, calibration_tokens = _importance(model, blocks, settings, folder)
        orders = importance.orders()

    fitness_blocks = _first_blocks(blocks, "search", settings.tokens)
    history = _evolve(model, orders, space, settings, fitness_blocks, journal)
    best = ranked(history)[0]
    if not math.isfinite(best.loss):
        raise ValueError(
            f"no candidate of {len(history)} has a finite loss; the teacher's weights or precision "
            "are at fault"
        )
    flops_per_token = sum(
        inference_flops_per_token(
            layouts_of(config), {**sizes_of(config), **one.candidate.sizes}, fitness_blocks.shape[1]
        )
        for one in history
    )
    teacher_flops = inference_flops_per_token(
        layouts_of(config), sizes_of(config), fitness_blocks.shape[1]
    )
    result = {
        "spec": best.candidate.spec(orders).to_json(),
        "loss": best.loss,
        "parameters": best.parameters,
        "bin": list(asdict(settings.bin.resolve()).values()),
        "space": settings.space,
        "order": settings.order,
        "calibration_flops": calibration_tokens * teacher_flops,
        "search_flops": fitness_blocks.numel() * flops_per_token,
        "search_tokens": fitness_blocks.numel() * len(history),
        "search_seconds": sum(one.seconds for one in history),
        "candidates": [_summary(one) for one in history],
        "winner": history.index(best),
    }
    write_json(finished, result)
    return result


def _summary(one: Evaluated) -> dict[str, Any]:
    return {
        "generation": one.generation,
        "origin": one.origin,
        "parameters": one.parameters,
        "loss": one.loss,
        "sizes": one.candidate.sizes,
    }


def _first_blocks(blocks: TokenBlocks, split: SplitName, num_tokens: int) -> torch.Tensor:
    """At least `num_tokens` of a split as whole blocks, or all that it has."""
    array = blocks.split(split)
    num_blocks = -(-num_tokens // array.shape[1])
    return torch.from_numpy(array[:num_blocks].astype("int64"))


def _importance(
    model: Any, blocks: TokenBlocks, settings: SearchSettings, folder: Path
) -> tuple[Importance, int]:
    """Importance scores and the tokens they come from, kept in the run folder."""
    calibration = _first_blocks(blocks, "train", settings.calibration_tokens)
    kept = folder / "importance.safetensors"
    if not kept.is_file():
        with progress("calibrate", calibration.numel(), "tokens") as advance:
            batches = calibration.split(settings.batch_size)  # type: ignore[no-untyped-call]
            scores = activation_importance(model, batches, advance)
        unfinished = kept.with_suffix(".unfinished")
        save_file({name: tensor.contiguous() for name, tensor in vars(scores).items()}, unfinished)
        unfinished.rename(kept)
    return Importance(**load_file(kept)), calibration.numel()


def _evolve(
    model: Any,
    orders: Orders,
    space: Space,
    settings: SearchSettings,
    fitness_blocks: torch.Tensor,
    journal: Journal,
) -> list[Evaluated]:
    from headstart.search.fitness import HeldOutLoss

    config = model.config
    layouts, sizes = layouts_of(config), sizes_of(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state: Mapping[str, torch.Tensor] = {
        name: tensor for name, tensor in model.state_dict().items() if name not in tied
    }
    fitness = HeldOutLoss(state, config, orders, fitness_blocks, settings.batch_size)

    def count_parameters(candidate: Candidate) -> int:
        return int(parameters(layouts, {**sizes, **candidate.sizes}))

    evolution = settings.evolution
    best = float("inf")
    total = evolution.population * evolution.generations
    with progress("search", total, "candidates") as advance:

        def on_evaluated(one: Evaluated, replayed: bool) -> None:
            nonlocal best
            best = min(best, one.loss)
            advance(1, f"generation {one.generation + 1} best {best:.3f}")

        return evolve(space, fitness, count_parameters, evolution, journal, on_evaluated)


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
