"""Pages in a real browser, headless: nothing missing, nothing cut off, readable in light and dark, on a desk and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from svite_scale.report.page import write_report
from tests.report.test_report import going

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here; Debian's package is chromium")

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
CUT_OFF = """() => [...document.querySelectorAll('body *')]
    .filter(each => each.clientWidth && each.scrollWidth > each.clientWidth + 1)
    .filter(each => getComputedStyle(each).overflowX !== 'visible')
    .filter(each => !each.matches('.scroll, nav, pre') && !each.closest('svg'))
    .map(each => each.outerHTML.slice(0, 80))"""
COLORS = """() => Object.fromEntries(['text', 'muted', 'page', 'card', 'well', 'c0', 'c1', 'c2', 'c3', 'c4', 'c5'].map(name =>
    [name, getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()]))"""


@pytest.fixture(scope="module")
def pages(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of pages by what they are about."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "tokens": [saved("tokens")],
        "going": [going(saved, folder / "run-with-a-rather-long-name-that-says-all-of-its-options-lr3e-3-bs1024-density0.3")],
        "compared": [saved("weights"), saved("single"), saved("tokens")],
    }
    return {name: write_report(run_dirs, folder / name) for name, run_dirs in runs.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, pages: dict[str, Path]) -> Iterator[Callable[[str, int, str], Page]]:
    """Opens a page in a width and a color scheme. It must load nothing but itself, and log nothing."""
    contexts, problems = [], []

    def open_page(name: str, width: int, scheme: str) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page, url = context.new_page(), pages[name].as_uri()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url[:5] not in (url[:5], "data:") else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("name", ["tokens", "going", "compared"])
def test_a_page_is_whole_and_fits_its_window(opened: Callable[[str, int, str], Page], name: str) -> None:
    for width, scheme in product(WIDTHS, SCHEMES):
        page = opened(name, width, scheme)
        missing = "() => [...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length"
        assert page.evaluate("document.images.length") > 0
        assert page.evaluate(missing) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_OFF) == []
        assert page.evaluate("Math.min(...[...document.querySelectorAll('svg')].map(each => each.clientWidth))") >= 280


def test_a_chart_shows_its_values_under_the_pointer(opened: Callable[[str, int, str], Page]) -> None:
    page = opened("tokens", 1280, "light")
    chart = page.locator("figure.chart", has=page.get_by_role("heading", name="Loss", exact=True))
    assert chart.locator(".reading:visible").count() == 0
    chart.locator("svg").hover(position={"x": 200, "y": 100})
    assert chart.locator(".reading:visible").count() == 1
    assert chart.locator(".reading:visible text").inner_html().startswith("<tspan>step ")


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb`` by WCAG 2."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_stand_out_in_both_schemes(opened: Callable[[str, int, str], Page]) -> None:
    seen = [opened("tokens", 390, scheme).evaluate(COLORS) for scheme in SCHEMES]
    assert luminance(seen[0]["page"]) > 0.8
    assert luminance(seen[1]["page"]) < 0.05
    for colors in seen:
        for ground, text in product(("page", "card"), ("text", "muted")):
            assert contrast(colors[ground], colors[text]) >= 4.5
        assert min(contrast(colors["card"], colors[f"c{number}"]) for number in range(6)) >= 3.5
