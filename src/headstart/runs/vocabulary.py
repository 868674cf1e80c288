"""The teacher that a run works with: the whole one, or one with a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import Checkpoint, read_architecture
from headstart.model.trim import (
    config_ids,
    read_tokenizer,
    trimmed_architecture,
    write_trimmed,
)
from headstart.recipe import Recipe
from headstart.system.errors import UserError
from headstart.system.memo import remembered
from headstart.system.progress import progress
from headstart.text.corpus import find_corpus, inputs_of
from headstart.text.prepare import load_tokenizer, parts_of, tokenizer_hash
from headstart.text.sample import sampled_texts
from headstart.text.settings import FRACTIONS, DataSettings, SplitName, VocabularySettings
from headstart.text.vocabulary import check_size, kept_tokens, needed_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Of what the memo keeps; raise it when an equal key would give other rows or other files."""
BATCH_TEXTS = 256
CONVERSATIONS = (
    [{"role": "user", "content": ""}],
    [{"role": role, "content": ""} for role in ("user", "assistant", "user")],
    [{"role": role, "content": ""} for role in ("system", "user", "assistant")],
)
"""What a chat template puts around these is kept."""


def check_vocabulary_size(settings: VocabularySettings, architecture: Architecture) -> None:
    """Raise a UserError if a teacher has fewer rows than shall be left."""
    if settings.size > (rows := architecture.config.vocab_size):
        raise UserError(
            f"vocabulary.size is {settings.size} and the teacher has {rows} rows; use fewer"
        )


def planned_architecture(recipe: Recipe) -> Architecture:
    """The architecture of a recipe's teacher with the vocabulary that is left; reads configs only.

    Raises:
        UserError: there is no such teacher, no table knows its family, or it has fewer rows.
    """
    return left_of(read_architecture(recipe.teacher), recipe.vocabulary)


def left_of(architecture: Architecture, settings: VocabularySettings) -> Architecture:
    """The architecture with as many rows as are left; errors as `check_vocabulary_size`."""
    check_vocabulary_size(settings, architecture)
    return trimmed_architecture(architecture, settings.size) if settings.size else architecture


def check_trims(teacher: Checkpoint, settings: VocabularySettings) -> None:
    """Find out, before any text is read, whether a teacher's vocabulary can be trimmed.

    Raises:
        UserError: it has fewer rows, its tokenizer is of another kind, or more tokens must stay.
    """
    if settings.size:
        check_vocabulary_size(settings, teacher.architecture)
        check_size(settings.size, needed_rows(teacher, settings))


def needed_rows(teacher: Checkpoint, settings: VocabularySettings) -> set[int]:
    """The ids that must stay, however few shall be left."""
    num_rows = teacher.architecture.config.vocab_size
    return needed_tokens(read_tokenizer(teacher), num_rows, _asked(teacher, settings))


def trimmed_teacher(
    teacher: Checkpoint, settings: VocabularySettings, data: DataSettings
) -> Checkpoint:
    """A teacher with only the rows that some text needs most, made now or found in the cache.

    Args:
        teacher: its checkpoint; what is returned if the whole vocabulary is left.
        settings: how many rows are left, and which in any case.
        data: the text, in whose training split tokens are counted.

    Raises:
        UserError: as `check_trims`, or the text does not read.
    """
    if settings.size in (0, teacher.architecture.config.vocab_size):
        return teacher
    key = {
        "teacher": teacher.hash,
        "tokenizer": tokenizer_hash(teacher.folder),
        "settings": asdict(settings),
        "text": counted_text(data),
    }

    def make(folder: Path) -> None:
        counts = token_counts(teacher, data, settings.sample_characters)
        kept = rows_to_keep(teacher, settings, counts)
        (folder / "teacher").mkdir()
        write_trimmed(teacher, kept, folder / "teacher")

    return remembered(
        "trimmed", VERSION, key, make, lambda folder: Checkpoint.open(folder / "teacher")
    )


def rows_to_keep(
    teacher: Checkpoint, settings: VocabularySettings, counts: Int[np.ndarray, " rows"]
) -> list[int]:
    """The ids that are left, in ascending order, by how often each row is used in some text.

    Raises:
        UserError: as `kept_tokens`.
    """
    tokenizer = read_tokenizer(teacher)
    return kept_tokens(tokenizer, counts, settings.size, _asked(teacher, settings))


def counted_text(data: DataSettings) -> list[Any]:
    """All that the choice of documents depends on in which tokens are counted."""
    keys = ("text_column", "document_separator", *FRACTIONS, "seed")
    return [
        [inputs_of(find_corpus(part.source)), [getattr(part, key) for key in keys]]
        for part in parts_of(data)
    ]


def token_counts(
    teacher: Checkpoint, data: DataSettings, num_characters: int
) -> Int[np.ndarray, " rows"]:
    """How often each row of a teacher's embedding is used in a sample of a text's training split.

    Args:
        num_characters: of the sample; each corpus of a mixture has its share of them.
    """
    tokenizer = load_tokenizer(teacher.folder)
    counts = np.zeros(teacher.architecture.config.vocab_size, np.int64)
    texts = samples_of(data, num_characters)
    with progress("count tokens", len(texts), "documents") as advance:
        for first in range(0, len(texts), BATCH_TEXTS):
            batch = texts[first : first + BATCH_TEXTS]
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            ids = np.concatenate([np.asarray(of_text, np.int64) for of_text in encoded])
            counts += np.bincount(ids, minlength=len(counts))[: len(counts)]
            advance(len(batch))
    return counts


def samples_of(data: DataSettings, num_characters: int, split: SplitName = "train") -> list[str]:
    """Documents from all over each corpus of a text, of about so many characters together."""
    parts, sampled = parts_of(data), list[str]()
    weights = [part.weight for part in data.mixture] or [1.0]
    for part, weight in zip(parts, weights, strict=True):
        share = max(round(num_characters * weight / sum(weights)), 1)
        sampled += sampled_texts(find_corpus(part.source), part, share, split)
    return sampled


def _asked(teacher: Checkpoint, settings: VocabularySettings) -> set[int]:
    """The ids of configs, of the chat template and of texts that the user wants kept."""
    tokenizer, needed = load_tokenizer(teacher.folder), config_ids(teacher)
    for text in (*settings.keep, *_chats(tokenizer)):
        needed |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return {id for id in needed if id < teacher.architecture.config.vocab_size}


def _chats(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the chat template makes of empty messages; nothing where it knows no such roles."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return
    for conversation in CONVERSATIONS:
        for is_asked in (False, True):
            try:
                yield tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=is_asked
                )
            except (TemplateError, ValueError):
                continue
