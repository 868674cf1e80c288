"""A mixture reads its corpora by their weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.text.documents import DOCUMENTS, SETTINGS, as_jsonl

from headstart.text.prepare import prepare
from headstart.text.settings import SPLITS, MixtureSource


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
            replace(SETTINGS, source=part.source, text_column=part.text_column or "text"),
            tokenizer,
            tmp_path / "cache",
        )
        for part in sources
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
