"""Documents and a tokenizer simple enough to prepare text by hand."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headstart.text.settings import DataSettings
from headstart.text.tokenise import split_of

EOS = 1
NUM_WORDS = 300
DOCUMENTS = [
    " ".join(f"w{random.Random(n * 1000 + i).randrange(NUM_WORDS)}" for i in range(3 + n % 40))
    for n in range(200)
]
SETTINGS = DataSettings(
    block_length=8,
    validation_fraction=0.2,
    search_fraction=0.1,
    seed=3,
    document_separator="blank_line",
)


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
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(jsonl.encode()))
    elif name == "saved":
        datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(path, num_shards=3)
        (path / "cache-1234.arrow").write_bytes((path / "data-00000-of-00003.arrow").read_bytes())
    elif name == "saved splits":
        whole = datasets.Dataset.from_dict({"text": DOCUMENTS})
        splits = {"train": whole, "test": whole.select(range(3))}
        datasets.DatasetDict(splits).save_to_disk(path)
    elif name.endswith(".parquet"):
        table = pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
        pyarrow.parquet.write_table(table, path, row_group_size=32)
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    else:
        path.write_text(plain if name.endswith(".txt") else jsonl)
    return path
