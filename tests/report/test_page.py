"""The page as a parser reads it: numbers are the report's, names are text, and nothing is fetched."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from pages import NASTY, Page, nasty_report

from edgetrain.report import KINDS, Report
from edgetrain.report.compare import Comparison, compare, comparison_tables
from edgetrain.report.page import page_of
from edgetrain.report.pictures import front_picture, memory_picture, run_picture, standalone
from edgetrain.report.tables import tables_of
from edgetrain.report.text import markdown_text, table_lines, terminal_text

REPORT = nasty_report()
SECTIONS = ["memory", "steps", "blocks", "front", "run", "devices", "levels"]


@pytest.fixture(scope="module")
def text() -> str:
    return page_of(REPORT)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_section_has_its_table(page: Page) -> None:
    assert list(page.tables) == SECTIONS
    for table in tables_of(REPORT):
        assert [tuple(row) for row in page.tables[table.key] if row] == list(table.rows)


def test_the_page_carries_the_report(page: Page) -> None:
    assert Report.model_validate(page.data) == REPORT


def test_charts_hold_the_report_s_bytes(page: Page) -> None:
    bars = [at for tag, at in page.tags if tag == "rect" and at.get("class") == "hit"]
    assert [int(at["data-bytes"] or 0) for at in bars] == [instant.total_bytes for instant in REPORT.memory]
    assert [at["data-block"] for at in bars] == [instant.block for instant in REPORT.memory]
    limit = [at for tag, at in page.tags if at.get("class") == "limit"]
    assert [int(at["data-bytes"] or 0) for at in limit] == [REPORT.limit_bytes]
    points = {at["data-name"]: at for tag, at in page.tags if tag == "circle" and at.get("data-name")}
    assert {name: float(at["data-seconds"] or 0) for name, at in points.items()} == {
        point.name: point.seconds for point in REPORT.marked
    }
    assert {at["data-kind"] for tag, at in page.tags if "data-kind" in at} == set(KINDS)


def test_names_are_text_and_nothing_is_fetched(page: Page, text: str) -> None:
    assert not any(tag in ("img", "iframe", "link") and at.get("rel") != "icon" for tag, at in page.tags)
    assert not any(name.startswith("on") for _, at in page.tags for name in at)
    assert any(NASTY in title for title in page.titles)
    assert not re.findall(r"https?://|//[a-z]|@import|url\(", text)
    sources = [at[name] for _, at in page.tags for name in ("src", "href") if name in at]
    assert all(source is not None and source.startswith(("#", "data:")) for source in sources)


def test_a_page_of_a_deep_network_is_small() -> None:
    assert len(page_of(nasty_report(1500)).encode()) < 5_000_000


@pytest.mark.parametrize("draw", [memory_picture, front_picture, run_picture])
def test_pictures_are_files_of_their_own(draw) -> None:
    root = ElementTree.fromstring(standalone(draw(REPORT)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert NASTY in " ".join(root.itertext()) or draw is run_picture


def test_bands_are_stacked_to_the_total() -> None:
    """The height of all bands at each instruction against that of the budget's line."""
    root = ElementTree.fromstring(standalone(memory_picture(REPORT)))
    paths = [part for part in root.iter() if part.get("data-kind")]
    edges = [[float(y) for y in re.findall(r",([\d.]+)", path.get("d") or "")] for path in paths]
    count = len(REPORT.memory)
    tops = edges[-1][: 2 * count : 2]
    line = next(part for part in root.iter() if part.get("class") == "limit")
    bottom = edges[0][-1]
    floor = 0.95 * REPORT.context_bytes  # where the axis begins: most of this report is context
    scale = (bottom - float(line.get("y1") or 0)) / ((REPORT.limit_bytes or 0) - floor)
    for top, instant in zip(tops, REPORT.memory, strict=True):
        assert bottom - top == pytest.approx((instant.total_bytes - floor) * scale, abs=0.02)


def test_terminal_has_80_columns_and_the_same_facts() -> None:
    lines = terminal_text(REPORT, details="all").splitlines()
    assert max(map(len, lines[1:])) <= 80
    shown = "".join("".join(line.split()) for line in lines)
    for table in tables_of(REPORT):
        assert table.title in lines
    assert "fits,23.0MiBleft" in shown
    assert "forward3" in shown
    assert "forward3" not in "".join("".join(line.split()) for line in terminal_text(REPORT).splitlines())


def test_markdown_escapes_and_has_every_section() -> None:
    text = markdown_text(REPORT)
    assert "<img" not in text.replace("\\<", "")
    assert all(f"## {table.title}" in text for table in tables_of(REPORT))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5, 6, 7, 8, 9) for row in rows)


def test_what_is_missing_is_said() -> None:
    empty = REPORT.model_copy(update={"memory": (), "missing": ({"section": "memory", "reason": "no sizes"},)})
    empty = Report.model_validate(empty.model_dump(warnings=False))
    assert "Memory over the step: not shown. no sizes" in terminal_text(empty)
    assert "Not shown: no sizes." in page_of(empty)
    assert Page(page_of(empty)).tables["memory"] == []


def test_compare_says_what_differs_and_what_it_costs() -> None:
    changed = (REPORT.blocks[0].model_copy(update={"mode": "recompute", "left_bytes": 0}), *REPORT.blocks[1:])
    other = REPORT.model_copy(update={"blocks": changed, "peak_bytes": 45 * 2**20, "step_seconds": 0.5})
    found = compare(REPORT, other)
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    figures, blocks = comparison_tables(found)
    assert ("peak", "90.0 MiB", "45.0 MiB", "-45.0 MiB", "0.500") in figures.rows
    assert ("step", "250.0 ms", "500.0 ms", "250.0 ms", "2.000") in figures.rows
    assert blocks.rows == ((f"{NASTY}0", "store", "recompute", "2.0", "0.0", "1.00", "1.00"),)
    assert max(len(line) for table in (figures, blocks) for line in table_lines(table)) <= 80
    same = comparison_tables(compare(REPORT, REPORT))[1]
    assert same.missing
