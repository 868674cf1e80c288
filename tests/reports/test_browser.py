"""The pages in a browser, where playwright and a Chromium are there: nothing installs them.

pip install playwright
apt-get install chromium-headless-shell    # or any Chromium on the PATH
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.reports.examples import SCRATCH_ARM, make_arm, make_result

from headstart.reports.page import write_html

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH"),
]


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page of a run in a window; it fails on whatever the browser complains of."""
    playwright = pytest.importorskip("playwright.sync_api")
    result = make_result(SCRATCH_ARM, make_arm("subnet", curve=SCRATCH_ARM["curve"]))
    candidate = result["search"]["candidates"][0] | {"tokens": 1024}
    losses = [9 + place / 10 for place in range(11)] + [500.0]
    result["search"]["candidates"] = [candidate | {"loss": loss} for loss in losses]
    result["search"]["winner"] = 0
    write_html(result, tmp_path / "report.html")
    complaints: list[str] = []
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def opened(width: int = 1000, **context: Any) -> Any:
            page = browser.new_page(viewport={"width": width, "height": 800}, **context)
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto((tmp_path / "report.html").as_uri())
            return page

        yield opened
        browser.close()
    assert complaints == []


def test_a_mark_tells_its_values_where_the_pointer_is(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.locator(".tip").is_hidden()
    mark = page.locator("#loss-tokens [data-tip]").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 5, box["y"] + box["height"] / 2)
    assert page.locator(".tip").inner_text() == "scratch\n0 tokens\n10.830 nats"
    page.mouse.move(5, 5)
    assert page.locator(".tip").is_hidden()


def test_buttons_switch_between_views(open_page: Callable[..., Any]) -> None:
    page = open_page()
    charts = page.locator("#loss-flops .chart")
    assert [charts.nth(place).is_visible() for place in (0, 1)] == [True, False]
    page.locator("#loss-flops button", has_text="log").click()
    assert [charts.nth(place).is_visible() for place in (0, 1)] == [False, True]
    assert page.locator("#loss-tokens .chart").first.is_visible()


@pytest.mark.parametrize("width", [320, 700, 1400])
def test_charts_fit_the_window(width: int, open_page: Callable[..., Any]) -> None:
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plots = page.locator(".plot:visible")
    for place in range(plots.count()):
        # Ticks and titles too, whose letters keep their size.
        for text in plots.nth(place).locator("text:visible").all():
            box = text.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            assert 7 < box["height"] < 20


def test_an_outlier_does_not_flatten_the_others(open_page: Callable[..., Any]) -> None:
    page = open_page()
    marks = page.locator("#search-size [data-tip]").all()
    tops = [mark.bounding_box()["y"] for mark in marks]
    height = page.locator("#search-size .plot").bounding_box()["height"]
    assert max(tops) - min(tops[:-1]) > 0.7 * height
    assert page.locator("#search-size .plot").get_by_text("▲").count() == 1


def test_text_is_told_from_the_ground_in_both_modes(open_page: Callable[..., Any]) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.locator(".plot text").first.evaluate("text => getComputedStyle(text).fill")
        colours[scheme] = [_brightness(ground), _brightness(ink)]
    (light_ground, light_ink), (dark_ground, dark_ink) = colours["light"], colours["dark"]
    assert light_ground - light_ink > 100 and dark_ink - dark_ground > 100


def _brightness(colour: str) -> float:
    """Of "rgb(1, 2, 3)", from 0 to 255."""
    channels = colour[colour.index("(") + 1 : -1].split(",")[:3]
    return sum(map(float, channels)) / 3
