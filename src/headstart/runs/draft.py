"""A first recipe for a teacher, a text and a machine, with comments, for a user to go on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import read_architecture
from headstart.recipe import Recipe, RecipeLoader, recipe_from_dict
from headstart.runs.plan import plan_arms
from headstart.searching.bins import BinSettings
from headstart.searching.settings import SearchSettings
from headstart.system.errors import UserError
from headstart.system.formats import count_text, parse_count
from headstart.text.prepare import check_source
from headstart.text.settings import DataSettings
from headstart.training.plan import Hardware

TOKENS_PER_PARAMETER = 20
"""About what is best for a model with random weights (Hoffmann et al., arXiv 2203.15556)."""
CPU_TOKENS = 1_000_000
"""What a student of some million parameters sees on a CPU in an hour or so."""
CPU_BATCH = 2
LARGEST_BATCH = 32
"""Blocks that a GPU reads at once, at most."""
FEWEST_STEPS = 2_000
STEP_TOKENS = (4_096, 524_288)
"""The smallest and the largest step that is proposed."""
LARGE_EMBEDDING = 1 / 3
"""Share of a student's parameters above which a smaller vocabulary is proposed."""


@dataclass(frozen=True)
class DraftSettings:
    """What a first recipe is made of.

    Attributes:
        teacher: a folder or a hub id.
        size: of the student in parameters, such as 90M.
        data: a file, a folder or a datasets id.
        output: the run folder.
        tokens: of each arm; 0 for `TOKENS_PER_PARAMETER`, and `CPU_TOKENS` at most without a GPU.
        hardware: what trains; None for a CPU.
    """

    teacher: str
    size: str
    data: str
    output: str = "runs/first"
    tokens: int = 0
    hardware: Hardware | None = None

    @property
    def budget(self) -> int:
        """Training tokens of each arm."""
        best = TOKENS_PER_PARAMETER * parse_count(self.size)
        return self.tokens or (best if self.hardware else min(best, CPU_TOKENS))


def draft(settings: DraftSettings) -> str:
    """The YAML of a recipe that `headstart plan` prices and `headstart run` accepts.

    Of the teacher its config is read, and of the text its first document. The batch is the largest
    that is planned to fit the GPUs.

    Raises:
        UserError: teacher or text do not read, or the teacher has no sub-network of this size.
    """
    teacher = read_architecture(settings.teacher)
    block_length = min(DataSettings.block_length, teacher.context_limit or 1 << 30)
    if not parse_count(settings.size):
        raise UserError(f"--size is {settings.size}; write a number of parameters such as 90M")
    check_source(DataSettings(settings.data, block_length=block_length))
    batch = _fitting_batch(settings, teacher, block_length)
    text = _text(settings, teacher, block_length, batch)
    plan_arms(_recipe(text), {"": teacher}, settings.hardware or Hardware())  # so the bin has one
    return text


def _recipe(text: str) -> Recipe:
    return recipe_from_dict(yaml.load(text, RecipeLoader))


