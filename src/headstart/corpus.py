"""Where the text comes from: local files of several formats, or a dataset on the hub, streamed."""

import bz2
import glob
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi

from headstart.assets import content_hash

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READABLE = ".txt, .jsonl, .json (also with .gz, .bz2 or .xz after it) or .parquet"

# "name" or "owner/name". It may end like "v1.5"; only letters after the last dot mean a file.
HUB_ID = re.compile(r"(?!.*\.[A-Za-z]+$)\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Corpus:
    """Where the documents are: local files in a fixed order, or a pinned dataset on the hub."""

    source: str
    files: tuple[Path, ...] = ()
    revision: str = ""


def find_corpus(source: str) -> Corpus:
    """Find what a source names.

    Args:
        source: A file, a folder of files (read recursively, in sorted order; hidden files and
            unknown suffixes are passed over), or the id of a dataset on the hub.

    Raises:
        ValueError: It does not exist, or holds no readable file or an empty one.
    """
    if not source:
        raise ValueError("data.source is empty: give a file, a folder or a dataset id")
    path = Path(source).expanduser()
    if path.is_dir():
        names = sorted((file.relative_to(path) for file in path.rglob("*")), key=Path.as_posix)
        visible = [name for name in names if not any(part[0] == "." for part in name.parts)]
        files = [path / name for name in visible if _builder(name) and (path / name).is_file()]
        if not files:
            raise ValueError(f"the folder {source} holds no file that ends in {READABLE}")
    elif path.is_file():
        if not _builder(path):
            raise ValueError(f"{source} has an unknown suffix: give a file that ends in {READABLE}")
        files = [path]
    elif HUB_ID.fullmatch(source):
        return Corpus(source, revision=_hub_revision(source))
    else:
        raise ValueError(f"{source} does not exist: give a file, a folder or a dataset id")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"the file {file} is empty: remove it or fetch it again")
    return Corpus(source, tuple(files))


def count_rows(corpus: Corpus) -> int | None:
    """How many rows the files hold, for a progress bar; None where counting is not cheap.

    Parquet files say it, and a .jsonl file has one a line; other sources would have to be parsed.
    """
    try:
        counts = [_rows_in(file) for file in corpus.files]
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException):
        return None  # reading the file will say what is wrong with it
    known = [count for count in counts if count is not None]
    return sum(known) or None if len(known) == len(counts) else None


def _rows_in(file: Path) -> int | None:
    if file.suffix.lower() == ".parquet":
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    if ".jsonl" not in file.name.lower():
        return None
    opener: Any = OPENERS.get(file.suffix.lower(), open)
    with opener(file, "rb") as stream:
        pieces = iter(lambda: stream.read(1 << 20), b"")
        num_lines: int = sum(piece.count(b"\n") for piece in pieces)
    return num_lines


def _hub_revision(dataset_id: str) -> str:
    """The commit that "main" is now, so that what is read is what the fingerprint names."""
    try:
        return str(HfApi().dataset_info(dataset_id, timeout=30).sha)
    except Exception as error:
        raise ValueError(
            f"{dataset_id} is no local file or folder, and the hub gives no dataset of that name "
            f"({first_line(error)}): check the name and the network"
        ) from error


def _builder(path: Path) -> str | None:
    """The datasets builder that reads a file, by its suffix."""
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    builder = BUILDERS.get(plain.suffix.lower())
    # A parquet file compresses its columns itself and is read out of order: no .gz around it.
    return None if builder == "parquet" and plain != path else builder


def inputs_of(corpus: Corpus) -> list[dict[str, Any]]:
    """What identifies the content that is read, in its order."""
    if not corpus.files:
        return [{"name": corpus.source, "revision": corpus.revision}]
    return [
        {
            "name": file.name,
            "size_bytes": file.stat().st_size,
            "blake2b": content_hash(file, "blake2b"),
        }
        for file in corpus.files
    ]


def _rows(corpus: Corpus, file: Path | None, text_column: str) -> Iterator[dict[str, Any]]:
    """Stream the rows of one file, or of the hub's dataset when there is no file."""
    try:
        if file is None:
            stream = datasets.load_dataset(
                corpus.source, revision=corpus.revision, split="train", streaming=True
            )
        else:
            builder = _builder(file)
            options = {"sample_by": "paragraph"} if builder == "text" else {}
            # One file at a time, so an error names its file and columns may differ between files.
            name = glob.escape(str(file))
            stream = datasets.load_dataset(
                builder, data_files=[name], split="train", streaming=True, **options
            )
        if text_column in (stream.column_names or ()):
            stream = stream.select_columns([text_column])
        yield from stream
    except StopIteration:  # what load_dataset raises for a compressed file with nothing in it
        return
    except Exception as error:
        where = f"{file or corpus.source}{_bad_line(file)}"
        raise ValueError(f"cannot read {where}: {first_line(error)}; mend or remove it") from error


def _bad_line(file: Path | None) -> str:
    """Name the first line of a .jsonl file that is not JSON, which the reader does not."""
    if file is None or ".jsonl" not in file.name.lower():
        return ""
    opener: Any = OPENERS.get(file.suffix.lower(), open)
    number = 0
    try:
        with opener(file, "rb") as lines:
            for line in lines:
                number += 1
                json.loads(line if line.strip() else "null")
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error):
        return f", line {number}" if number else ""
    return ""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def texts_of(corpus: Corpus, text_column: str) -> Iterator[str]:
    """Every document that holds text.

    Args:
        corpus: What to read.
        text_column: The column that holds the text; a .txt file has none.

    Raises:
        ValueError: A file is corrupt, lacks the column, or holds something else in it.
    """
    for file in corpus.files or (None,):
        is_plain = file is not None and _builder(file) == "text"
        column = "text" if is_plain else text_column
        for row in _rows(corpus, file, column):
            if column not in row:
                raise ValueError(
                    f"{file or corpus.source} has no column {column!r}: set data.text_column to "
                    f"one of {', '.join(row)}"
                )
            text = row[column] or ""  # an absent text is an empty one
            if not isinstance(text, str):
                raise ValueError(
                    f"{file or corpus.source} holds {type(text).__name__}, not text, in its "
                    f"column {column!r}: set data.text_column to a column of text"
                )
            if is_plain:
                # The reader leaves odd newlines at a document's ends, and a byte order mark.
                text = text.strip("\ufeff\n")
            if text and not text.isspace():
                yield text
