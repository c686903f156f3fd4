"""The report in headless Chromium, at three widths and in both themes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atpatch_onnx.reporting import report

from reporting_hosts import KINDS, patched

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright drives the browser: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[1]
AXE = ROOT / os.environ.get("AXE_CORE", "build/axe/node_modules/axe-core/axe.min.js")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (360, 820, 1440)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("user"),
            executable_path=CHROMIUM,
            args=FLAGS,
            bypass_csp=True,  # or axe could not be injected; the page has no script of its own
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in KINDS:
        folder = patched(kind, tmp_path_factory.mktemp(kind))
        made[kind] = folder / "report.html"
        models = folder / "model.onnx", folder / "model.patched.onnx"
        clean, bad = folder / "clean.npz", folder / "bad.npz"
        report(*models, made[kind], clean=clean, bad=bad, runs=2, ep="cpu")
    return made


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """The page of a kind, with what it logged and asked the network for."""
    page = browser.new_page()
    page.logged, page.asked = [], []
    page.on("console", lambda message: page.logged.append(message.text))
    page.on("pageerror", lambda error: page.logged.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(pages[request.param].as_uri())
    yield page
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_is_quiet(opened: Any, scheme: str, width: int) -> None:
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": width, "height": 900})
    for state in (False, True):
        opened.eval_on_selector_all(
            "details", "(all, open) => all.forEach(d => d.open = open)", state
        )
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.logged == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 25)"
    assert dark == (scheme == "dark")


def test_it_is_used_with_the_keyboard(opened: Any) -> None:
    """The skip link comes first and shows; then the sections; every stop has a visible outline."""
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    assert opened.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.id") == "verdict"
    stops = opened.evaluate("document.querySelectorAll('main a, main summary').length")
    for _ in range(stops):
        opened.keyboard.press("Tab")
        outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    assert opened.evaluate("document.activeElement.tagName") == "SUMMARY"
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.parentElement.open") is True


def test_tables_stay_tables_on_a_phone(opened: Any) -> None:
    """Rows are stacked there, which must not take their roles away."""
    opened.set_viewport_size({"width": 360, "height": 900})
    opened.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    tables = opened.locator("table.stack")
    assert tables.count() >= 4
    assert opened.get_by_role("table").count() >= tables.count()
    assert opened.get_by_role("columnheader", name="Largest difference").count() == 1
    assert opened.get_by_role("rowheader", name="logits").count() == 2


@pytest.mark.skipif(not AXE.exists(), reason=f"axe-core is not at {AXE}: see AXE_CORE")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing(opened: Any, scheme: str, width: int) -> None:
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": width, "height": 900})
    opened.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    opened.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    found = opened.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
