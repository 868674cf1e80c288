"""A tokenizer, and a corpus of the documents."""

from pathlib import Path

import pytest
from tests.text.documents import DOCUMENTS, as_jsonl, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="</s>")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(as_jsonl(DOCUMENTS))
    return path
