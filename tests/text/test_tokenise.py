"""Tokens are those of the tokenizer, however often the work is broken off and shared."""

import errno
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from tests.text.documents import (
    DOCUMENTS,
    EOS,
    SETTINGS,
    as_jsonl,
    blocks_by_hand,
    encode_by_hand,
    refuse,
    save_tokenizer,
    write_source,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headstart.text import corpus as corpus_module
from headstart.text import tokenise as tokenise_module
from headstart.text.prepare import check_source, prepare
from headstart.text.settings import SPLITS
from headstart.text.tokenise import split_of


def test_byte_level_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: n for n, character in enumerate([*alphabet, "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.save_pretrained(tmp_path / "bytes")
    documents = [f"naïve café {n}\nline two" for n in range(100)]
    path = tmp_path / "accents.jsonl"
    path.write_text(as_jsonl(documents))
    settings = replace(SETTINGS, source=str(path))
    blocks = prepare(settings, tmp_path / "bytes", tmp_path / "cache").split("search")
    chosen = [text for text in documents if split_of(text, settings) == "search"]
    joined = "".join(text + "</s>" for text in chosen)
    decoded = fast.decode(blocks.flatten().tolist(), errors="ignore").rstrip("\ufffd")
    assert len(decoded) > 50
    assert joined.startswith(decoded)


def test_text_that_spells_the_end_token_does_not_become_it(tmp_path: Path) -> None:
    """Byte by byte, whatever the tokenizer makes of its special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: n for n, character in enumerate([*alphabet, "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(
        tmp_path / "bytes"
    )
    documents = [f"document {n} says </s> and goes on" for n in range(100)]
    path = tmp_path / "spelled.jsonl"
    path.write_text(as_jsonl(documents))
    settings = replace(SETTINGS, source=str(path))
    prepared = prepare(settings, tmp_path / "bytes", tmp_path / "cache")
    chosen = [text for text in documents if split_of(text, settings) == "train"]
    by_byte = {byte: vocabulary[letter] for letter, byte in _bytes_of_alphabet().items()}
    expected = [
        token for text in chosen for token in [*(by_byte[b] for b in text.encode()), len(alphabet)]
    ]
    tokens = np.asarray(prepared.split("train")).flatten().tolist()
    assert len(tokens) > 1000 and tokens == expected[: len(tokens)]


def _bytes_of_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in GPT-2's alphabet: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def test_documents_and_blocks_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer", eos_token="</s>", bos_token="<unk>")
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    begin = fast.bos_token_id
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", begin)]
    )
    fast.save_pretrained(folder)
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "folder")))
    prepared = prepare(settings, folder, tmp_path / "cache")
    for split in SPLITS:
        blocks = np.asarray(prepared.split(split)).tolist()
        assert len(blocks) > 3 and all(block[0] == begin for block in blocks)
        stream = [
            token
            for text in DOCUMENTS
            if split_of(text, settings) == split
            for token in [begin, *encode_by_hand(text), EOS]
        ]
        while blocks:  # by one token after another
            block = blocks.pop(0)
            expected = stream[:8] if stream[0] == begin else [begin, *stream[:7]]
            assert block == expected
            stream = stream[8 if stream[0] == begin else 7 :]
        assert len(stream) < 8


def test_long_documents_are_tokenised_in_pieces(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "PIECE_CHARACTERS", 16)
    monkeypatch.setattr(tokenise_module, "BATCH_CHARACTERS", 64)
    given: list[int] = []
    whole_call = PreTrainedTokenizerFast.__call__

    def watch(self: object, batch: list[str], **options: object) -> object:
        given.append(sum(map(len, batch)))
        return whole_call(self, batch, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watch)
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "a.jsonl")))
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    assert max(given) < 64 + 16
    for split in SPLITS:
        expected = blocks_by_hand(DOCUMENTS, split, settings)
        np.testing.assert_array_equal(prepared.split(split), expected)


@pytest.mark.parametrize("text", ["", "word", "a line\n" * 9, "a " * 30, "x" * 50, "  \n  " * 12])
def test_pieces_are_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise_module, "PIECE_CHARACTERS", 16)
    pieces = tokenise_module.pieces_of(text)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 16 for piece in pieces[:-1])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "folder"])
def test_a_killed_preparation_goes_on(
    name: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 20)
    whole_call, texts = PreTrainedTokenizerFast.__call__, []

    def die_after_120(self: object, batch: list[str], **options: object) -> object:
        texts.extend(batch)
        return refuse() if len(texts) > 120 else whole_call(self, batch, **options)

    settings = replace(SETTINGS, source=str(write_source(tmp_path, name)))
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(PreTrainedTokenizerFast, "__call__", die_after_120)
        prepare(settings, tokenizer, tmp_path / "cache")
    for unit in (tmp_path / "cache" / "units").iterdir():
        if "fault" not in (unit / "batches.jsonl").read_text():
            for file in unit.iterdir():  # written after the last batch
                file.write_bytes(file.read_bytes() + b'{"rows": 7')
    seen: list[str] = []

    def watch(self: object, batch: list[str], **options: object) -> object:
        seen.extend(batch)
        return whole_call(self, batch, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watch)
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    assert 80 <= len(seen) < 140, "it began anew"
    for split in SPLITS:
        expected = blocks_by_hand(DOCUMENTS, split, settings)
        np.testing.assert_array_equal(prepared.split(split), expected)
    assert names_in(tmp_path / "cache") == {prepared.folder.name, "units", ".locks"}
    assert {path.suffix for path in prepared.folder.iterdir()} == {".bin", ".json"}


class ReadTimeout(Exception):
    """As network libraries have it: no OSError, and no ValueError."""


FAILURES = [ReadTimeout("no answer"), OSError(errno.EIO, "Input/output error")]


@pytest.mark.parametrize("failure", FAILURES, ids=["of-the-hub", "of-the-disk"])
def test_a_read_that_fails_loses_nothing_and_the_same_command_goes_on(
    failure: Exception, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 20)
    fails = True

    def rows(texts: list[str]) -> Iterator[dict[str, str]]:
        for number, text in enumerate(texts):
            if fails and number == 130:
                raise failure
            yield {"text": text}

    source = str(write_source(tmp_path, "a.jsonl"))
    if isinstance(failure, ReadTimeout):
        source = "owner/name"
        stream = datasets.IterableDataset.from_generator(lambda: rows(DOCUMENTS))
        monkeypatch.setattr(corpus_module, "dataset_commit", lambda name: "a commit")
        monkeypatch.setattr(corpus_module, "_hub_stream", lambda corpus: stream)
    else:
        read = corpus_module.json_lines
        monkeypatch.setattr(
            corpus_module,
            "json_lines",
            lambda file, skip, on_corrupt: (
                row
                for number, row in enumerate(read(file, skip, on_corrupt), skip)
                if not (fails and number == 130 and throw(failure))
            ),
        )
    settings = replace(SETTINGS, source=source)
    with pytest.raises(OSError, match=f"reading .* failed .*{failure.args[-1]}.* is kept"):
        prepare(settings, tokenizer, tmp_path / "cache")
    (unit,) = (tmp_path / "cache" / "units").iterdir()
    batches = [json.loads(line) for line in (unit / "batches.jsonl").read_text().splitlines()]
    num_read = sum(batch["rows"] for batch in batches)
    assert 80 <= num_read <= 130

    fails = False
    seen: list[str] = []
    whole_call = PreTrainedTokenizerFast.__call__

    def watch(self: object, batch: list[str], **options: object) -> object:
        seen.extend(batch)
        return whole_call(self, batch, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watch)
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    assert len(seen) == len(DOCUMENTS) - num_read
    for split in SPLITS:
        expected = blocks_by_hand(DOCUMENTS, split, settings)
        np.testing.assert_array_equal(prepared.split(split), expected)


def throw(failure: Exception) -> bool:
    raise failure


@pytest.mark.exhaustive
def test_two_processes_write_the_bytes_of_one(tmp_path: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "folder")))
    alone = prepare(settings, tokenizer, tmp_path / "alone")
    code = (
        "import sys; from pathlib import Path; from headstart.text.settings import DataSettings\n"
        "from headstart.system.distributed import process_group\n"
        "from headstart.text.prepare import prepare\n"
        "with process_group():\n"
        f"    blocks = prepare({settings!r}, {str(tokenizer)!r}, Path(sys.argv[1]))\n"
        "    assert (blocks.folder / 'manifest.json').is_file()\n"
    )
    (tmp_path / "work.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(tmp_path / "work.py")]
    subprocess.run([*command, str(tmp_path / "shared")], check=True, timeout=300)
    (shared,) = (path.parent for path in (tmp_path / "shared").glob("*/manifest.json"))
    assert {path.name for path in shared.iterdir()} == {p.name for p in alone.folder.iterdir()}
    for path in alone.folder.iterdir():
        assert (shared / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_corrupt_lines_are_counted_or_named(
    name: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = as_jsonl(DOCUMENTS).encode().splitlines()
    for place, junk in ((40, b'{"text": "w1"'), (90, b"[1]"), (91, b'{"text": "\xff"}')):
        lines.insert(place, junk)
    content = b"\n".join(lines) + b"\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    settings = replace(SETTINGS, source=str(path))
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    expected = blocks_by_hand(DOCUMENTS, "train", settings)
    np.testing.assert_array_equal(prepared.split("train"), expected)
    assert prepared.manifest["corrupt_lines"] == 3
    assert f"{name}, line 41: " in prepared.manifest["first_corrupt"]
    told = " ".join(capsys.readouterr().err.split())
    assert "passed over 3 corrupt lines" in told
    assert "data.strict" in told
    strict = replace(settings, strict=True)
    check_source(strict)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}, line 41: .*; mend or remove it"):
        prepare(strict, tokenizer, tmp_path / "cache")
    assert names_in(tmp_path / "cache") == {prepared.folder.name, "units", ".locks"}


def test_batches_are_small_beside_what_was_read_before() -> None:
    sizes = [tokenise_module.batch_characters(number) for number in range(90)]
    assert sizes[0] == 1 << 14 and sizes[-1] == 1 << 20
    assert all(size <= sum(sizes[:number]) / 8 for number, size in enumerate(sizes) if number > 12)
