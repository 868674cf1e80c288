"""The arms of a comparison and what they share: the `pretrain` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from headstart.losses.distillation import DistillationSettings
from headstart.system.errors import UserError
from headstart.system.formats import parse_count
from headstart.system.settings import check_least

STUDENT, PROPORTIONAL = "student", "proportional"
"""Shapes that no file describes."""
BEST = "best"
MAX_SEED = 2**32 - 1
"""NumPy, which the Trainer seeds too, takes no larger one."""
MAX_NAME_BYTES = 200
"""Of a folder, with room for what is added to it while it is unfinished."""


@dataclass(frozen=True)
class Arm:
    """One training run.

    Attributes:
        name: in the report, and of its folder.
        init: "random" weights, or those of the extracted "subnet".
        shape: of a model with random weights: that of the "student"; "proportional", the shape in
            the bin that is nearest to the teacher's proportions; or that of a config file, a folder
            or a hub id, with the teacher's vocabulary.
        learning_rate: the peak of the schedule.
        learning_rates: several to train with, each in a run of its own; the one that ends lowest
            is compared with the other arms.
        optimizer: "muon" for hidden matrices, with AdamW for the rest; empty for `train.optim`.
        train: passed to TrainingArguments for this arm, over the recipe's `train`.
        kd: distillation from the teacher, or none.
    """

    name: str
    init: Literal["random", "subnet"] = "subnet"
    shape: str = STUDENT
    learning_rate: float = 1e-3
    learning_rates: tuple[float, ...] = ()
    optimizer: Literal["", "muon"] = ""
    train: dict[str, Any] = field(default_factory=dict)
    kd: DistillationSettings | None = None

    def __post_init__(self) -> None:
        name = self.name
        if not name.strip() or "/" in name or name.startswith(".") or not name.isprintable():
            raise UserError(f"arm name {name!r} cannot be a folder's name; choose another")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"arm name {name!r} is too long; use at most {MAX_NAME_BYTES} bytes")
        for rate in (self.learning_rate, *self.learning_rates):
            if rate <= 0:
                raise UserError(f"arm {self.name} has learning_rate {rate}; it must be above 0")
        if self.init != "random" and self.shape != STUDENT:
            raise UserError(
                f"arm {name} has the shape {self.shape} and weights of the student; set its init "
                "to random, or leave out shape"
            )
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise UserError(f"arm {self.name} has one of its learning_rates twice; remove it")


@dataclass(frozen=True)
class CorrectionSettings:
    """Tuning of the teacher on the run's own text, before anything is cut out of it.

    Source: teacher correction of "LLM Pruning and Distillation in Practice: The Minitron Approach"
    (arXiv 2408.11796). Its budget and rates are of other models; ours are set here.

    Attributes:
        tokens: to train on, rounded up to whole steps; 0 for none.
        learning_rate: the peak, which is held between warm-up and decay.
        warmup: share of the steps over which the rate rises.
        decay: share over which it falls to zero, at the end.
        train: passed to TrainingArguments, over the recipe's `train`.
    """

    tokens: int = 0
    learning_rate: float = 1e-4
    warmup: float = 0.05
    decay: float = 0.2
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prefix = "teacher_correction."
        check_least(self, prefix, tokens=0)
        if self.learning_rate <= 0:
            raise UserError(f"{prefix}learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.warmup < 1 or not 0 < self.decay < 1:
            raise UserError(
                f"{prefix}warmup is {self.warmup} and decay {self.decay}; they are shares of the "
                "steps, from 0 (decay: above 0) to below 1"
            )


@dataclass(frozen=True)
class PretrainSettings:
    """What all arms share.

    Attributes:
        tokens: budget of every arm, rounded up to whole steps.
        budgets: one or several of them instead, such as 2M. Each arm trains at a constant rate to
            the largest, and from that run each budget branches off with a rate that falls to zero,
            so that it ends as a run of its own would.
        decay: share of every one of `budgets` over which the rate falls.
        bytes: the budget in bytes of text, whatever the tokenizer, by the bytes of a token in the
            validation split; 0 for `tokens`.
        validation_tokens: of the validation split, used by every evaluation; all that it holds if
            that is less.
        test_tokens: of the test split, on which final losses are measured; all that it holds if
            that is less.
        evaluations: how many, denser at the start, besides the one before training.
        seeds: of weights and of the order of the text; with several, each arm is trained with each
            and their mean is reported. `train.seed` alone when empty.
        target: the arm whose loss the others are to reach, by its name; "best" for whichever arm
            with random weights ends lowest.
        baselines: models, as folders or hub ids, whose loss on the validation split the arms are
            measured against; by its bytes, where their tokenizer is another.
        peak_tflops: of one device in the precision of training, for the share that is reached; 0
            for what its maker says, where known.
        arms: in the order in which they run.
    """

    tokens: int = 10_000_000
    bytes: int = 0
    budgets: tuple[int | str, ...] = ()
    decay: float = 0.2
    validation_tokens: int = 65_536
    test_tokens: int = 262_144
    evaluations: int = 20
    seeds: tuple[int, ...] = ()
    target: str = BEST
    baselines: tuple[str, ...] = ()
    peak_tflops: float = 0.0
    arms: tuple[Arm, ...] = (
        Arm("scratch", init="random"),
        Arm("proportional", init="random", shape=PROPORTIONAL),
        Arm("subnet"),
        Arm("subnet+kd", kd=DistillationSettings()),
    )

    def __post_init__(self) -> None:
        least = {"tokens": 1, "bytes": 0, "validation_tokens": 1, "test_tokens": 1}
        check_least(self, "pretrain.", **least, evaluations=1)
        if self.bytes and self.budgets:
            raise UserError("pretrain.bytes and pretrain.budgets are both set; keep one of them")
        if 0 in self.budget_tokens or len(set(self.budget_tokens)) < len(self.budget_tokens):
            raise UserError(f"pretrain.budgets {list(self.budgets)} has one twice, or 0; remove it")
        if not 0 < self.decay < 1:
            raise UserError(f"pretrain.decay is {self.decay}; it must be between 0 and 1")
        if self.peak_tflops < 0:
            raise UserError(f"pretrain.peak_tflops is {self.peak_tflops}; it may not be negative")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"pretrain.seeds {list(self.seeds)} has one twice; remove it")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"pretrain.seeds holds {seed}; use 0 to {MAX_SEED}")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"pretrain.arms are named {', '.join(names) or 'nothing'}; give at least one arm, "
                "each with a name of its own"
            )
        if self.target not in (BEST, *names):
            raise UserError(
                f"pretrain.target is {self.target!r}; choose {BEST} or an arm: {', '.join(names)}"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """What arms name as `kd.teacher`, each once."""
        named = [arm.kd.teacher for arm in self.arms if arm.kd and arm.kd.teacher]
        return tuple(dict.fromkeys(named))

    @property
    def budget_tokens(self) -> tuple[int, ...]:
        """Every budget, ascending."""
        return tuple(sorted(map(parse_count, self.budgets))) or (self.tokens,)
