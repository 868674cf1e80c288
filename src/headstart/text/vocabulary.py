"""Which tokens of a vocabulary to keep, and the tokenizer that has no others.

A tokenizer is read as what `tokenizer.json` holds, whose layout the tokenizers library defines.
Byte-level BPE, BPE with byte fallback, and Unigram are known.
"""

from __future__ import annotations

import copy
import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int

from headstart.system.errors import UserError

PADDING_COUNT = -1
"""Of rows that no token has: they go before any token does."""
SPACE = "▁"
"""What stands for a space in tokens; as bytes it would not be read as one again."""


def kept_tokens(
    tokenizer: Mapping[str, Any],
    counts: Int[np.ndarray, " rows"],
    size: int,
    always: Collection[int] = (),
) -> list[int]:
    """The ids to keep, so that a text is cut into as few more tokens as can be.

    Rows without a token go first. Then the rarest token goes, again and again, of those that no
    other is merged from; what it was merged from is counted more often from then on. So every
    token that is left can still be merged.

    Args:
        tokenizer: what its tokenizer.json holds.
        counts: how often each row is used in some text.
        size: how many ids to keep; at most as many as there are rows.
        always: ids that stay, beside special tokens, bytes and their like.

    Returns:
        Ids in ascending order; their places are the new ids.

    Raises:
        UserError: the tokenizer is of another kind, or more ids must stay than `size`.
    """
    ids, parents = _ids(tokenizer), _parents(tokenizer)
    stays = needed_tokens(tokenizer, len(counts), always)
    check_size(size, stays)
    used_by = Counter(part for parts in parents.values() for part in parts)
    uses = np.where(np.isin(np.arange(len(counts)), list(ids.values())), counts, PADDING_COUNT)
    heap = [
        (uses[row], -row)  # of equally rare ones the last goes first
        for row in range(len(counts))
        if row not in stays and not used_by[row]
    ]
    heapq.heapify(heap)
    removed = set[int]()
    while len(counts) - len(removed) > size:
        row = -heapq.heappop(heap)[1]
        removed.add(row)
        for part in parents.get(row, ()):
            uses[part] += uses[row]
            used_by[part] -= 1
            if not used_by[part] and part not in stays:
                heapq.heappush(heap, (uses[part], -part))
    return [row for row in range(len(counts)) if row not in removed]


def check_size(size: int, needed: Collection[int]) -> None:
    """Raise a UserError if more tokens are needed than shall be left."""
    if size < len(needed):
        raise UserError(
            f"vocabulary.size is {size}, and {len(needed)} tokens must stay: bytes, special "
            "tokens, those of the chat template, of vocabulary.keep, and what these are merged "
            "from; use more"
        )


def needed_tokens(
    tokenizer: Mapping[str, Any], num_rows: int, always: Collection[int] = ()
) -> set[int]:
    """The ids that must stay, with all that they are merged from; arguments as `kept_tokens`."""
    parents = _parents(tokenizer)
    waiting, found = always_kept(tokenizer) | set(always), set[int]()
    while waiting:
        found.add(id := waiting.pop())
        waiting |= set(parents.get(id, ())) - found
    return {id for id in found if id < num_rows}  # a model may have no row for some


