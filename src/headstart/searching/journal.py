"""The journal of a search: an append-only file of scores, from which a killed search goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.searching.candidate import Candidate
from headstart.system.distributed import from_main, is_main
from headstart.system.errors import UserError
from headstart.system.files import write_whole
from headstart.system.settings import differences, tree_of, with_defaults

JOURNAL_FORMAT = "headstart-search/5"
PROPORTIONAL = "proportional"
"""Origin of candidates that have about the teacher's proportions."""


@dataclass(frozen=True)
class Evaluated:
    """A candidate with its loss.

    Attributes:
        generation: in which it was first proposed, from 0.
        origin: "sample", "mutation", "crossover", "immigrant" or "proportional".
        candidate: what it keeps.
        parameters: of the sub-network.
        loss: nats per token over `tokens`; of a finalist, after its refit and training.
        tokens: of the search split on which the loss was taken, from the first on.
        seconds: that it took.
        steps: of training before the loss was taken; 0 for none.
        started: whether it is the score of a finalist, which is refitted or started as a student.
    """

    generation: int
    origin: str
    candidate: Candidate
    parameters: int
    loss: float
    tokens: int
    seconds: float
    steps: int = 0
    started: bool = False

    @property
    def comparable_loss(self) -> float:
        """The loss, or infinity if it is no number."""
        return self.loss if math.isfinite(self.loss) else math.inf

    @property
    def json_loss(self) -> float | None:
        """The loss for JSON, which knows neither NaN nor infinity."""
        return self.loss if math.isfinite(self.loss) else None


class Journal:
    """An append-only JSONL file of scores; docs/search.md documents the format.

    The first line identifies the search; every other line is one score. A last line that a kill cut
    short is dropped when the journal is opened again.

    Args:
        path: the file, made if need be.
        identity: what is searched; a file with another identity is refused.
        settings: how, a frozen dataclass; part of the identity.

    Raises:
        UserError: the file belongs to another search.
    """

    def __init__(self, path: Path, identity: dict[str, Any], settings: Any = None) -> None:
        self.path = path
        self.scores: dict[tuple[Candidate, int, int, bool], Evaluated] = {}
        self.origins: dict[int, dict[Candidate, str]] = {}
        for line in from_main(lambda: _opened(path, identity, settings)):
            entry = json.loads(line)
            entry["candidate"] = Candidate.from_json(entry["candidate"])
            if entry["loss"] is None:
                entry["loss"] = math.nan
            self._keep(Evaluated(**entry))

    def find(
        self, candidate: Candidate, tokens: int, steps: int = 0, started: bool = False
    ) -> Evaluated | None:
        """The score of a candidate on so many tokens, after so many steps, if it is known."""
        return self.scores.get((candidate, tokens, steps, started))

    def proposals(self, generation: int) -> tuple[list[tuple[Candidate, str]], bool]:
        """The scored candidates of a generation with their origins, and whether they are all.

        They come as they were proposed. A generation is known to be whole if a later one is there.
        """
        later = max(self.origins, default=0) > generation
        return list(self.origins.get(generation, {}).items()), later

    def append(self, scores: list[Evaluated]) -> None:
        """Keep new scores; only the main process writes them."""
        for evaluated in scores:
            self._keep(evaluated)
        if not is_main():
            return
        with self.path.open("a") as stream:
            for evaluated in scores:
                plain = {"candidate": evaluated.candidate.to_json(), "loss": evaluated.json_loss}
                stream.write(json.dumps({**asdict(evaluated), **plain}) + "\n")

    def _keep(self, evaluated: Evaluated) -> None:
        key = (evaluated.candidate, evaluated.tokens, evaluated.steps, evaluated.started)
        self.scores[key] = evaluated
        self.origins.setdefault(evaluated.generation, {}).setdefault(
            evaluated.candidate, evaluated.origin
        )


def _opened(path: Path, identity: dict[str, Any], settings: Any) -> list[str]:
    """The lines of scores in a journal's file, which is begun, or mended after a kill."""
    header = {"format": JOURNAL_FORMAT, **identity}
    if settings is not None:
        header["settings"] = tree_of(settings)
    header = json.loads(json.dumps(header))
    text = path.read_text() if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    first, *scores = whole.splitlines() or [""]
    if not first:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(header) + "\n")
        return []
    found = json.loads(first)
    if settings is not None:
        found["settings"] = with_defaults(found.get("settings"), type(settings))
    for key, (here, there) in differences(header, found).items():
        raise UserError(
            f"{path} is the journal of another search ({key} is {there!r} there, {here!r} here); "
            "choose another --output or delete it"
        )
    if whole + "\n" != text:
        write_whole(path, whole + "\n")
    return scores