def _fitting_batch(settings: DraftSettings, teacher: Architecture, block_length: int) -> int:
    """Blocks that a device reads at once: the most that fit in every arm, or 1."""
    hardware = settings.hardware
    if hardware is None:
        return CPU_BATCH
    batch = LARGEST_BATCH
    step_blocks = max(1, _step_tokens(settings.budget) // (block_length * hardware.gpus))
    while batch > step_blocks:
        batch //= 2
    while batch > 1:
        recipe = _recipe(_text(settings, teacher, block_length, batch))
        if all(plan.fits(hardware) for plan in plan_arms(recipe, {"": teacher}, hardware)[0]):
            break
        batch //= 2
    return batch


def _step_tokens(budget: int) -> int:
    """Tokens of one optimizer step over all devices, about."""
    low, high = STEP_TOKENS
    return min(high, max(low, budget // FEWEST_STEPS))


def _text(settings: DraftSettings, teacher: Architecture, block_length: int, batch: int) -> str:
    hardware, budget = settings.hardware, settings.budget
    devices = hardware.gpus if hardware else 1
    accumulation = max(1, round(_step_tokens(budget) / (batch * block_length * devices)))
    step_tokens = batch * block_length * devices * accumulation
    machine = f"{devices} GPU{'s' * (devices > 1)}" if hardware else "a CPU"
    why = f"{TOKENS_PER_PARAMETER} for each parameter" if hardware else "about an hour on a CPU"
    why = "as asked" if settings.tokens else why
    search = SearchSettings()
    evolution, tolerance = search.evolution, BinSettings.tolerance
    ends = [parse_count(settings.size) * (1 + sign * tolerance) for sign in (-1, 1)]
    return f"""\
# A student of about {settings.size} parameters, trained on {machine}.
# `headstart plan RECIPE` prices it, `headstart run RECIPE` runs it; docs/recipe.md has every key.
teacher: {_yaml(settings.teacher)}
# The run folder; the same command goes on there.
output: {_yaml(settings.output)}

data:
  source: {_yaml(settings.data)}
  text_column: {DataSettings.text_column}        # of .jsonl, .json and .parquet; .txt has none
  block_length: {block_length}        # tokens that the models read at once
{_vocabulary(settings, teacher)}
search:
  # How the student begins; least_squares is better in short runs (docs/calibrated.md).
  init: {search.init}
  # Which sub-networks there are; `headstart list spaces` has the others.
  space: {search.space}
  # Parameters, within {tolerance:.0%}; the same as {{low: {ends[0]:.0f}, high: {ends[1]:.0f}}}.
  bin: {{around: {_yaml(settings.size)}}}
  evolution: {{population: {evolution.population}, generations: {evolution.generations}}}

pretrain:
  # Of each arm: {why}.
  tokens: {budget}
  # Instead, to compare the arms at several budgets for little more:
  # budgets: [{_parts(budget)}]
  # Random weights in two shapes, and the student without and with distillation.
  # With learning_rates: [5e-4, 1e-3, 2e-3] an arm has a run for each, and keeps the best.
  arms:
    - {{name: scratch, init: random, learning_rate: 1e-3}}
    - {{name: proportional, init: random, shape: proportional, learning_rate: 1e-3}}
    - {{name: subnet, init: subnet, learning_rate: 1e-3}}
    - {{name: subnet+kd, init: subnet, learning_rate: 1e-3, kd: {{alpha: 0.5, beta: 0.5}}}}

# Any argument of transformers.TrainingArguments. A step is of {step_tokens:,} tokens on {machine}.
train:
  per_device_train_batch_size: {batch}
  gradient_accumulation_steps: {accumulation}

# What is shown at the end: what the models write, and zero-shot tasks.
report:
  num_prompts: 3
  tasks: []                # `headstart list tasks`; needs pip install 'headstart[eval]'
"""


def _vocabulary(settings: DraftSettings, teacher: Architecture) -> str:
    """A proposal, where the embedding would take much of the student."""
    width, rows = teacher.sizes["embed"], teacher.sizes["vocab"]
    size = parse_count(settings.size)
    # A student's width shrinks about as the root of its size does.
    whole = teacher.count(DataSettings.block_length).parameters
    share = rows * width * min(1.0, size / whole) ** 0.5 / size
    if share < LARGE_EMBEDDING:
        return ""
    return (
        f"\n# The embedding of {rows:,} rows may take {min(share, 1):.0%} of such a student.\n"
        "# `headstart trim TEACHER --data TEXT --table` shows what fewer rows cost and give.\n"
        f"# vocabulary: {{size: {2 ** ((rows // 2).bit_length() - 1)}}}\n"
    )


def _parts(budget: int) -> str:
    return ", ".join(count_text(budget / part) for part in (8, 4, 2, 1))


def _yaml(value: Any) -> str:
    """A scalar as YAML has it, quoted where it must be."""
    text: str = yaml.safe_dump(value, allow_unicode=True, width=1 << 16)
    return text.removesuffix("\n").removesuffix("\n...")
