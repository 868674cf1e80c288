"""Teachers on disk."""

from tests.model import conftest

saved = conftest.saved
