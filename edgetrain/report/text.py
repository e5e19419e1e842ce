"""The report as text: for a terminal of 80 columns, and as Markdown."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from edgetrain.report.facts import Report
from edgetrain.report.tables import Table, summary_lines, tables_of

WIDTH = 80
_DETAILS = ("steps",)
"""Sections with a row per instruction."""


def terminal_text(report: Report, *, details: str = "short") -> str:
    """The report in lines of at most 80 characters.

    Args:
        details: ``"all"`` for every instruction too.
    """
    lines = [report.title, *summary_lines(report), ""]
    for table in tables_of(report):
        if table.key in _DETAILS and details != "all":
            continue
        lines += table_lines(table)
    return "\n".join(lines)


def table_lines(table: Table) -> list[str]:
    """A table in lines of at most 80 characters; names that are too long are folded."""
    if table.missing:
        return [f"{table.title}: not shown. {table.missing}", ""]
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name, is_number in table.headers:
        shown.add_column(escape(name), justify="right" if is_number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False)
    console.print(escape(table.title), style="bold")
    console.print(escape(table.note))
    console.print(shown)
    return [line.rstrip() for line in out.getvalue().splitlines()] + [""]


def markdown_text(report: Report) -> str:
    """The report as Markdown, every instruction included."""
    lines = [f"# {_cell(report.title)}", "", *(f"- {_cell(line)}" for line in summary_lines(report)), ""]
    for table in tables_of(report):
        lines += [f"## {table.title}", ""]
        lines += (
            [f"Not shown: {table.missing}.", ""] if table.missing else [f"{table.note}.", "", *_markdown(table), ""]
        )
    return "\n".join(lines)


def _markdown(table: Table) -> list[str]:
    head = "| " + " | ".join(_cell(name) for name, _ in table.headers) + " |"
    rule = "|" + "|".join("---:" if is_number else "---" for _, is_number in table.headers) + "|"
    return [head, rule, *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows)]


def _cell(text: str) -> str:
    """``text`` without what Markdown or HTML would read as more."""
    for special in "\\`*_[]<>|":
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())
