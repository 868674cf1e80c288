"""Documents in, one flat file of token ids per split out: in constant memory, on all cores, and
going on where a killed process stopped.

The corpus falls into units, which are its files or the shards of a dataset on the hub. Process r of
w takes units r, r + w, r + 2w and so on; the tokenizer's own threads share the texts of one. The
tokens of all units are joined in the corpus' order, so any number of processes writes the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from headstart.system.distributed import barrier, from_main, is_main, rank, world_size
from headstart.system.errors import UserError
from headstart.system.files import write_json
from headstart.system.progress import console, progress
from headstart.text.corpus import Corpus, count_rows, texts_of, units_of
from headstart.text.settings import SPLITS, DataSettings, SplitName
from headstart.text.units import NO_COUNTS, Counts, PassedOver, UnitState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 20
BATCH_ROWS = 4096
PIECE_CHARACTERS = 1 << 18
"""Of a long document, that a tokenizer is given at once."""
BATCHES_PER_RECORD = 16
"""How often a unit's state is recorded, after which a killed process goes on."""

HELD_OUT: tuple[SplitName, ...] = ("validation", "search", "test")


@dataclass(frozen=True)
class Tokenisation:
    """A corpus on its way into SPLIT.bin of every split.

    Attributes:
        corpus: What to read.
        folder: To write into; the same work goes on there.
        settings: Which split a document belongs to, and where reading stops.
        tokenizer: Its end-of-sequence token is put after every document.
        dtype: Of the token ids on disk.
        begin: The token that every document and every block begins with, or none.
    """

    corpus: Corpus
    folder: Path
    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    dtype: np.dtype[Any]
    begin: int | None = None

    def run(self) -> dict[str, Any]:
        """Write the files, going on with what lies in the folder.

        Every process must call it; those of torchrun share the units.

        Returns:
            "splits", the counts; and all that `PassedOver` has.

        Raises:
            UserError: As `texts_of`; where others of a folder hold text, only if `strict`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        num_units = units_of(self.corpus)
        mine = range(rank(), num_units, world_size())
        with progress("tokenise", count_rows(self.corpus, mine), "documents") as advance:
            for unit, state in self._needed(num_units):
                if unit in mine:
                    self._tokenise_unit(unit, state, advance)
        barrier()
        states = from_main(lambda: self._joined(num_units))
        splits = {
            name: {key: sum(state.counts[name][key] for state in states) for key in NO_COUNTS}
            for name in SPLITS
        }
        for name, count in splits.items():
            num_bytes = (self.folder / f"{name}.bin").stat().st_size
            count["packed_tokens"] = num_bytes // self.dtype.itemsize
        passed_over = PassedOver.of(self.corpus, states)
        if not any(count["documents"] for count in splits.values()):
            for state in states:
                if state.fault:
                    raise UserError(state.fault)
        if is_main():
            for sentence in passed_over.sentences(self.settings.text_column):
                console.print(sentence, highlight=False)
        return {"splits": splits, **asdict(passed_over)}

    def _tokenise_unit(self, unit: int, state: UnitState, advance: Callable[..., None]) -> None:
        if state.is_done:
            advance(state.rows)
            return
        advance(state.rows, "resumed" if state.rows else None)
        corrupt, without_column = list[str](), list[str]()  # since the last batch
        texts = texts_of(
            self.corpus,
            unit,
            self.settings.text_column,
            self.settings.document_separator,
            state.rows,
            on_corrupt=None if self.settings.strict else corrupt.append,
            on_missing=without_column.append,
        )
        if self.corpus.folder and not self.settings.strict:
            texts = _until_fault(texts, state)
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for name in SPLITS:
                path = self._unit_file(unit, name)
                path.touch()
                files[name] = stack.enter_context(path.open("r+b"))
                files[name].truncate(state.counts[name]["tokens"] * self.dtype.itemsize)
                files[name].seek(0, 2)
            # While one batch is in the tokenizer's threads, the next one is read.
            encoder = stack.enter_context(ThreadPoolExecutor(1))
            waiting: deque[
                tuple[int, tuple[list[str], list[str]], list[str], Future[list[np.ndarray]]]
            ] = deque()

            def finish() -> None:
                num_rows, passed_over, batch, encoded = waiting.popleft()
                self._write(batch, encoded.result(), files, state.counts)
                state.rows += num_rows
                state.pass_over(*passed_over)
                advance(num_rows)

            def record() -> None:
                for file in files.values():
                    file.flush()
                write_json(self._unit_file(unit, "json"), vars(state))

            for number, (num_rows, batch) in enumerate(_batches(texts), 1):
                encoded = encoder.submit(self._encode, batch)
                waiting.append((num_rows, (corrupt.copy(), without_column.copy()), batch, encoded))
                corrupt.clear()
                without_column.clear()
                if len(waiting) > 1:
                    finish()
                if number % BATCHES_PER_RECORD == 0:
                    record()
                if self._is_enough(state.counts["train"]["tokens"]):
                    break
            while waiting:
                finish()
            state.is_done = True
            record()

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

    def _write(
        self,
        batch: list[str],
        encoded: list[np.ndarray],
        files: dict[str, BinaryIO],
        counts: Counts,
    ) -> None:
        tokens: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
        end = np.array([self.tokenizer.eos_token_id], self.dtype)
        begin = np.array([] if self.begin is None else [self.begin], self.dtype)
        for text, token_ids in zip(batch, encoded, strict=True):
            name = split_of(text, self.settings)
            tokens[name] += (begin, token_ids, end)
            count = counts[name]
            count["documents"] += 1
            count["text_bytes"] += len(text.encode())
            count["tokens"] += len(begin) + len(token_ids) + 1
        for split, pieces in tokens.items():
            files[split].write(b"".join(piece.tobytes() for piece in pieces))

    def _is_enough(self, train_tokens: int) -> bool:
        return 0 < self.settings.max_tokens <= train_tokens

    def _unit_file(self, unit: int, kind: str) -> Path:
        return self.folder / (f"unit-{unit:05d}.{kind}" + ("" if kind == "json" else ".part"))

    def _state(self, unit: int) -> UnitState:
        try:
            return UnitState(**json.loads(self._unit_file(unit, "json").read_text()))
        except FileNotFoundError:
            return UnitState({name: NO_COUNTS.copy() for name in SPLITS})

    def _needed(self, num_units: int) -> Iterator[tuple[int, UnitState]]:
        """The units, in order, with their states as they are now, until finished ones before them
        hold `max_tokens` already."""
        tokens, all_done = 0, True
        for unit in range(num_units):
            if all_done and self._is_enough(tokens):
                return
            state = self._state(unit)
            yield unit, state
            tokens += state.counts["train"]["tokens"]
            all_done = all_done and state.is_done

    def _joined(self, num_units: int) -> list[UnitState]:
        """Put the units' tokens one after another. The parts stay, for a kill in between.

        Returns:
            The states of the units that were needed.
        """
        states = [state for _, state in self._needed(num_units)]
        assert all(state.is_done for state in states)
        for name in SPLITS:
            parts = [self._unit_file(unit, name) for unit in range(len(states))]
            with (self.folder / f"{name}.bin").open("wb") as whole:
                if self.begin is not None:
                    for block in self._begun_blocks(parts, self.begin):
                        whole.write(block.tobytes())
                    continue
                for part in parts:
                    with part.open("rb") as stream:
                        shutil.copyfileobj(stream, whole, 1 << 20)
        return states

    def _begun_blocks(self, parts: list[Path], begin: int) -> Iterator[np.ndarray]:
        """The tokens of some files one after another, in blocks that all begin with one token."""
        length, rest = self.settings.block_length, np.array([], self.dtype)
        for part in parts:
            with part.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    rest, place = np.concatenate([rest, np.frombuffer(piece, self.dtype)]), 0
                    while len(rest) - place >= length:
                        taken = length if rest[place] == begin else length - 1
                        block = rest[place : place + taken]
                        yield block if taken == length else np.insert(block, 0, begin)
                        place += taken
                    rest = rest[place:]


def split_of(text: str, settings: DataSettings) -> SplitName:
    """The split a document belongs to by the settings' fractions and seed, whatever else there is.

    A hash of its text decides.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(settings.seed).encode())
    place = int.from_bytes(digest.digest(), "big") / 2**64
    for name in HELD_OUT:
        place -= getattr(settings, f"{name}_fraction")
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


def _until_fault(texts: Iterator[str], state: UnitState) -> Iterator[str]:
    """The texts until one does not read; the state then says why."""
    try:
        yield from texts
    except UserError as error:
        state.fault = str(error)


def _batches(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Rows read and the documents among them, of about `BATCH_CHARACTERS` together."""
    batch, num_rows, num_characters = list[str](), 0, 0
    for text in texts:
        num_rows += 1
        if text:
            batch.append(text)
            num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS or num_rows == BATCH_ROWS:
            yield num_rows, batch
            batch, num_rows, num_characters = [], 0, 0
    if num_rows:
        yield num_rows, batch


def remove_parts(folder: Path) -> None:
    """Delete the units' files, which nothing needs once the whole is kept."""
    # A record without its tokens would be believed; tokens without a record are not.
    for kind in ("json", "part"):
        for path in folder.glob(f"unit-*.{kind}"):
            path.unlink()
