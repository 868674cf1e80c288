"""Local files of text: which of a folder are read, how each is opened, and lines of JSON."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard

from headstart.system.errors import UserError


def _open_zst(file: Path, mode: str, **options: Any) -> Any:
    """As `gzip.open`; zstandard's own reader has no lines."""
    stream = io.BufferedReader(zstandard.open(file, "rb"))
    return io.TextIOWrapper(stream, **options) if "t" in mode else stream


BUILDERS = {
    ".txt": "plain", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
"""Suffix -> what reads such a file: a builder of datasets, or "plain" for our own reader."""
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
COLUMNS_COMPRESSED = ("parquet", "arrow")
"""These are read out of order: no .gz around them."""
READABLE = ".txt, .jsonl, .json (also with .gz, .bz2, .xz or .zst after it), .parquet or .arrow"
NAMED_FILES = 3
"""How many files of a kind a message names."""
LFS_POINTER = b"version https://git-lfs"


def builder_of(path: Path) -> str | None:
    """What reads a file, by its suffix."""
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    builder = BUILDERS.get(plain.suffix.lower())
    return None if builder in COLUMNS_COMPRESSED and plain != path else builder


def is_plain_text(file: Path) -> bool:
    """Whether a file is a .txt file, compressed or not."""
    return builder_of(file) == "plain"


def is_json_lines(file: Path) -> bool:
    """Whether a file is a .jsonl file, compressed or not."""
    return ".jsonl" in "".join(file.suffixes[-2:]).lower()


def opened(file: Path, mode: str, **options: Any) -> Any:
    """A file, unpacked while it is read."""
    opener: Any = OPENERS.get(file.suffix.lower(), open)
    return opener(file, mode, **options)


def files_of(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder that hold text, in a fixed order, and why others are left out.

    They are found recursively. What `datasets` saved by save_to_disk is read by its own list of
    files; of several splits, "train".

    Returns:
        The files; and name -> reason of every other file that is not hidden.
    """
    if (folder / "dataset_dict.json").is_file():
        folder = folder / "train"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        entries = json.loads((folder / "state.json").read_text())["_data_files"]
        return [folder / entry["filename"] for entry in entries], {}
    files, left_out = list[Path](), dict[str, str]()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        if not path.is_file():
            left_out[str(name)] = "no file"
        elif builder_of(path) is None:
            left_out[str(name)] = "unknown suffix"
        elif path.stat().st_size == 0:
            left_out[str(name)] = "empty"
        else:
            files.append(path)
    return files, left_out


def some_of(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are.

    >>> some_of("abcde")
    'a, b, c and 2 more'
    """
    every = list(names)
    more = len(every) - NAMED_FILES
    return ", ".join(every[:NAMED_FILES]) + (f" and {more:,} more" if more > 0 else "")


def kinds_of(files: Iterable[Path]) -> str:
    """How many files of each suffix there are; plain text, which may be a README, by name."""
    every = list(files)
    counts = Counter("".join(file.suffixes[-1 - is_compressed(file) :]) for file in every)
    texts = {file.name for file in every if is_plain_text(file)}
    named = f" ({some_of(sorted(texts))})" if texts and len(counts) > 1 else ""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common()) + named


def is_packed(file: Path) -> bool:
    """Whether a file is compressed as a whole, or in itself as .parquet is."""
    return is_compressed(file) or file.suffix.lower() == ".parquet"


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in OPENERS


def json_lines(
    file: Path, skip_rows: int, on_corrupt: Callable[[str], None] | None
) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one for each line; datasets gives up at a corrupt one."""
    with opened(file, "rb") as lines:
        for number, line in enumerate(islice(lines, skip_rows, None), skip_rows + 1):
            row, reason = _row_of(line)
            if reason and on_corrupt is None:
                raise UserError(f"cannot read {file}, line {number}: {reason}; mend or remove it")
            if reason and on_corrupt is not None:
                on_corrupt(f"{file}, line {number}: {reason}")
            yield row


def _row_of(line: bytes) -> tuple[dict[str, Any], str]:
    """The object that a line of JSON is; or an empty one, and what the line is instead."""
    try:
        row = json.loads(line) if line.strip() else {}
        if isinstance(row, dict):
            return row, ""
        return {}, f"{type(row).__name__} is no JSON object"
    except UnicodeDecodeError as error:
        return {}, f"no UTF-8 ({error.reason} at byte {error.start}); write the file anew in UTF-8"
    except (ValueError, RecursionError) as error:
        start = line.strip()
        if start.startswith(LFS_POINTER):
            return {}, "a pointer of Git LFS instead of text; fetch the file by git lfs pull"
        if start.startswith(b"<"):
            return {}, "no JSON but HTML or XML, such as a page that says what went wrong"
        if start in (b"[", b"{"):
            return {}, "one JSON value over several lines; name the file .json"
        return {}, str(error).splitlines()[0]