def always_kept(tokenizer: Mapping[str, Any]) -> set[int]:
    """The ids without which a text could not be encoded, or would lose its special tokens."""
    model, ids = tokenizer["model"], _ids(tokenizer)
    kept = {entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    processor = tokenizer.get("post_processor")
    kept |= {id for listed in _special_ids(processor) for id in listed}
    kept |= {id for _, id in _special_pairs(processor)}
    if model.get("byte_fallback"):
        needed = (SPACE, *(f"<0x{number:02X}>" for number in range(256)))
        kept |= {ids[token] for token in needed if token in ids}
    elif _is_byte_level(tokenizer):
        from tokenizers import pre_tokenizers

        kept |= {ids[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in ids}
    else:
        kept |= {id for token, id in ids.items() if len(token) == 1}
    unknown = model.get("unk_id") if model["type"] == "Unigram" else ids.get(model["unk_token"])
    return kept | ({unknown} if unknown is not None else set())


def trimmed(tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """What tokenizer.json holds once only some ids are left, which are numbered anew in order.

    Args:
        tokenizer: what the whole one's holds.
        kept: ids in ascending order, from `kept_tokens`.
    """
    places = {id: place for place, id in enumerate(kept)}
    result: dict[str, Any] = copy.deepcopy(dict(tokenizer))
    model = result["model"]
    if model["type"] == "Unigram":
        pieces = model["vocab"]
        model["vocab"] = [piece for id, piece in enumerate(pieces) if id in places]
        if model.get("unk_id") is not None:
            model["unk_id"] = places[model["unk_id"]]
    else:
        left = {token: places[id] for token, id in model["vocab"].items() if id in places}
        model["vocab"] = dict(sorted(left.items(), key=lambda entry: entry[1]))
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(part in left for part in (*_pair(merge), "".join(_pair(merge))))
        ]
    added = result.get("added_tokens") or ()
    result["added_tokens"] = [
        {**entry, "id": places[entry["id"]]} for entry in added if entry["id"] in places
    ]  # a model may have no row for some
    for ids in _special_ids(result.get("post_processor")):
        ids[:] = [places[id] for id in ids]
    for pair in _special_pairs(result.get("post_processor")):
        pair[1] = places[pair[1]]
    if padding := result.get("padding"):
        padding["pad_id"] = places.get(padding["pad_id"], padding["pad_id"])
    return result


def check_kind(tokenizer: Mapping[str, Any]) -> None:
    """Raise a UserError if the tokenizer is of a kind whose tokens cannot be removed."""
    model = tokenizer["model"]
    kind = str(model.get("type"))
    if kind == "BPE" and (
        model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    ):
        kind = "BPE with marks inside or at the end of words"
    if kind not in ("BPE", "Unigram"):
        raise UserError(
            f"the tokenizer is of the kind {kind}, and only BPE and Unigram vocabularies can be "
            "trimmed; leave out vocabulary"
        )


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, added ones included."""
    check_kind(tokenizer)
    vocabulary = tokenizer["model"]["vocab"]
    if tokenizer["model"]["type"] == "Unigram":
        vocabulary = {piece: id for id, (piece, _) in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _parents(tokenizer: Mapping[str, Any]) -> dict[int, list[int]]:
    """The id of every token that is merged from two -> the ids of these two."""
    ids = _ids(tokenizer)
    return {ids[token]: [ids[part] for part in parts] for token, parts in _merged(tokenizer)}


def _merged(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str]]]:
    """Every token that is merged from two, with these two.

    Within a text, a token's characters are merged just as if they stood alone: no merge crosses
    its ends, or it would not be a token of that text.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        return
    ranks = {tuple(_pair(merge)): rank for rank, merge in enumerate(model["merges"])}
    ways = Counter("".join(pair) for pair in ranks)
    only = {"".join(pair): pair for pair in ranks}
    for token in model["vocab"]:
        if ways[token] == 1:
            yield token, only[token]
        elif ways[token] and (pair := _last_merge(token, ranks)):
            yield token, pair


def _last_merge(token: str, ranks: Mapping[tuple[str, ...], int]) -> Sequence[str]:
    """The two that a token's characters are merged to before it; empty if they are never one."""
    parts = list(token)
    while len(parts) > 2:
        ranked = [
            (rank, place)
            for place, pair in enumerate(pairwise(parts))
            if (rank := ranks.get(pair)) is not None
        ]
        if not ranked:
            return ()
        _, place = min(ranked)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return parts if tuple(parts) in ranks else ()


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    """The two sides of a merge, which older files write with a space between them."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    def has(part: Any) -> bool:
        if isinstance(part, list):
            return any(map(has, part))
        return isinstance(part, dict) and (
            part.get("type") == "ByteLevel" or any(map(has, part.values()))
        )

    return has(tokenizer.get("pre_tokenizer")) or has(tokenizer.get("decoder"))


def _special_ids(processor: Any) -> Iterator[list[int]]:
    """The lists of ids that a post-processor puts around a text."""
    for part in _processors(processor):
        for special in (part.get("special_tokens") or {}).values():
            yield special["ids"]


def _special_pairs(processor: Any) -> Iterator[list[Any]]:
    """[token, id] of the post-processors of BERT and RoBERTa."""
    for part in _processors(processor):
        yield from (part[key] for key in ("sep", "cls") if key in part)


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    if processor:
        yield processor
        for part in processor.get("processors") or ():
            yield from _processors(part)
