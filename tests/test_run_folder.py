"""A run folder is one recipe's, and nothing that lies there is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headstart.recipe import recipe_from_dict
from headstart.run_folder import check_run_folder, open_run


def test_a_run_folder_is_for_one_recipe(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "teacher": "t",
        "output": str(tmp_path / "run"),
        "data": {"source": "s"},
        "search": {"bin": {"low": "1M", "high": "2M"}, "tokens": 256},
    }
    ours = recipe_from_dict(recipe)
    check_run_folder(ours)
    open_run(ours)
    check_run_folder(ours)
    recipe["search"]["tokens"] = 300
    with pytest.raises(ValueError, match=r"another recipe \(search.tokens is 256 there and 300"):
        check_run_folder(recipe_from_dict(recipe))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty"):
        check_run_folder(recipe_from_dict({**recipe, "output": str(tmp_path / "full")}))
