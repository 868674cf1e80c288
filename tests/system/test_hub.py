"""Names on the hub, with configs and revisions."""

from __future__ import annotations

import pytest

from headstart.system.hub import HubName


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name", ("name", "", "")),
        ("owner/name-v1.5@main", ("owner/name-v1.5", "", "main")),
        ("owner/name:20231101.en", ("owner/name", "20231101.en", "")),
        ("owner/name@v1.0.rc", ("owner/name", "", "v1.0.rc")),
        ("owner/name:en@refs/convert/parquet", ("owner/name", "en", "refs/convert/parquet")),
    ],
)
def test_names_are_read_and_written(text: str, parts: tuple[str, str, str]) -> None:
    name = HubName.parse(text)
    assert name is not None
    assert (name.repo, name.config, name.revision) == parts
    assert str(name) == text
    assert not name.is_pinned
    pinned = name.at("0123456789abcdef0123456789abcdef01234567")
    assert pinned.is_pinned and HubName.parse(str(pinned)) == pinned


@pytest.mark.parametrize(
    "text", ["", "text.jsonl", "folder/text.txt", "a/b/c", "/a/b", "owner/name@", "owner/name:"]
)
def test_what_names_nothing_on_the_hub(text: str) -> None:
    assert HubName.parse(text) is None
