"""Runs llama.cpp's converter on a model whose vocabulary was trimmed.

    python trimmed_converter.py FOLDER CONVERTER.py [ARGUMENT ...]
    python trimmed_converter.py FOLDER -m MODULE [ARGUMENT ...]

The converter knows a tokenizer's pre-tokenizer by the ids of one text, which begins with all kinds
of white space. Trimming has changed these ids and not the pre-tokenizer, so for that text, and for
it alone, the teacher's tokenizer answers. This file imports nothing of headstart.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

ASKED_TEXT_BEGINS = "\n \n\n \n\n\n \t"


def whole_tokenizer(folder: Path) -> Any:
    """The tokenizer that a trimmed folder's teacher had."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copyfile(folder / "tokenizer_whole.json", Path(place) / "tokenizer.json")
        settings = folder / "tokenizer_config.json"
        entries = json.loads(settings.read_text()) if settings.is_file() else {}
        entries.pop("added_tokens_decoder", None)  # whose ids are the new ones
        (Path(place) / settings.name).write_text(json.dumps(entries))
        return AutoTokenizer.from_pretrained(place)


def main() -> None:
    whole = whole_tokenizer(Path(sys.argv[1]))
    encode = PreTrainedTokenizerBase.encode

    def answer(self: Any, text: Any, *options: Any, **more: Any) -> Any:
        is_asked = isinstance(text, str) and text.startswith(ASKED_TEXT_BEGINS)
        return encode(whole if is_asked else self, text, *options, **more)

    PreTrainedTokenizerBase.encode = answer
    if sys.argv[2] == "-m":
        sys.argv[:4] = [sys.argv[3]]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:3] = [sys.argv[2]]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
