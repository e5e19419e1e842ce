"""The page in a headless Chromium: it works, fits phones, and its numbers are the report's.

``EDGETRAIN_CHROMIUM`` names a browser where playwright has none of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import NASTY, nasty_report

from edgetrain.report.page import page_of
from edgetrain.report.tables import tables_of

pytestmark = pytest.mark.browser
REPORT = nasty_report()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("EDGETRAIN_CHROMIUM"), args=["--no-sandbox"]
            )
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page_of(REPORT), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    contexts = []

    def opened(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: request.url == address or page.complaints.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()


def test_no_complaints_and_every_section(open_page: Any) -> None:
    page = open_page()
    assert page.locator("section h2").all_inner_texts() == [table.title for table in tables_of(REPORT)]
    assert [complaint for complaint in page.complaints if not complaint.startswith("data:")] == []


@pytest.mark.parametrize("width", [360, 800, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(open_page: Any, width: int, scheme: str) -> None:
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    assert page.locator("svg.chart").count() == 3
    assert all(box["width"] > 0.7 * min(width, 1000) for box in map(_box, page.locator("svg.chart").all()))


def _box(locator: Any) -> dict[str, float]:
    box: dict[str, float] = locator.bounding_box()
    return box


def test_hovering_names_block_and_instruction(open_page: Any) -> None:
    page = open_page(viewport={"width": 1000, "height": 900})
    page.locator("#memory .hit").nth(5).hover()
    said = page.locator("#memory output").inner_text()
    assert f"forward 5 keep=all ({NASTY}5)" in said
    assert f"{REPORT.memory[5].total_bytes / 2**20:.1f} MiB" in said


def test_the_keyboard_reads_the_charts(open_page: Any) -> None:
    page = open_page()
    page.locator("#memory svg").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert "forward 1 keep=all" in page.locator("#memory output").inner_text()
    page.keyboard.press("End")
    assert f"forward {len(REPORT.memory) - 1} keep=all" in page.locator("#memory output").inner_text()
    assert page.locator("#memory .hit.on").count() == 1


def test_tables_and_charts_without_javascript(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    for table in tables_of(REPORT):
        rows = page.locator(f"#{table.key} tbody tr")
        found = [tuple(row.locator("td").all_text_contents()) for row in rows.all()]
        assert found == list(table.rows)
        if table.key != "steps":  # these open on a click, which needs no script
            assert rows.first.is_visible()
    assert page.locator("#memory svg path").first.is_visible()


def test_numbers_are_the_json_s(open_page: Any) -> None:
    page = open_page()
    data = json.loads(page.locator("#report").text_content())
    bars = page.locator("#memory .hit").evaluate_all("bars => bars.map(bar => Number(bar.dataset.bytes))")
    assert data == json.loads(REPORT.model_dump_json())
    kinds = ("context", "weights", "optimizer", "batch", "gradients", "kept", "hidden", "temporaries", "slack")
    assert bars == [sum(instant[kind] for kind in kinds) for instant in data["memory"]]


def test_names_with_html_are_text(open_page: Any) -> None:
    page = open_page()
    assert page.locator("h1").inner_text() == REPORT.title
    assert page.locator("img").count() == 0
    assert page.locator("#blocks tbody td").first.inner_text() == f"{NASTY}0"


def test_it_prints(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator("#memory svg").is_visible()
    assert len(page.pdf()) > 10_000
