"""Documents out of plain text, which has no columns and no lines of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from headstart.system.errors import UserError

SEPARATORS = {"blank_line": r"\n[ \t]*\n", "line": r"\n"}
"""Named values of `data.document_separator`, as regular expressions; others are texts."""
BLANK_ENDS = re.compile(r"\A([ \t]*\n)+|\n[ \t\n]*\Z")
READ_CHARACTERS = 1 << 20
MAX_DOCUMENT_CHARACTERS = 1 << 26
"""A tokenizer takes about 100 bytes for each."""


def plain_documents(stream: TextIO, separator: str, file: Path) -> Iterator[str]:
    """Yield the documents of a text, in order, without the blank lines around them.

    Args:
        stream: with universal newlines.
        separator: what ends a document, see `DataSettings.document_separator`.
        file: where the text comes from, for messages.

    Raises:
        UserError: a document is too long for a tokenizer.
    """
    pattern = re.compile(SEPARATORS.get(separator, re.escape(separator))) if separator else None
    rest = ""
    while piece := stream.read(READ_CHARACTERS):
        rest += piece
        if pattern:
            *documents, rest = pattern.split(rest)
            yield from (BLANK_ENDS.sub("", document) for document in documents)
        if len(rest) > MAX_DOCUMENT_CHARACTERS:
            ends = f"{separator!r} ends one" if separator else "a .txt file is one"
            raise UserError(
                f"{file} has a document of more than {MAX_DOCUMENT_CHARACTERS:,} characters, as "
                f"{ends}; set data.document_separator to what ends a document"
            )
    yield BLANK_ENDS.sub("", rest)
