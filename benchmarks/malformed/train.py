"""Malformed `train` blocks: every argument of TrainingArguments is given what it cannot mean."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments

from headstart.training.arguments import LEAST, PASSED_OVER, PASSED_OVER_VALUES, RESERVED_ARGUMENTS
from malformed.recipes import WRONG
from malformed.world import Case, World

ODD = [
    {"report_to": "unheard_of"}, {"report_to": ["tensorboard", "unheard_of"]},
    {"optim_args": "words"}, {"optim": "adamw_bnb_8bit", "optim_args": "words"},
    {"optim": 3}, {"optim": "rmsprop", "optim_args": "alpha=many"},
    {"adam_beta1": 2.0}, {"adam_beta2": -0.5}, {"adam_epsilon": -1.0},
    {"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_kwargs": {"unheard_of": 1}},
    {"lr_scheduler_kwargs": "{"}, {"lr_scheduler_kwargs": [1]}, {"lr_scheduler_type": 3},
    {"seed": -1}, {"seed": 2**32}, {"logging_steps": 0}, {"logging_steps": 1.5},
    {"save_steps": 1.5}, {"save_strategy": "unheard_of"}, {"logging_strategy": "unheard_of"},
    {"torch_compile_backend": "unheard_of"}, {"torch_compile_mode": "unheard_of"},
    {"deepspeed": "nowhere.json"}, {"deepspeed": 3}, {"fsdp": True}, {"fsdp": "unheard_of"},
    {"fsdp": True, "fsdp_config": "nowhere.json"}, {"debug": "unheard_of"}, {"debug": 3},
    {"log_level": "unheard_of"}, {"hub_strategy": "unheard_of"}, {"push_to_hub": True},
    {"train_sampling_strategy": "unheard_of"}, {"ddp_backend": "unheard_of"},
    {"fp16": True, "bf16": True}, {"dataloader_prefetch_factor": 2},
    {"dataloader_multiprocessing_context": "unheard_of"}, {"torch_empty_cache_steps": 0},
    {"include_num_input_tokens_seen": "some"},
    {"activation_checkpointing_kwargs": {"unheard_of": 1}},
    {"activation_checkpointing_kwargs": "{"}, {3: 1}, {"weight_decai": 0.1}, {"": 1},
    {"optim": "galore_adamw", "optim_target_modules": [3]},
]  # fmt: skip
"""What an arm could not begin with, or what no argument has as its value."""


def train(world: World) -> Iterator[Case]:
    """A recipe for each malformed argument, and an arm's own `train` for some."""

    def given(entries: dict[Any, Any]) -> Case:
        name = f"{entries}"
        number = sum(1 for _ in (world.folder / "recipes").glob("train-*"))
        path = world.recipe(f"train-{number}", lambda tree: tree["train"].update(entries))
        return Case("train", name, ["run", str(path)])

    hints = typing.get_type_hints(TrainingArguments)
    for key in TrainingArguments.__dataclass_fields__:
        kinds = [kind for kind in typing.get_args(hints[key]) or [hints[key]] if kind in WRONG]
        is_plain = not set(typing.get_args(hints[key])) - {*kinds, type(None)}
        if key in RESERVED_ARGUMENTS:
            yield given({key: 1})
        elif key in PASSED_OVER:
            default = getattr(TrainingArguments, key, None)
            yield given({key: {None: "words", False: True, True: False}.get(default, 3)})
        elif is_plain and len(kinds) == 1 and kinds[0] is not str:
            for value in WRONG[kinds[0]].values():
                yield given({key: value})
    for key, least in LEAST.items():
        yield given({key: least - 1})
    for (key, value), _ in PASSED_OVER_VALUES.items():
        yield given({key: value})
    for entries in ODD:
        yield given(entries)
    for entries in ODD[:6]:
        arms = [{"name": "good"}, {"name": "bad", "train": entries}]
        yield Case("train", f"an arm's {entries}", world.run(pretrain__arms=arms))
