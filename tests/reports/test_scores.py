"""Scores of models side by side."""

from __future__ import annotations

from rich.console import Console

from headstart.reports.scores import scores_cells, scores_table


def test_each_score_has_its_row_and_shares_have_their_error() -> None:
    """0.3 of 84 items: a standard error of the root of 0.3 * 0.7 / 84, which is 0.05."""
    tasks = {"piqa": {"acc": 0.3, "items": 84}, "wikitext": {"word_perplexity": 31.5, "items": 62}}
    assert scores_cells({"loss": 2.5, "tasks": tasks}) == {
        "loss": "2.5000",
        "piqa acc": "0.300 ± 0.050",
        "wikitext word_perplexity": "31.500",
    }
    console = Console(record=True, width=100)
    console.print(scores_table({"small": {"loss": 2.5}, "large": {"tasks": tasks}}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["small", "large"] in lines
    assert ["loss", "2.5000", "–"] in lines
    assert ["piqa", "acc", "–", "0.300", "±", "0.050"] in lines
