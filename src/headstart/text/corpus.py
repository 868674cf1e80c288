"""Where the text comes from: local files of several formats, or a dataset on the hub, streamed."""

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from headstart.demo import DEMO, demo_corpus
from headstart.system.errors import UserError
from headstart.system.hashing import hash_bytes
from headstart.system.hub import HubName
from headstart.text.local import (
    READABLE,
    builder_of,
    files_of,
    is_json_lines,
    is_plain_text,
    json_lines,
    opened,
    some_of,
)
from headstart.text.plain import plain_documents

BEGINNING_BYTES = 1 << 12
"""Of a file, that are read to tell it from others. A longer one is another when it has changed."""


@dataclass(frozen=True)
class Corpus:
    """Where the documents are: local files in a fixed order, or a dataset on the hub.

    Attributes:
        source: as it was given.
        files: of a local corpus.
        dataset: on the hub, at a commit.
        folder: that holds the files, of which one that cannot be read may be passed over; None
            where the source is a single file or a dataset.
        left_out: name -> reason of files in that folder that are not read.
    """

    source: str
    files: tuple[Path, ...] = ()
    dataset: HubName | None = None
    folder: Path | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def find_corpus(source: str) -> Corpus:
    """Find what a source names.

    Args:
        source: A file, a folder of files (read recursively, in sorted order; hidden files are
            passed over, empty ones and unknown suffixes left out), what datasets saved to disk, a
            dataset on the hub such as "owner/name", "owner/name:config" or
            "owner/name:config@revision", or "demo".

    Raises:
        UserError: It or its revision does not exist, or it holds no readable file, or is empty.
    """
    if not source:
        raise UserError("data.source is empty: give a file, a folder or a dataset id")
    path = demo_corpus() if source == DEMO else Path(source).expanduser()
    if path.is_dir():
        files, left_out = files_of(path)
        if not files:
            found = f"; it has {some_of(f'{n} ({why})' for n, why in left_out.items())}"
            raise UserError(
                f"the folder {source} holds no file with text that ends in {READABLE}"
                f"{found if left_out else ''}"
            )
        return Corpus(source, tuple(files), folder=path, left_out=left_out)
    if path.is_file():
        if not builder_of(path):
            raise UserError(f"{source} has an unknown suffix: give a file that ends in {READABLE}")
        if path.stat().st_size == 0:
            raise UserError(f"the file {path} is empty: remove it or fetch it again")
        return Corpus(source, (path,))
    if name := HubName.parse(source):
        return Corpus(source, dataset=name.at(dataset_commit(name)))
    raise UserError(f"{source} does not exist: give a file, a folder or a dataset id")


def dataset_commit(name: HubName) -> str:
    """The commit that a revision is now, so that what is read is what the fingerprint names.

    Raises:
        UserError: There is no such dataset or revision, or no network and no commit in the name.
    """
    if name.is_pinned:
        return name.revision
    try:
        found = HfApi().dataset_info(name.repo, revision=name.revision or None, timeout=30)
        return str(found.sha)
    except RevisionNotFoundError as error:
        raise name.no_revision() from error
    except Exception as error:
        raise UserError(
            f"{name} is no local file or folder, and the hub gives no dataset of that name "
            f"({first_line(error)}): check the name and the network, or give a commit whose text "
            "was prepared before"
        ) from error


def inputs_of(corpus: Corpus) -> list[dict[str, Any]]:
    """What identifies the content of each file, or of a dataset.

    Files may be far larger than what is read of them, so no content is hashed but their beginnings.
    """
    if dataset := corpus.dataset:
        config = {"config": dataset.config} if dataset.config else {}
        return [{"name": dataset.repo, "revision": dataset.revision, **config}]
    return [_file_identity(file) for file in corpus.files]


def _file_identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        beginning = stream.read(BEGINNING_BYTES)
    status = file.stat()
    identity = {"name": file.name, "size_bytes": status.st_size, "begins": hash_bytes(beginning)}
    is_whole = status.st_size <= BEGINNING_BYTES
    return identity if is_whole else {**identity, "changed_ns": status.st_mtime_ns}


def units_of(corpus: Corpus) -> int:
    """Into how many parts, read one by one, a corpus falls: its files, or the hub's shards."""
    if corpus.dataset is None:
        return len(corpus.files)
    try:
        return int(_hub_stream(corpus.dataset).num_shards)
    except UserError:
        raise
    except Exception as error:
        raise _failure(corpus.source, error, is_remote=True) from error


