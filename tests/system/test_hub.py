"""Names on the hub, with configs and revisions."""

import pytest

from headstart.system.hub import HubName


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name", ("name", "", "")),
        ("owner/name", ("owner/name", "", "")),
        ("owner/name-v1.5@main", ("owner/name-v1.5", "", "main")),
        ("owner/name:20231101.en", ("owner/name", "20231101.en", "")),
        ("owner/name:en@refs/convert/parquet", ("owner/name", "en", "refs/convert/parquet")),
    ],
)
def test_names_are_read_and_written(text: str, parts: tuple[str, str, str]) -> None:
    name = HubName.parse(text)
    assert (name.repo, name.config, name.revision) == parts
    assert str(name) == text
    assert not name.is_pinned
    pinned = name.at("0123456789abcdef" * 2 + "01234567")
    assert pinned.is_pinned and HubName.parse(str(pinned)) == pinned
