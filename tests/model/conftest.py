"""Teachers on disk."""

import pytest


@pytest.fixture
def saved(tmp_path):
    """Write a model and return its folder."""

    def save(model, name="teacher", **settings):
        model.save_pretrained(tmp_path / name, **settings)
        return tmp_path / name

    return save
