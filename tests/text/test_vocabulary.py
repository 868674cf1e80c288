"""A trimmed tokenizer cuts text as the whole one does, as far as its tokens go."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.vocabularies import KINDS, SPECIAL, sentences
from tokenizers import Tokenizer, models

from headstart.system.errors import UserError
from headstart.text.vocabulary import always_kept, kept_tokens, trimmed


@lru_cache
def whole_and_trimmed(kind: str, size: int | None) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """A tokenizer, the same with as few tokens, and the ids of these; the least few for None."""
    whole = KINDS[kind]()
    entries = json.loads(whole.to_str())
    counts = np.zeros(whole.get_vocab_size(), np.int64)
    for encoding in whole.encode_batch(sentences(), add_special_tokens=False):
        counts += np.bincount(encoding.ids, minlength=len(counts))
    kept = kept_tokens(entries, counts, size or len(always_kept(entries)))
    return whole, Tokenizer.from_str(json.dumps(trimmed(entries, kept))), kept


def size_of(kind: str, share: float) -> int:
    entries = json.loads(whole_and_trimmed(kind, None)[0].to_str())
    least, whole = len(always_kept(entries)), Tokenizer.from_str(json.dumps(entries))
    return round(least + share * (whole.get_vocab_size() - least))


ANY_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from([word for text in sentences(1, 20) for word in text.split()])
).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True)
@given(text=ANY_TEXT, share=st.sampled_from([0.0, 0.3, 0.7]))
def test_any_text_decodes_as_before(kind: str, text: str, share: float) -> None:
    whole, small, kept = whole_and_trimmed(kind, size_of(kind, share))
    assert small.get_vocab_size() == len(kept) == size_of(kind, share)
    ours, theirs = (
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, False)
        for tokenizer in (small, whole)
    )
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True)
@given(data=st.data(), share=st.sampled_from([0.3, 0.7]))
def test_text_of_kept_tokens_has_the_same_tokens(
    kind: str, data: st.DataObject, share: float
) -> None:
    whole, small, kept = whole_and_trimmed(kind, size_of(kind, share))
    known = set(kept)
    words = [
        word
        for word in {word for text in sentences() for word in text.split()}
        if set(whole.encode(f"a {word}", add_special_tokens=False).ids) <= known
    ]
    text = " ".join(data.draw(st.lists(st.sampled_from(sorted(words)), min_size=1)))
    theirs = whole.encode(text, add_special_tokens=False).ids
    if set(theirs) <= known:
        ours = small.encode(text, add_special_tokens=False).ids
        assert [kept[id] for id in ours] == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_vocabulary_is_the_tokenizer_itself(kind: str) -> None:
    entries = json.loads(KINDS[kind]().to_str())
    rows = Tokenizer.from_str(json.dumps(entries)).get_vocab_size()
    kept = kept_tokens(entries, np.zeros(rows, np.int64), rows)
    assert kept == list(range(rows))
    assert trimmed(entries, kept) == entries


@pytest.mark.parametrize("kind", KINDS)
def test_rarer_tokens_go_first_and_text_stays_short(kind: str) -> None:
    """Half of the tokens that may go, chosen by use, against as many chosen by chance."""
    size = size_of(kind, 0.5)
    whole, small, _ = whole_and_trimmed(kind, size)
    entries = json.loads(whole.to_str())
    by_chance = np.random.default_rng(0).integers(0, 1000, whole.get_vocab_size())
    other = Tokenizer.from_str(json.dumps(trimmed(entries, kept_tokens(entries, by_chance, size))))

    def length(tokenizer: Tokenizer) -> int:
        return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(sentences()))

    assert length(whole) <= length(small) < length(other)


def test_a_removed_token_is_counted_as_what_it_is_merged_from() -> None:
    """By hand: abc is the rarest; once it is gone, ab is needed as often as both were."""
    vocabulary = {token: id for id, token in enumerate(["a", "b", "c", "ab", "abc", "cc"])}
    model = models.BPE(vocabulary, [("a", "b"), ("ab", "c"), ("c", "c")])
    entries = json.loads(Tokenizer(model).to_str())
    counts = np.array([9, 9, 9, 1, 5, 5])
    assert kept_tokens(entries, counts, 5) == [0, 1, 2, 3, 4]  # cc and abc tie; the later id goes
    assert kept_tokens(entries, np.array([9, 9, 9, 1, 4, 5]), 5) == [0, 1, 2, 3, 5]
    assert kept_tokens(entries, np.array([9, 9, 9, 1, 3, 5]), 4) == [0, 1, 2, 5]  # ab: 1 + 3


def test_rows_without_a_token_go_before_tokens_that_no_text_uses() -> None:
    entries = json.loads(KINDS["byte-level"]().to_str())
    rows = Tokenizer.from_str(json.dumps(entries)).get_vocab_size()
    padded = np.zeros(rows + 52, np.int64)
    assert kept_tokens(entries, padded, rows + 2) == list(range(rows + 2))
    assert kept_tokens(entries, padded, rows) == list(range(rows))


def test_what_always_stays() -> None:
    entries = json.loads(KINDS["byte-level"]().to_str())
    rows = Tokenizer.from_str(json.dumps(entries)).get_vocab_size()
    ids = entries["model"]["vocab"]
    must = [max(ids.values())]  # with all that it is merged from
    kept = set(kept_tokens(entries, np.zeros(rows, np.int64), 275, must))
    assert set(must) <= kept and {ids[token] for token in SPECIAL} <= kept
    with pytest.raises(UserError, match=r"size is 40, and 259 tokens must stay: .*; use more"):
        kept_tokens(entries, np.zeros(rows, np.int64), 40)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda model: model.update(type="WordPiece"), "WordPiece"),
        (lambda model: model.update(type="WordLevel"), "WordLevel"),
        (lambda model: model.update(end_of_word_suffix="</w>"), "BPE with marks"),
    ],
)
def test_other_kinds_are_refused_by_name(change: Callable[[Any], None], kind: str) -> None:
    entries = json.loads(KINDS["byte-level"]().to_str())
    change(entries["model"])
    with pytest.raises(UserError, match=f"the tokenizer is of the kind {kind}.*leave out vocab"):
        kept_tokens(entries, np.zeros(500, np.int64), 300)


def test_older_files_write_merges_with_a_space(tmp_path: Path) -> None:
    entries = json.loads(KINDS["byte-level"]().to_str())
    rows = Tokenizer.from_str(json.dumps(entries)).get_vocab_size()
    counts = np.arange(rows)
    older = json.loads(json.dumps(entries))
    older["model"]["merges"] = [" ".join(merge) for merge in older["model"]["merges"]]
    kept = kept_tokens(entries, counts, 300)
    assert kept_tokens(older, counts, 300) == kept
    ours, theirs = (Tokenizer.from_str(json.dumps(trimmed(e, kept))) for e in (older, entries))
    assert ours.to_str() == theirs.to_str()
