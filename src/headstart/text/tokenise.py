"""Documents in, one flat file of token ids per split out: in constant memory, on all cores, and
going on where a killed process stopped.

The corpus falls into units, which are its files or the shards of a dataset on the hub. Each is read
as far as it is needed. The processes share the units, and the tokenizer's own threads share the
texts of one. Tokens are joined in the corpus' order, so any number of processes writes the same
bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt

from headstart.system.distributed import barrier, from_main, rank, world_size
from headstart.system.errors import UserError
from headstart.system.hashing import hash_json
from headstart.system.locks import locked
from headstart.system.memo import LOCKS
from headstart.system.progress import console, progress
from headstart.text.corpus import Corpus, texts_of, units_of
from headstart.text.needs import Needed, expected_tokens, shares_of
from headstart.text.settings import FRACTIONS, SPLITS, DataSettings, SplitName
from headstart.text.units import Batch, Taken, UnitLog, no_counts, total_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Of what is kept of a unit; raise it when the same unit would give other tokens."""
UNIT_SETTINGS = ("text_column", *FRACTIONS, "seed", "strict", "document_separator")
"""Those that decide a unit's tokens, and to which splits they go."""
BATCH_CHARACTERS, FIRST_CHARACTERS, GROWTH = 1 << 20, 1 << 14, 1.06
"""Of a unit's batches: the most, the first one's, and by how much each is larger than the last."""
BATCH_ROWS = 4096
PIECE_CHARACTERS = 1 << 18
"""Of a long document, that a tokenizer is given at once."""

HELD_OUT: tuple[SplitName, ...] = ("validation", "search", "test")


