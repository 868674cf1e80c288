"""What text to read, and how to cut it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from headstart.system.errors import UserError
from headstart.system.settings import check_least

SplitName = Literal["train", "search", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "search", "validation", "test")
FRACTIONS = ("validation_fraction", "search_fraction", "test_fraction")
"""The settings that give a split its share; training has the rest."""
MAX_WEIGHT = 1e9
"""Of a mixture's part, so that sums and shares of weights are numbers."""


@dataclass(frozen=True)
class MixtureSource:
    """One corpus of a mixture.

    Attributes:
        source: As `DataSettings.source`.
        weight: Share of the training tokens that come from it, in any unit.
        text_column: The column that holds the text; the mixture's own when empty.
    """

    source: str
    weight: float
    text_column: str = ""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"data.mixture gives {self.source} weight {self.weight}: remove it")
        if self.weight > MAX_WEIGHT:
            raise UserError(
                f"data.mixture gives {self.source} weight {self.weight}: use at most {MAX_WEIGHT:g}"
            )


@dataclass(frozen=True)
class DataSettings:
    """What to read and how to cut it.

    Attributes:
        source: A file, a folder of files, the id of a dataset on the Hugging Face hub (its "train"
            split is read), or "demo" for the demo's corpus.
        document_separator: What ends a document in a .txt file: "blank_line", "line" (each line is
            a document), or a text such as "<|endoftext|>". A file is one document when empty.
        text_column: The column that holds the text; a .txt file has no columns and ignores it.
        block_length: Tokens per block.
        validation_fraction: Share of the documents that training is watched on, and that learning
            rates and checkpoints are chosen by.
        search_fraction: Share of the documents that the search measures fitness on: never
            trained on, never reported on.
        test_fraction: Share of the documents that results are reported on. Nothing is chosen by it.
        seed: Changes which documents fall into which split.
        mixture: Several corpora instead of `source`. Smaller ones are repeated until the largest,
            by its weight, has been read once.
        max_tokens: Training tokens to read of each corpus; 0 for as many as a run needs.
        strict: Whether a line of a .jsonl file that is no JSON object is an error; otherwise it is
            passed over and counted.
        separate_documents: Whether tokens attend to their own document only, in training and in
            its evaluations; otherwise to all of their block that comes before them.
    """

    source: str = ""
    document_separator: str = ""
    text_column: str = "text"
    block_length: int = 512
    validation_fraction: float = 0.05
    search_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 0
    mixture: tuple[MixtureSource, ...] = ()
    max_tokens: int = 0
    strict: bool = False
    separate_documents: bool = False

    @property
    def is_test_only(self) -> bool:
        """Whether the whole text is for the test, so that nothing can be trained on it."""
        return self.fractions == {**dict.fromkeys(FRACTIONS, 0.0), "test_fraction": 1.0}

    @property
    def fractions(self) -> dict[str, float]:
        """The share of each split but the training's, by its setting."""
        return {name: getattr(self, name) for name in FRACTIONS}

    def share(self, split: SplitName) -> float:
        """The share of a split."""
        if split == "train":
            return 1 - sum(self.fractions.values())
        return self.fractions[f"{split}_fraction"]

    def for_test_alone(self) -> DataSettings:
        """The same text, all of it in the test split."""
        return replace(self, validation_fraction=0.0, search_fraction=0.0, test_fraction=1.0)


@dataclass(frozen=True)
class VocabularySettings:
    """Which tokens are left of a teacher's vocabulary.

    Attributes:
        size: Rows of the embedding that are left; 0 for the whole vocabulary.
        keep: Texts whose tokens stay, beside bytes, special tokens and those of the chat template.
        sample_characters: Of the training split, in which tokens are counted.
    """

    size: int = 0
    keep: tuple[str, ...] = ()
    sample_characters: int = 16_000_000

    def __post_init__(self) -> None:
        check_least(self, "vocabulary.", size=0, sample_characters=1)
