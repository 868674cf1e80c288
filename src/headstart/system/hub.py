"""What a user calls something on the Hugging Face hub: a name, and which of its states."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"(?P<repo>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<revision>[^@]+))?")


@dataclass(frozen=True)
class HubName:
    """A model or dataset.

    Attributes:
        repo: "name" or "owner/name".
        config: of a dataset that has several.
        revision: a branch, a tag or a commit; "main" when empty.
    """

    repo: str
    config: str = ""
    revision: str = ""

    @staticmethod
    def parse(text: str) -> HubName:
        """Read "owner/name:config@revision", of which the last two may be missing.

        >>> HubName.parse("owner/name@v1.0")
        HubName(repo='owner/name', config='', revision='v1.0')
        """
        found = NAME.fullmatch(text)
        if found is None:
            return HubName(text)
        return HubName(found["repo"], found["config"] or "", found["revision"] or "")

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> HubName:
        """The same at a commit."""
        return replace(self, revision=commit)

    def __str__(self) -> str:
        config, revision = self.config and f":{self.config}", self.revision and f"@{self.revision}"
        return f"{self.repo}{config}{revision}"
