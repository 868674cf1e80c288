"""Some documents from all over a corpus, for what needs no more than a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from headstart.text.corpus import Corpus, texts_of, units_of
from headstart.text.settings import DataSettings, SplitName
from headstart.text.tokenise import split_of

READ_TIMES = 32
"""How much of a file is read for what is taken of it, at most."""


def sampled_texts(
    corpus: Corpus, settings: DataSettings, num_characters: int, split: SplitName = "train"
) -> list[str]:
    """Documents of a split, about so many characters, in the corpus' order.

    Every file has an equal share, from all over its first `READ_TIMES` shares. Longer documents
    are cut to the share.

    Raises:
        UserError: as `texts_of`.
    """
    num_units = units_of(corpus)
    share = max(num_characters // num_units, 1)
    sampled = list[str]()
    for unit in range(num_units):
        texts = texts_of(
            corpus, unit, settings.text_column, settings.document_separator,
            on_corrupt=None if settings.strict else _pass_over,
        )  # fmt: skip
        sampled += _thinned(
            (text for text in texts if text and split_of(text, settings) == split), share
        )
    return sampled


def _pass_over(corrupt_line: str) -> None:
    """Whoever tokenises the whole text counts corrupt lines."""


def _thinned(texts: Iterable[str], num_characters: int) -> list[str]:
    """Every n-th text; n doubles whenever those taken so far have too many characters."""
    taken, every, num_taken = list[str](), 1, 0
    for number, text in enumerate(_beginning(texts, READ_TIMES * num_characters)):
        if number % every == 0:
            taken.append(text[:num_characters])
            num_taken += len(taken[-1])
        while num_taken > num_characters and len(taken) > 1:
            taken, every = taken[::2], 2 * every
            num_taken = sum(map(len, taken))
    return taken


def _beginning(texts: Iterable[str], num_characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        num_characters -= len(text)
        if num_characters <= 0:
            return
