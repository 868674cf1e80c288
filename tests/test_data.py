"""What is prepared equals what a naive tokenisation gives, and mistakes are told in a sentence."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headstart import corpus as corpus_module
from headstart import tokenise as tokenise_module
from headstart.data import SPLITS, BlockDataset, DataSettings, MixtureSource, split_of
from headstart.prepare import check_source, prepare

EOS = 1
NUM_WORDS = 300
DOCUMENTS = [
    " ".join(f"w{random.Random(n * 1000 + i).randrange(NUM_WORDS)}" for i in range(3 + n % 40))
    for n in range(200)
]
SETTINGS = DataSettings(block_length=8, validation_fraction=0.2, search_fraction=0.1, seed=3)


def save_tokenizer(folder: Path, num_words: int = NUM_WORDS, **special: str) -> Path:
    """A tokenizer simple enough to do by hand: word "w7" has id 9."""
    vocabulary = {"<unk>": 0, "</s>": EOS} | {f"w{n}": n + 2 for n in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def encode_by_hand(text: str) -> list[int]:
    return [int(word[1:]) + 2 for word in text.split()]


def blocks_by_hand(documents: list[str], name: str, settings: DataSettings) -> np.ndarray:
    tokens: list[int] = []
    for text in documents:
        if split_of(text, settings) == name:
            tokens += [*encode_by_hand(text), EOS]
    num_blocks = len(tokens) // settings.block_length
    whole = tokens[: num_blocks * settings.block_length]
    return np.array(whole).reshape(num_blocks, settings.block_length)


def as_jsonl(documents: list[str], column: str = "text") -> str:
    return "".join(json.dumps({column: text}) + "\n" for text in documents)


def refuse(*_: object, **__: object) -> None:
    raise InterruptedError("the tokenizer was called")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="</s>")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(as_jsonl(DOCUMENTS))
    return path


def write_source(folder: Path, name: str) -> Path:
    path = folder / name
    plain, jsonl = "\n\n".join(DOCUMENTS), as_jsonl(DOCUMENTS)
    if name == "folder":
        path.mkdir()
        (path / "b.jsonl").write_text(as_jsonl(DOCUMENTS[50:120]))
        (path / "a.txt").write_text("\n\n".join(DOCUMENTS[:50]))
        (path / "c").mkdir()
        (path / "c" / "a.jsonl.gz").write_bytes(gzip.compress(as_jsonl(DOCUMENTS[120:]).encode()))
        (path / "README.md").write_text("not data")
        (path / ".hidden.txt").write_text("w1 w2")
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress((plain if ".txt" in name else jsonl).encode()))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(jsonl.encode()))
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(plain.encode()))
    elif name.endswith(".parquet"):
        table = pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
        pyarrow.parquet.write_table(table, path, row_group_size=32)
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    else:
        path.write_text(plain if name.endswith(".txt") else jsonl)
    return path


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
        "a.json",
        "a.parquet",
        "folder",
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


def test_manifest_says_what_went_in(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    assert json.loads((prepared.folder / "manifest.json").read_text()) == prepared.manifest
    assert prepared.manifest["fingerprint"] == prepared.folder.name
    assert prepared.manifest["settings"]["source"] == str(corpus)
    assert prepared.manifest["dtype"] == "uint16"
    assert prepared.manifest["inputs"][0]["name"] == "corpus.jsonl"
    for name in SPLITS:
        texts = [text for text in DOCUMENTS if split_of(text, settings) == name]
        num_tokens = sum(len(text.split()) + 1 for text in texts)
        assert prepared.manifest["splits"][name] == {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "tokens": num_tokens,
            "blocks": num_tokens // settings.block_length,
        }


def test_windows_text_with_blank_runs_and_byte_order_mark(tmp_path: Path, tokenizer: Path) -> None:
    for number, packed in enumerate((bytes, gzip.compress)):
        path = tmp_path / f"windows{number}.txt{'.gz' if number else ''}"
        content = "\ufeff" + "\r\n\r\n\r\n".join(DOCUMENTS) + "\r\n"
        path.write_bytes(packed(content.encode()))
        settings = replace(SETTINGS, source=str(path))
        prepared = prepare(settings, tokenizer, tmp_path / "cache")
        expected = blocks_by_hand(DOCUMENTS, "train", settings)
        np.testing.assert_array_equal(prepared.split("train"), expected)


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


def test_copies_of_a_document_share_one_split(tmp_path: Path, tokenizer: Path) -> None:
    marked = [f"w{n} {text}" for n, text in enumerate(DOCUMENTS)]
    path = tmp_path / "copies.jsonl"
    path.write_text(as_jsonl(marked + marked[::-1]))
    prepared = prepare(replace(SETTINGS, source=str(path)), tokenizer, tmp_path / "cache")
    seen: dict[str, set[str]] = {}
    for name in SPLITS:
        words = " ".join(
            f"w{token - 2}" if token != EOS else "|" for token in prepared.split(name).flat
        )
        seen[name] = {text.strip() for text in words.split("|")} & set(marked)
        assert seen[name]
    assert not seen["train"] & seen["search"]
    assert not seen["train"] & seen["validation"]
    assert not seen["search"] & seen["validation"]


def test_split_shares_seed_and_stability() -> None:
    settings = DataSettings(validation_fraction=0.2, search_fraction=0.1)
    texts = [f"document {n}" for n in range(5000)]
    names = [split_of(text, settings) for text in texts]
    assert names.count("validation") / 5000 == pytest.approx(0.2, abs=0.02)
    assert names.count("search") / 5000 == pytest.approx(0.1, abs=0.02)
    reseeded = [split_of(text, replace(settings, seed=1)) for text in texts]
    assert 0.3 < np.mean([a != b for a, b in zip(names, reseeded, strict=True)]) < 0.6
    # Written down: another platform or version must not move a document into another split.
    assert names[:7] == [
        "train",
        "validation",
        "search",
        "train",
        "train",
        "validation",
        "train",
    ]


def test_a_second_call_does_no_work(
    tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    first = prepare(settings, tokenizer, tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
    second = prepare(settings, tokenizer, tmp_path / "cache")
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    # The same content in another place is the same corpus.
    (tmp_path / "new").mkdir()
    moved = corpus.rename(tmp_path / "new" / corpus.name)
    third = prepare(replace(settings, source=str(moved)), tokenizer, tmp_path / "cache")
    assert third.folder == first.folder


def test_changed_content_settings_or_tokenizer_prepare_anew(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    folders = {prepare(settings, tokenizer, tmp_path / "cache").folder}
    other = save_tokenizer(tmp_path / "other", NUM_WORDS + 1, eos_token="</s>")
    folders.add(prepare(settings, other, tmp_path / "cache").folder)
    folders.add(prepare(replace(settings, seed=9), tokenizer, tmp_path / "cache").folder)
    size_bytes = corpus.stat().st_size
    corpus.write_text(corpus.read_text().replace("w11 ", "w12 "))
    assert corpus.stat().st_size == size_bytes
    changed = prepare(settings, tokenizer, tmp_path / "cache")
    folders.add(changed.folder)
    assert len(folders) == 4
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = blocks_by_hand(documents, "train", settings)
    np.testing.assert_array_equal(changed.split("train"), expected)


@pytest.mark.parametrize("name", ["train.bin", "manifest.json"])
def test_a_truncated_file_is_made_again(
    name: str, tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    folder = prepare(settings, tokenizer, tmp_path / "cache").folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2])
    prepare(settings, tokenizer, tmp_path / "cache")
    assert (folder / name).read_bytes() == whole


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "folder"])
def test_a_killed_preparation_goes_on(
    name: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 20)
    monkeypatch.setattr(tokenise_module, "BATCHES_PER_RECORD", 2)
    whole_call, texts = PreTrainedTokenizerFast.__call__, []

    def die_after_120(self: object, batch: list[str], **options: object) -> object:
        texts.extend(batch)
        return refuse() if len(texts) > 120 else whole_call(self, batch, **options)

    settings = replace(SETTINGS, source=str(write_source(tmp_path, name)))
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(PreTrainedTokenizerFast, "__call__", die_after_120)
        prepare(settings, tokenizer, tmp_path / "cache")
    (unfinished,) = (tmp_path / "cache").iterdir()
    for record in unfinished.glob("unit-*.json"):
        if not json.loads(record.read_text())["is_done"]:
            for part in unfinished.glob(f"{record.stem}.*.part"):
                part.write_bytes(part.read_bytes() + b"junk")  # written after the last record
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
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [prepared.folder.name]
    assert {path.suffix for path in prepared.folder.iterdir()} == {".bin", ".json"}


def test_two_processes_write_the_bytes_of_one(tmp_path: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(write_source(tmp_path, "folder")))
    alone = prepare(settings, tokenizer, tmp_path / "alone")
    code = (
        "import sys; from pathlib import Path; from headstart.data import DataSettings\n"
        "from headstart.distributed import process_group; from headstart.prepare import prepare\n"
        "with process_group():\n"
        f"    blocks = prepare({settings!r}, {str(tokenizer)!r}, Path(sys.argv[1]))\n"
        "    assert (blocks.folder / 'manifest.json').is_file()\n"
    )
    (tmp_path / "work.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(tmp_path / "work.py")]
    subprocess.run([*command, str(tmp_path / "shared")], check=True, timeout=300)
    (shared,) = (tmp_path / "shared").iterdir()
    assert {path.name for path in shared.iterdir()} == {p.name for p in alone.folder.iterdir()}
    for path in alone.folder.iterdir():
        assert (shared / path.name).read_bytes() == path.read_bytes()


def test_a_mixture_has_the_shares_that_were_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_jsonl(DOCUMENTS[:150]))
    (tmp_path / "b.jsonl").write_text(as_jsonl(DOCUMENTS[150:], "body"))
    sources = (
        MixtureSource(str(tmp_path / "a.jsonl"), 1.0),
        MixtureSource(str(tmp_path / "b.jsonl"), 3.0, "body"),
    )
    mixed = prepare(replace(SETTINGS, mixture=sources), tokenizer, tmp_path / "cache")
    parts = [
        prepare(
            replace(SETTINGS, source=one.source, text_column=one.text_column or "text"),
            tokenizer,
            tmp_path / "cache",
        )
        for one in sources
    ]
    for name in SPLITS:
        blocks = mixed.split(name)
        found = [tuple(block) for block in blocks]
        assert len(found) == mixed.manifest["splits"][name]["blocks"] == len(blocks)
        rows = [[tuple(block) for block in part.split(name)] for part in parts]
        from_second = np.isin(range(len(found)), [i for i, b in enumerate(found) if b in rows[1]])
        assert from_second.mean() == pytest.approx(0.75, abs=1 / len(found))
        if name == "train":
            assert set(found) == set(rows[0]) | set(rows[1])
            assert max(found.count(block) for block in rows[0]) == 1
            for stretch in range(0, len(found) - 40, 40):
                assert 28 <= from_second[stretch : stretch + 40].sum() <= 32
        else:
            assert len(set(found)) == len(found)
        np.testing.assert_array_equal(blocks[2:5], [blocks[2], blocks[3], blocks[4]])
        assert blocks.size == len(blocks) * SETTINGS.block_length
    again = prepare(replace(SETTINGS, mixture=sources), tokenizer, tmp_path / "cache")
    assert again == mixed
    other = (sources[0], replace(sources[1], weight=2.0))
    changed = prepare(replace(SETTINGS, mixture=other), tokenizer, tmp_path / "cache")
    assert changed.fingerprint != mixed.fingerprint


def test_reading_stops_at_the_tokens_asked_for(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 10)
    for name in ("a.jsonl", "folder"):
        settings = replace(SETTINGS, source=str(write_source(tmp_path, name)), max_tokens=500)
        prepared = prepare(settings, tokenizer, tmp_path / "cache")
        counts = prepared.manifest["splits"]
        assert counts["train"]["tokens"] == 500
        assert sum(count["documents"] for count in counts.values()) < 80
        expected = blocks_by_hand(DOCUMENTS, "train", settings)[: 500 // SETTINGS.block_length]
        np.testing.assert_array_equal(prepared.split("train"), expected)


def test_documents_are_apart_where_that_is_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_jsonl(DOCUMENTS))
    settings = replace(SETTINGS, source=str(tmp_path / "a.jsonl"), separate_documents=True)
    blocks = prepare(settings, tokenizer, tmp_path / "cache")
    joined = prepare(replace(settings, separate_documents=False), tokenizer, tmp_path / "cache")
    assert blocks.folder == joined.folder
    assert blocks.fingerprint != joined.fingerprint
    assert joined.separator is None
    dataset = BlockDataset(blocks.split("train"), separator=blocks.separator)
    for item in dataset:
        position = 0
        for token, found in zip(item["input_ids"], item["position_ids"], strict=True):
            assert found == position
            position = 0 if token == EOS else position + 1


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    def prepared_dtype(num_words: int) -> np.dtype:
        documents = [f"w{num_words - 1} {text}" for text in DOCUMENTS]
        path = tmp_path / f"{num_words}.jsonl"
        path.write_text(as_jsonl(documents))
        tokenizer = save_tokenizer(tmp_path / str(num_words), num_words, eos_token="</s>")
        settings = replace(SETTINGS, source=str(path))
        blocks = prepare(settings, tokenizer, tmp_path / "cache").split("train")
        np.testing.assert_array_equal(blocks, blocks_by_hand(documents, "train", settings))
        return blocks.dtype

    assert prepared_dtype(2**16 - 2) == np.uint16  # the largest id is 65535
    assert prepared_dtype(2**16 - 1) == np.uint32


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


def test_block_dataset_gives_int64_ids_and_equal_labels(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    blocks = prepare(replace(SETTINGS, source=str(corpus)), tokenizer, tmp_path / "cache").split(
        "train"
    )
    dataset = BlockDataset(blocks)
    assert len(dataset) == len(blocks)
    assert dataset[5]["input_ids"].dtype == torch.int64
    assert torch.equal(dataset[5]["input_ids"], dataset[5]["labels"])
    assert dataset[5]["input_ids"].tolist() == blocks[5].tolist()
    assert len(BlockDataset(blocks, 4)) == 4
    batch = next(iter(torch.utils.data.DataLoader(BlockDataset(blocks, 4), batch_size=4)))
    assert batch["labels"].shape == (4, SETTINGS.block_length)
    with pytest.raises(ValueError, match=f"num_blocks is 100000 but the split holds {len(blocks)}"):
        BlockDataset(blocks, 100_000)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockDataset(blocks, 0)


def test_the_default_cache_follows_the_environment(
    tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "root"))
    prepared = prepare(replace(SETTINGS, source=str(corpus)), tokenizer)
    assert prepared.folder.parent == tmp_path / "root" / "data"
    with pytest.raises(ValueError, match="no split 'test': choose one of train, search, validat"):
        prepared.split("test")  # type: ignore[arg-type]


def test_a_hub_dataset_is_read_at_the_revision_it_is_known_by(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Hub:
        def dataset_info(self, dataset_id: str, timeout: float) -> object:
            return type("Info", (), {"sha": f"commit of {dataset_id}"})

    def load_dataset(name: str, **options: object) -> datasets.IterableDataset:
        asked.append((name, options))
        return datasets.IterableDataset.from_generator(lambda: ({"body": t} for t in DOCUMENTS))

    monkeypatch.setattr(corpus_module, "HfApi", Hub)
    monkeypatch.setattr(corpus_module.datasets, "load_dataset", load_dataset)
    settings = replace(SETTINGS, source="owner/name-v1.5", text_column="body")
    prepared = prepare(settings, tokenizer, tmp_path / "cache")
    pinned = {"revision": "commit of owner/name-v1.5", "split": "train", "streaming": True}
    assert asked[-1] == ("owner/name-v1.5", pinned)
    expected = blocks_by_hand(DOCUMENTS, "train", settings)
    np.testing.assert_array_equal(prepared.split("train"), expected)


def test_an_unknown_hub_dataset_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def dataset_info(self, dataset_id: str, timeout: float) -> object:
            raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(corpus_module, "HfApi", Hub)
    with pytest.raises(ValueError, match=r"owner/name is no local file .*\(offline\): check the n"):
        check_source(DataSettings(source="owner/name"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ""}, "data.source is empty: give a file"),
        ({"source": "absent.jsonl"}, "absent.jsonl does not exist: give a file, a folder or"),
        ({"source": "a/b/c"}, "a/b/c does not exist"),
        ({"source": "/nowhere"}, "/nowhere does not exist"),
        ({"validation_fraction": 0.0}, "data.validation_fraction is 0.0: give a number between 0"),
        ({"search_fraction": 1.0}, "data.search_fraction is 1.0: give a number between 0 and 1"),
        (
            {"search_fraction": 0.5, "validation_fraction": 0.6},
            "add up to 1.1, which leaves nothing to train on: make their sum less than 1",
        ),
        ({"max_tokens": -1}, "data.max_tokens is -1: give 0 for all, or more"),
        ({"mixture": (MixtureSource("a.jsonl", 1.0),)}, "names others: remove one of them"),
        ({"block_length": 7}, "data.block_length is 7 tokens: give at least 8"),
        ({"text_column": "body"}, "has no column 'body': set data.text_column to one of text"),
    ],
)
def test_settings_out_of_range_are_told(
    change: dict[str, object], message: str, corpus: Path
) -> None:
    settings = replace(replace(SETTINGS, source=str(corpus)), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_source(settings)


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
        ("a.jsonl", b'{"text": \n', r"a.jsonl holds no text"),
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
    with pytest.raises(ValueError, match=r"the folder .* holds no file that ends in \.txt, \.json"):
        check_source(replace(SETTINGS, source=str(tmp_path)))
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"b.txt is empty"):
        check_source(replace(SETTINGS, source=str(tmp_path)))


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
    said = " ".join(capsys.readouterr().err.split())
    assert "passed over 3 corrupt lines" in said
    assert "data.strict" in said
    strict = replace(settings, strict=True)
    check_source(strict)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}, line 41: .*; mend or remove it"):
        prepare(strict, tokenizer, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [prepared.folder.name]


def test_a_split_without_a_block_is_told(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    settings = replace(SETTINGS, source=str(corpus), block_length=2048)
    message = (
        r"the search split got \d+ tokens, less than one block of 2048: give more text, a larger "
        r"data.search_fraction or a smaller data.block_length"
    )
    with pytest.raises(ValueError, match=message):
        prepare(settings, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizers_without_an_end_or_a_file_are_told(tmp_path: Path, corpus: Path) -> None:
    settings = replace(SETTINGS, source=str(corpus))
    endless = save_tokenizer(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"endless has no end-of-sequence token .*: set eos_token"):
        prepare(settings, endless, tmp_path / "cache")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer loads from .*nothing \(.*\): give a check"):
        prepare(settings, tmp_path / "nothing", tmp_path / "cache")


def test_rows_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    lines = [{"text": f"document {number}"} for number in range(7)]
    plain = tmp_path / "a.jsonl"
    plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines[:3]), table)
    count = corpus_module.count_rows
    assert [count(corpus_module.Corpus("", (file,)), [0]) for file in (plain, packed, table)] == [
        7,
        7,
        3,
    ]
    assert count(corpus_module.Corpus("", (plain, packed, table)), range(3)) == 17
    assert count(corpus_module.Corpus("", (tmp_path / "d.txt",)), [0]) is None
    assert count(corpus_module.Corpus("org/name", revision="main"), [0]) is None
