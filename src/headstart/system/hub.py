"""What a user calls something on the Hugging Face hub: its name, and which of its states."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from headstart.system.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
# "name" or "owner/name", then ":config" and "@revision". A bare name may end like "v1.5"; only
# letters after its last dot mean a file. Configs may end so: "wikimedia/wikipedia:20231101.en".
NAME = re.compile(
    r"(?![^:@]*\.[A-Za-z]+$)(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)"
    r"(:(?P<config>[^:@/\\\s]+))?(@(?P<revision>[^:@\\\s]+))?"
)


@dataclass(frozen=True)
class HubName:
    """A model or a dataset.

    Attributes:
        repo: "name" or "owner/name".
        config: of a dataset that has several; its default when empty.
        revision: a branch, a tag or a commit; "main" when empty.
    """

    repo: str
    config: str = ""
    revision: str = ""

    @staticmethod
    def parse(text: str) -> HubName | None:
        """Read "owner/name:config@revision", of which all but the name may be missing.

        >>> HubName.parse("owner/name@v1.0")
        HubName(repo='owner/name', config='', revision='v1.0')
        >>> HubName.parse("documents.jsonl") is None
        True
        """
        found = NAME.fullmatch(text)
        return HubName(**found.groupdict(default="")) if found else None

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which never changes and needs no look-up."""
        return COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> HubName:
        """The same at a commit."""
        return replace(self, revision=commit)

    def no_revision(self) -> UserError:
        """The mistake of a revision that there is not."""
        return UserError(
            f"{self.repo} has no revision {self.revision!r} on the hub: give a branch, a tag or a "
            "whole commit that it has"
        )

    def __str__(self) -> str:
        config, revision = self.config and f":{self.config}", self.revision and f"@{self.revision}"
        return f"{self.repo}{config}{revision}"
