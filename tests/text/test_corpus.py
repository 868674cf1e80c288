"""Every source gives the same documents, and what cannot be read is told in a sentence."""

import gzip
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from tests.text.documents import DOCUMENTS, SETTINGS, as_jsonl, blocks_by_hand, write_source

from headstart.system.errors import UserError
from headstart.text import corpus as corpus_module
from headstart.text import plain as plain_module
from headstart.text.prepare import check_source, prepare
from headstart.text.settings import SPLITS, DataSettings
from headstart.text.units import PassedOver, Taken


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "odd [name] *.txt",
        "a.txt.gz",
        "a.txt.xz",
        "a.jsonl",
        "A.JSONL",
        "a.jsonl.gz",
        "a.jsonl.bz2",
        "a.jsonl.zst",
        "a.json",
        "a.parquet",
        "folder",
        "saved",
        "saved splits",
    ],
)
def test_every_format_gives_the_blocks_of_a_naive_tokenisation(
    name: str, tmp_path: Path, tokenizer: Path
) -> None:
    settings = replace(SETTINGS, source=str(write_source(tmp_path, name)))
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    for split in SPLITS:
        expected = blocks_by_hand(DOCUMENTS, split, settings)
        assert len(expected) > 3
        np.testing.assert_array_equal(prepared.split(split), expected)


def test_windows_text_with_blank_runs_and_byte_order_mark(tmp_path: Path, tokenizer: Path) -> None:
    for number, packed in enumerate((bytes, gzip.compress)):
        path = tmp_path / f"windows{number}.txt{'.gz' if number else ''}"
        content = "\ufeff" + "\r\n\r\n\r\n".join(DOCUMENTS) + "\r\n"
        path.write_bytes(packed(content.encode()))
        settings = replace(SETTINGS, source=str(path))
        prepared = prepare(settings, tokenizer, tmp_path / "cache")
        expected = blocks_by_hand(DOCUMENTS, "train", settings)
        np.testing.assert_array_equal(prepared.split("train"), expected)


def documents_in(path: Path, separator: str, tokenizer: Path) -> int:
    """How many documents a file is, by the manifest."""
    settings = replace(SETTINGS, source=str(path), document_separator=separator)
    prepared = prepare(settings, tokenizer, path.parent / "cache")
    return sum(count["documents"] for count in prepared.manifest["splits"].values())