@dataclass(frozen=True)
class Tokenisation:
    """A corpus on its way into token ids.

    Attributes:
        corpus: what to read.
        cache_folder: where what was read of units is kept.
        settings: which split a document belongs to.
        tokenizer: its end-of-sequence token is put after every document.
        tokenizer_hash: of it.
        dtype: of the token ids on disk.
        inputs: what identifies the corpus' files, as `inputs_of` says.
        begin: the token that every document and every block begins with, or none.
        needed: how much has to be read; everything when None.
    """

    corpus: Corpus
    cache_folder: Path
    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    dtype: np.dtype[Any]
    inputs: Sequence[Mapping[str, Any]]
    begin: int | None = None
    needed: Needed | None = None

    def read(self) -> dict[int, Taken]:
        """Read as much of every unit as is needed, going on with what was read before.

        Every process must call it; those of torchrun share the units.

        Returns:
            What is taken of which units; of none on other processes than the main one.

        Raises:
            UserError: as `texts_of`; where others of a folder hold text, only if `strict`.
        """
        expected = expected_tokens(self.inputs, self._num_units)
        num_tokens: float = math.inf
        if self.needed is not None:
            num_tokens = self.needed.first_tokens(self.settings)
        total = num_tokens if self.corpus.dataset else min(num_tokens, sum(expected))
        with progress("tokenise", None if math.isinf(total) else total, "tokens") as advance:
            shares: dict[int, float] = {}
            taken: dict[int, Taken] = {}
            while True:
                before, shares = shares, shares_of(expected, num_tokens)
                for unit in list(shares)[rank() :: world_size()]:
                    self._read_unit(unit, shares[unit], advance, is_first=unit not in before)
                barrier()
                growth = from_main(partial(self._growth, shares, taken))
                if growth == 1:
                    return taken
                num_tokens *= growth

    def tokens(
        self, split: SplitName, taken: Mapping[int, Taken]
    ) -> Iterator[UInt[np.ndarray, " _"]]:
        """The token ids of a split, unit after unit; in whole blocks if all begin with a token."""
        pieces = chain.from_iterable(
            self._unit(unit).tokens_of(split, of_unit.num_batches)
            for unit, of_unit in taken.items()
        )
        if self.begin is None:
            return pieces
        return begun_blocks(pieces, self.begin, self.settings.block_length)

    @cached_property
    def _num_units(self) -> int:
        return units_of(self.corpus)

    def _growth(self, shares: Mapping[int, float], taken: dict[int, Taken]) -> float:
        """Take so much of each unit, and say how many times as much has to be read; 1 where there
        is enough, or no more."""
        taken.clear()
        taken |= {unit: self._unit(unit).taken(share) for unit, share in shares.items()}
        is_all = len(taken) == self._num_units and all(unit.is_whole for unit in taken.values())
        if self.needed is None or is_all:
            return 1.0
        return self.needed.growth(total_counts(taken.values()))

    def _read_unit(
        self, unit: int, num_tokens: float, advance: Callable[..., None], is_first: bool
    ) -> None:
        """Read a unit until it has given so many tokens, or ends."""
        log = self._log(unit, forgets_fault=is_first)
        if is_first and log.num_tokens:
            advance(min(log.num_tokens, num_tokens), "resumed")
        if log.is_enough(num_tokens):
            return
        with locked(self.cache_folder / LOCKS / f"unit-{log.folder.name}", on_busy=_wait):
            log = self._log(unit, forgets_fault=is_first)
            self._read_on(unit, log, num_tokens, advance)

    def _read_on(
        self, unit: int, log: UnitLog, num_tokens: float, advance: Callable[..., None]
    ) -> None:
        corrupt, without_column = list[str](), list[str]()  # since the last batch
        faults = list[str]()
        texts = texts_of(
            self.corpus,
            unit,
            self.settings.text_column,
            self.settings.document_separator,
            log.num_rows,
            has_column=log.has_column,
            on_corrupt=None if self.settings.strict else corrupt.append,
            on_missing=without_column.append,
        )
        if self.corpus.folder and not self.settings.strict:
            texts = _until_fault(texts, faults.append)
        with ExitStack() as stack:
            writer = stack.enter_context(log.appended())
            # While one batch is in the tokenizer's threads, the next one is read.
            encoder = stack.enter_context(ThreadPoolExecutor(1))
            waiting: deque[tuple[dict[str, Any], list[str], Future[list[np.ndarray]]]] = deque()

            def finish() -> None:
                passed_over, texts_in_batch, encoded = waiting.popleft()
                counts, tokens = self._sorted(texts_in_batch, encoded.result())
                batch = Batch(counts=counts, **passed_over)
                writer.add(batch, tokens)
                advance(batch.tokens)

            batches = _batches(texts, log.num_batches)
            while not log.is_enough(num_tokens):
                if waiting and _may_be_enough(log, num_tokens):
                    finish()
                    continue
                read = next(batches, None)
                if read is not None:
                    num_rows, texts_in_batch = read
                    passed_over = {
                        "rows": num_rows,
                        "corrupt_lines": len(corrupt),
                        "first_corrupt": corrupt[0] if corrupt else "",
                        "rows_without_column": len(without_column),
                        "first_without_column": without_column[0] if without_column else "",
                    }
                    corrupt.clear()
                    without_column.clear()
                    encoded = encoder.submit(self._encode, texts_in_batch)
                    waiting.append((passed_over, texts_in_batch, encoded))
                if waiting and (read is None or len(waiting) > 1):
                    finish()
                elif read is None:
                    writer.end(*faults or [""])
            while waiting:  # what is encoded already
                finish()

    def _log(self, unit: int, forgets_fault: bool = False) -> UnitLog:
        """What was read of a unit so far, by this run or others; a fault may have passed since."""
        log = self._unit(unit).read()
        if forgets_fault and log.fault:
            log.fault = None
        return log

    def _unit(self, unit: int) -> UnitLog:
        """The log of a unit, not read yet."""
        return UnitLog(self.cache_folder / "units" / self._keys[unit], self.dtype)

    @cached_property
    def _keys(self) -> list[str]:
        """What each unit's tokens are found by."""
        inputs: list[Any] = list(self.inputs)
        if self.corpus.dataset:
            inputs = [[*inputs, unit, self._num_units] for unit in range(self._num_units)]
        settings = [getattr(self.settings, key) for key in UNIT_SETTINGS]
        return [hash_json([VERSION, unit, self.tokenizer_hash, settings]) for unit in inputs]

    def _sorted(
        self, texts: list[str], encoded: list[np.ndarray]
    ) -> tuple[dict[SplitName, dict[str, int]], dict[SplitName, list[np.ndarray]]]:
        """Counts and token ids of some documents, by their splits."""
        counts = no_counts()
        tokens: dict[SplitName, list[np.ndarray]] = {name: [] for name in SPLITS}
        end = np.array([self.tokenizer.eos_token_id], self.dtype)
        begin = np.array([] if self.begin is None else [self.begin], self.dtype)
        for text, token_ids in zip(texts, encoded, strict=True):
            name = split_of(text, self.settings)
            tokens[name] += (begin, token_ids, end)
            count = counts[name]
            count["documents"] += 1
            count["text_bytes"] += len(text.encode())
            count["tokens"] += len(begin) + len(token_ids) + 1
        return counts, tokens

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of some documents; what spells the end token in them is plain text."""
        end = self.tokenizer.eos_token_id
        encoded = self._token_ids(texts)
        spelling = [place for place, ids in enumerate(encoded) if (ids == end).any()]
        again = self._token_ids([texts[place] for place in spelling], split_special_tokens=True)
        for place, ids in zip(spelling, again, strict=True):
            encoded[place] = ids
        return encoded

    def _token_ids(self, texts: list[str], **options: Any) -> list[np.ndarray]:
        """The tokens of each text, a long one in pieces, since a tokenizer takes a hundred bytes
        for each character."""
        pieces = [pieces_of(text) for text in texts]
        encoded = list[np.ndarray]()
        for group in _groups(chain.from_iterable(pieces)):
            lists = self.tokenizer(
                group,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning for a text longer than the model's context
                **options,
            )["input_ids"]
            encoded += [np.array(ids, self.dtype) for ids in lists]
        rest = iter(encoded)
        return [np.concatenate(list(islice(rest, len(of_text)))) for of_text in pieces]


def split_of(text: str, settings: DataSettings) -> SplitName:
    """The split a document belongs to by the settings' fractions and seed, whatever else there is.

    A hash of its text decides.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(settings.seed).encode())
    place = int.from_bytes(digest.digest(), "big") / 2**64
    for name in HELD_OUT:
        place -= settings.share(name)
        if place < 0:
            return name
    return "train"


