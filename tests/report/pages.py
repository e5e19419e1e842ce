"""A report with names that are HTML, made without a model: what the tests of pages share."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

from edgetrain.report import BlockRow, DeviceRow, Epoch, Fit, Instant, Level, Point, Report

NASTY = '<img src=x onerror="alert(1)">&amp;'
MIB = 2**20


def nasty_report(instructions: int = 24) -> Report:
    """Every section filled; block names are HTML."""
    memory = tuple(
        Instant(
            instruction=f"forward {k} keep=all",
            block=f"{NASTY}{k}",
            context=100 * MIB,
            weights=10 * MIB,
            optimizer=10 * MIB,
            batch=3 * MIB,
            gradients=k * MIB,
            kept=(instructions - k) * 2 * MIB,
            hidden=5 * MIB,
            temporaries=k % 3 * MIB,
            slack=7 * MIB,
        )
        for k in range(instructions)
    )
    fits = (
        Fit(mode="keep_all", needed_bytes=500 * MIB, fits=False, largest_batch=8, images_per_s=12.5),
        Fit(mode="recompute", needed_bytes=200 * MIB, fits=True, largest_batch=64, images_per_s=None),
    )
    blocks = tuple(
        BlockRow(name=f"{NASTY}{k}", mode="store", left_bytes=2 * MIB, seconds=0.001, snr=1e5, reason=f"kept {NASTY}")
        for k in range(8)
    )
    return Report(
        title=f"model {NASTY}",
        device="gtx750",
        input_shape=(32, 3, 32, 32),
        micro_batches=1,
        optimizer="sgd",
        peak_bytes=90 * MIB,
        reserved_bytes=97 * MIB,
        budget_bytes=120 * MIB,
        context_bytes=100 * MIB,
        step_seconds=0.25,
        times="rates of profile gtx750",
        memory=memory,
        blocks=blocks,
        front=(
            Point(name="", peak_bytes=60 * MIB, seconds=0.5),
            Point(name="", peak_bytes=90 * MIB, seconds=0.25),
        ),
        marked=(
            Point(name="chosen", peak_bytes=90 * MIB, seconds=0.25),
            Point(name="uniform keep_all", peak_bytes=200 * MIB, seconds=0.2, reason=NASTY),
        ),
        devices=(
            DeviceRow(device="gtx750", available_bytes=400 * MIB, at_most=True, trains="pytorch", fits=fits),
            DeviceRow(device="nano-4gb", available_bytes=None, at_most=False, trains="exported-step", fits=fits),
        ),
        levels=(
            Level(name="step time", predicted=0.25, against="measured by the run", found=0.2, unit="s"),
            Level(name="simulated program", predicted=90 * MIB, against="trace", found=90 * MIB, unit="B"),
        ),
        epochs=(
            Epoch(epoch=1, loss=2.0, accuracy=0.3, test_accuracy=0.25, images_per_s=100),
            Epoch(epoch=2, loss=1.0, accuracy=0.6, test_accuracy=None, images_per_s=110),
        ),
    )


class Page(HTMLParser):
    """What a reader of a page meets: tags with their attributes, and the text of table cells.

    Attributes:
        tables: of each section by its key, the text of its cells.
        data: the report's JSON.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self._section, self._open, self._json = "", "", ""
        self.feed(text)
        self.close()
        self.data: dict[str, Any] = json.loads(self._json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"] or ""
            self.tables[self._section] = []
        elif tag == "tr" and self._section:
            self.tables[self._section].append([])
        elif tag == "td":
            self.tables[self._section][-1].append("")
        elif tag == "title":
            self.titles.append("")
        self._open = "json" if attributes.get("id") == "report" else tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "td":
            self.tables[self._section][-1][-1] += data
        elif self._open == "title":
            self.titles[-1] += data
        elif self._open == "json":
            self._json += data