def test_a_book_is_one_document_and_lands_in_one_split(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    books = ["\n\n".join(DOCUMENTS[first : first + 5]) for first in range(0, 200, 5)]
    for number, book in enumerate(books):
        (folder / f"{number:02}.txt").write_text(f"{book}\n")
    settings = replace(SETTINGS, source=str(folder), document_separator="")
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    for split in SPLITS:
        expected = blocks_by_hand(books, split, settings)
        np.testing.assert_array_equal(prepared.split(split), expected)


@pytest.mark.parametrize(
    ("separator", "between"),
    [
        ("blank_line", "\n\n"),
        ("blank_line", "\n  \t\n \n"),
        ("blank_line", "\r\n\r\n\r\n"),
        ("line", "\n"),
        ("line", "\r\n"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("<|endoftext|>", "\n<|endoftext|>\n"),
        ("----", "\n----\n"),
    ],
)
def test_a_separator_ends_documents(
    separator: str, between: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_module, "READ_CHARACTERS", 7)  # cuts through every separator
    path = tmp_path / "many.txt"
    path.write_text(between.join(DOCUMENTS) + between, newline="")
    settings = replace(SETTINGS, source=str(path), document_separator=separator)
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    for split in SPLITS:
        expected = blocks_by_hand(DOCUMENTS, split, settings)
        np.testing.assert_array_equal(prepared.split(split), expected)


def test_one_document_is_too_little_for_three_splits(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    with pytest.raises(UserError, match=r"split got 0 tokens.* data.document_separator \(a .txt"):
        documents_in(path, "", tokenizer)
    assert documents_in(path, "blank_line", tokenizer) == len(DOCUMENTS)


def test_a_document_too_long_for_a_tokenizer_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_module, "READ_CHARACTERS", 64)
    monkeypatch.setattr(plain_module, "MAX_DOCUMENT_CHARACTERS", 1000)
    path = tmp_path / "dump.txt"
    path.write_text("<|end|>".join(DOCUMENTS))
    with pytest.raises(
        UserError, match=r"dump.txt has a document of more than 1,000 characters, as"
    ):
        documents_in(path, "", tokenizer)
    with pytest.raises(UserError, match=r"as 'blank_line' ends one; set data.document_separator"):
        documents_in(path, "blank_line", tokenizer)
    assert documents_in(path, "<|end|>", tokenizer) == len(DOCUMENTS)


def test_lines_of_one_paragraph_are_one_document(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "verse.txt"
    path.write_text("\n\n".join(text.replace(" ", "\n") for text in DOCUMENTS))
    prepared = prepare(replace(SETTINGS, source=str(path)), tokenizer, tmp_path / "cache")
    counts = prepared.manifest["splits"].values()
    assert sum(count["documents"] for count in counts) == len(DOCUMENTS)


def test_empty_and_absent_documents_are_skipped(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    gaps = ['{"text": ""}', '{"text": null}', '{"text": " \\n"}', '{"other": 1}']
    path.write_text("\n".join(gaps) + "\n" + as_jsonl(DOCUMENTS))
    settings = replace(SETTINGS, source=str(path))
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    expected = blocks_by_hand(DOCUMENTS, "train", settings)
    np.testing.assert_array_equal(prepared.split("train"), expected)


def test_a_hub_dataset_is_read_at_the_revision_it_is_known_by(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[object] = []

    class Hub:
        def dataset_info(self, dataset_id: str, revision: object, timeout: float) -> object:
            return type("Info", (), {"sha": f"commit of {dataset_id}"})

    def load_dataset(name: str, **options: object) -> datasets.IterableDataset:
        requests.append((name, options))
        return datasets.IterableDataset.from_generator(lambda: ({"body": t} for t in DOCUMENTS))

    monkeypatch.setattr(corpus_module, "HfApi", Hub)
    monkeypatch.setattr(corpus_module.datasets, "load_dataset", load_dataset)
    settings = replace(SETTINGS, source="owner/name-v1.5", text_column="body")
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    pinned = {"revision": "commit of owner/name-v1.5", "split": "train", "streaming": True}
    assert requests[-1] == ("owner/name-v1.5", pinned)
    expected = blocks_by_hand(DOCUMENTS, "train", settings)
    np.testing.assert_array_equal(prepared.split("train"), expected)


def test_a_commit_that_a_hub_dataset_has_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Revision of '{name}' doesn't exist")

    monkeypatch.setattr(corpus_module.datasets, "load_dataset", load_dataset)
    corpus = corpus_module.find_corpus(f"owner/name@{'9' * 40}")
    with pytest.raises(UserError, match=r"no dataset owner/name@9+ \(Revision .*check its name"):
        corpus_module.units_of(corpus)


def test_an_unknown_hub_dataset_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def dataset_info(self, dataset_id: str, revision: object, timeout: float) -> object:
            raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(corpus_module, "HfApi", Hub)
    with pytest.raises(ValueError, match=r"owner/name is no local file .*\(offline\): check the n"):
        check_source(DataSettings(source="owner/name"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nw1\n", r"a.csv has an unknown suffix: give a file that ends in .txt, "),
        ("a.parquet.gz", b"x", "a.parquet.gz has an unknown suffix"),
        ("suffixless", b"x", "suffixless has an unknown suffix"),
        ("a.txt", b"", r"a.txt is empty: remove it or fetch it again"),
        ("a.txt", b"\n\n \n\n", r"a.txt holds no text: every document is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a.jsonl.gz holds no text"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl holds int, not text, in its column 'text'"),
        ("a.jsonl", b'{"id": 1, "body": "w1"}\n', r"set data.text_column to one of id, body"),
        ("a.jsonl", b'{"text": \n', r"no text: 1 lines are corrupt, the first in .*line 1: Expect"),
        ("a.jsonl", b"[\n 3\n]", r"line 1: one JSON value over several lines; name the file .json"),
        ("a.jsonl", b"<html>\n", r"line 1: no JSON but HTML or XML"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"fetch .* by git lfs pull"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"line 1: no UTF-8 \(.* at byte 13\); write"),
        ("a.jsonl.zst", b"x", r"cannot read .*a.jsonl.zst: "),
        ("a.jsonl.gz", b'{"text": "w1"}\n', r"cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.parquet", b"no parquet", r"cannot read .*a.parquet: .*; mend or remove it"),
        ("a.txt", b"caf\xe9", r"cannot read .*a.txt: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_unreadable_sources_are_told(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_source(replace(SETTINGS, source=str(tmp_path / name)))


def test_folders_without_data_are_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "b.txt").write_text("")
    message = r"the folder .* holds no file with text .*README.md \(unknown suffix\), b.txt \(empty"
    with pytest.raises(UserError, match=message):
        check_source(replace(SETTINGS, source=str(tmp_path)))


FAULTS = {
    "cut.jsonl.gz": gzip.compress(as_jsonl(DOCUMENTS).encode(), mtime=0)[:900],
    "latin.txt": b"caf\xe9",
    "half.parquet": b"PAR1 and no more",
    "numbers.jsonl": b'{"text": 3}\n',
    "other.jsonl": b'{"body": "w1"}\n',
}
"""Files of which a folder's others can do without, and what the summary says of them."""
LEFT_OUT = {"archive.zip": b"PK", "empty.jsonl": b"", "notes.md": b"# notes", "page.html": b"<p>"}


def mixed_folder(folder: Path, strict: bool = False) -> DataSettings:
    """Forty files: good ones with the documents among them, and one of each fault."""
    folder.mkdir()
    names = [f"part-{number:02}.jsonl" for number in range(28)] + ["a/same.jsonl", "b/same.jsonl"]
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for number, name in enumerate(sorted(names)):
        (folder / name).write_text(as_jsonl(DOCUMENTS[number :: len(names)]))
    with (folder / "part-00.jsonl").open("a") as stream:
        stream.write('{"id": 1}\n{"text": \n')
    (folder / "README.txt").write_text("w1 w2 w3")
    for name, content in {**FAULTS, **LEFT_OUT}.items():
        (folder / name).write_bytes(content)
    assert sum(path.is_file() for path in folder.rglob("*")) == 40
    return replace(SETTINGS, source=str(folder), strict=strict)


def test_every_file_of_a_mixed_folder_is_accounted_for(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = mixed_folder(tmp_path / "mixed [folder]")
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    manifest = prepared.manifest
    assert manifest["faults"].keys() == FAULTS.keys()
    assert manifest["left_out"].keys() == LEFT_OUT.keys()
    assert (manifest["corrupt_lines"], manifest["rows_without_column"]) == (1, 2)
    cut = zlib.decompressobj(wbits=31).decompress(FAULTS["cut.jsonl.gz"])
    counts = manifest["splits"].values()
    num_documents = sum(count["documents"] for count in counts)
    assert num_documents == len(DOCUMENTS) + 1 + cut.count(b"\n")
    words = " ".join(capsys.readouterr().err.split())
    kinds = "32 .jsonl, 2 .txt, 1 .jsonl.gz, 1 .parquet (README.txt, latin.txt)"
    assert f"files that were read: 36 ({kinds}); left out: 4, archive.zip" in words
    assert "archive.zip (unknown suffix), empty.jsonl (empty), notes.md (unknown" in words
    assert "README.txt" in words and "not read to their end: 5, cannot read" in words
    assert "passed over 1 corrupt lines" in words and "2 rows without a column 'text'" in words


def test_a_strict_reader_refuses_the_first_fault(tmp_path: Path, tokenizer: Path) -> None:
    settings = mixed_folder(tmp_path / "mixed", strict=True)
    with pytest.raises(UserError, match=r"cannot read .*cut.jsonl.gz"):
        prepare(settings, tokenizer, tmp_path / "cache")


def test_halves_of_characters_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "halves.jsonl"
    texts = ["whole \U0001f600", "\ud83d half", "half \ude00", "\ude00\ud83d turned"]
    path.write_text(as_jsonl(texts))
    found = list(corpus_module.texts_of(corpus_module.Corpus("", (path,)), 0, "text"))
    assert found == ["whole \U0001f600", "\ufffd half", "half \ufffd", "\ufffd\ufffd turned"]


def test_the_demos_text_is_no_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody has run `headstart demo --output demo`, a folder is called so."""
    text = tmp_path / "elsewhere.jsonl"
    text.write_text(as_jsonl(DOCUMENTS))
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus_module, "demo_corpus", lambda: text)
    corpus = corpus_module.find_corpus("demo")
    taken = {0: Taken(is_whole=True)}
    assert corpus.files == (text,) and not PassedOver.of(corpus, taken).sentences("text")