def pieces_of(text: str) -> list[str]:
    """A text, cut where lines or words end if it is long, into pieces of `PIECE_CHARACTERS`."""
    pieces, start = list[str](), 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        # A space belongs to the word after it, as tokenizers have it.
        end = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start + 1, limit)
        end = end if end > start else limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _groups(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Pieces together, of about `BATCH_CHARACTERS`."""
    group, num_characters = list[str](), 0
    for piece in pieces:
        group.append(piece)
        num_characters += len(piece)
        if num_characters >= BATCH_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _until_fault(texts: Iterator[str], on_fault: Callable[[str], None]) -> Iterator[str]:
    """The texts until one does not read, which is told."""
    try:
        yield from texts
    except UserError as error:
        on_fault(str(error))


def _may_be_enough(log: UnitLog, num_tokens: float) -> bool:
    """Whether a batch that waits, which is hardly larger than the last one, may be all there is
    need of."""
    next_tokens = GROWTH * log.last_tokens if log.num_batches else math.inf
    return log.num_tokens + next_tokens >= num_tokens


def batch_characters(number: int) -> int:
    """How large a unit's batch of that number is: about a seventeenth of what comes before it, so
    that hardly more is read than is needed."""
    exponent = min(number, math.ceil(math.log(BATCH_CHARACTERS / FIRST_CHARACTERS, GROWTH)))
    return min(math.ceil(FIRST_CHARACTERS * GROWTH**exponent), BATCH_CHARACTERS)


def _batches(texts: Iterator[str], number: int) -> Iterator[tuple[int, list[str]]]:
    """Rows read and the documents among them, in batches from that number on."""
    batch, num_rows, num_characters = list[str](), 0, 0
    for text in texts:
        num_rows += 1
        if text:
            batch.append(text)
            num_characters += len(text)
        if num_characters >= batch_characters(number) or num_rows == BATCH_ROWS:
            yield num_rows, batch
            batch, num_rows, num_characters, number = [], 0, 0, number + 1
    if num_rows:
        yield num_rows, batch


def begun_blocks(
    pieces: Iterable[UInt[np.ndarray, " _"]], begin: int, block_length: int
) -> Iterator[UInt[np.ndarray, " _"]]:
    """Token ids one after another, in blocks that all begin with one token."""
    rest: list[np.ndarray] = []
    num_rest = 0
    for piece in pieces:
        rest.append(piece)
        num_rest += len(piece)
        if num_rest < block_length:
            continue
        tokens, place = np.concatenate(rest), 0
        while len(tokens) - place >= block_length:
            count = block_length if tokens[place] == begin else block_length - 1
            block = tokens[place : place + count]
            yield block if count == block_length else np.insert(block, 0, begin)
            place += count
        rest, num_rest = [tokens[place:]], len(tokens) - place


def _wait(owner: str) -> None:
    console.print(f"{owner} reads the same file; waiting for it")