def texts_of(
    corpus: Corpus,
    unit: int,
    text_column: str,
    document_separator: str = "",
    skip_rows: int = 0,
    has_column: bool = False,
    on_corrupt: Callable[[str], None] | None = None,
    on_missing: Callable[[str], None] = lambda where: None,
) -> Iterator[str]:
    """The text of every row of one unit, in order; empty where a row holds none.

    Args:
        corpus: What to read.
        unit: Which part of it, below `units_of`.
        text_column: The column that holds the text; a .txt file has none.
        document_separator: What ends a document in a .txt file, see `DataSettings`.
        skip_rows: How many rows to pass over at the start.
        has_column: Whether any of these had the column.
        on_corrupt: Called with "FILE, line N: reason" for each line of a .jsonl file that is no
            JSON object, whose text is then empty; such a line is an error when None.
        on_missing: Called with "FILE, row N" for each other row that lacks the column.

    Raises:
        UserError: A file is corrupt, lacks the column, or holds something else in it.
    """
    file = corpus.files[unit] if corpus.files else None
    column = "text" if file is not None and is_plain_text(file) else text_column
    place = file or corpus.source
    names = list[str]()
    rows = _rows(corpus, unit, column, document_separator, skip_rows, on_corrupt)
    for number, row in enumerate(rows, skip_rows + 1):
        if column in row:
            has_column = True
        elif row:
            names = names or list(row)
            on_missing(f"{place}, row {number:,}")
        text = row.get(column) or ""  # an absent text is an empty one
        if not isinstance(text, str):
            raise UserError(
                f"{place} holds {type(text).__name__}, not text, in its "
                f"column {column!r}: set data.text_column to a column of text"
            )
        yield "" if text.isspace() else _whole_characters(text)
    if names and not has_column:
        raise UserError(
            f"{place} has no column {column!r}: set data.text_column to one of {', '.join(names)}"
        )


def _whole_characters(text: str) -> str:
    """A text with a replacement for each half of a character, which JSON may hold alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _rows(
    corpus: Corpus,
    unit: int,
    text_column: str,
    document_separator: str,
    skip_rows: int,
    on_corrupt: Callable[[str], None] | None,
) -> Iterator[dict[str, Any]]:
    """Stream the rows of one unit."""
    file = corpus.files[unit] if corpus.files else None
    try:
        if file is not None and is_json_lines(file):
            yield from json_lines(file, skip_rows, on_corrupt)
            return
        if file is not None and is_plain_text(file):
            with opened(file, "rt", encoding="utf-8-sig") as stream:
                documents = plain_documents(stream, document_separator, file)
                yield from ({"text": text} for text in islice(documents, skip_rows, None))
            return
        if corpus.dataset is not None:
            whole = _hub_stream(corpus.dataset)
            stream = split_dataset_by_node(whole, rank=unit, world_size=whole.num_shards)
        else:
            assert file is not None
            # One file at a time, so an error names its file and columns may differ between files.
            name = glob.escape(str(file))
            stream = datasets.load_dataset(
                builder_of(file), data_files=[name], split="train", streaming=True
            )
        if text_column in (stream.column_names or ()):
            stream = stream.select_columns([text_column])
        yield from stream.skip(skip_rows) if skip_rows else stream
    except StopIteration:  # what load_dataset raises for a compressed file with nothing in it
        return
    except UserError:
        raise
    except Exception as error:
        raise _failure(file or corpus.source, error, is_remote=file is None) from error


def _failure(place: Path | str, error: Exception, is_remote: bool) -> OSError | UserError:
    """What to raise where reading has failed."""
    if _is_passing(error, is_remote):
        return OSError(
            f"reading {place} failed ({first_line(error)}); what was read is kept, and the "
            "same command goes on from there"
        )
    return UserError(f"cannot read {place}: {first_line(error)}; mend or remove it")


def _is_passing(error: Exception, is_remote: bool) -> bool:
    """Whether a failure is of the disk or the network, so that another try may succeed.

    Corrupt files raise OSErrors too, but without the system's number for it. Of a dataset on the
    hub all errors are passing that do not say that its content is wrong.
    """
    if isinstance(error, TimeoutError | ConnectionError | MemoryError | ImportError):
        return True
    if is_remote:
        return not isinstance(error, ValueError | LookupError | TypeError)
    is_the_users = isinstance(error, PermissionError | FileNotFoundError)
    return isinstance(error, OSError) and error.errno is not None and not is_the_users


@lru_cache(maxsize=1)
def _hub_stream(name: HubName) -> Any:
    config = {"name": name.config} if name.config else {}
    try:
        return datasets.load_dataset(
            name.repo, **config, revision=name.revision, split="train", streaming=True
        )
    except DatasetNotFoundError as error:  # of a commit, which nothing has looked up before
        raise UserError(
            f"the hub gives no dataset {name} ({first_line(error)}): check its name and commit"
        ) from error
    except ValueError as error:  # also for a config that is wrong, or missing
        configs = datasets.get_dataset_config_names(name.repo, revision=name.revision)
        if name.config in configs or (not name.config and len(configs) < 2):
            raise
        found = f"no config {name.config!r}" if name.config else "several configs"
        raise UserError(
            f"{name.repo} has {found}: choose one of {', '.join(configs)}, as in "
            f"{name.repo}:{configs[0]}"
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
