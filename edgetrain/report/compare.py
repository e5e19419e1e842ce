"""Two reports side by side: what differs, and what it costs."""

from __future__ import annotations

from itertools import zip_longest

from pydantic import Field

from edgetrain.report.facts import BlockRow, Facts, Report
from edgetrain.report.tables import Table, format_ms, mib


class Difference(Facts):
    """One figure of both.

    Attributes:
        unit: ``B``, ``s``, ``/s`` or "" for a ratio.
    """

    name: str
    first: float | None
    second: float | None
    unit: str


class BlockDifference(Facts):
    """A block that the two treat differently; None: it has no such block."""

    first: BlockRow | None
    second: BlockRow | None


class Comparison(Facts):
    """What differs between two reports."""

    titles: tuple[str, str]
    figures: tuple[Difference, ...]
    blocks: tuple[BlockDifference, ...] = Field(description="only those that differ in mode or name")


def compare(first: Report, second: Report) -> Comparison:
    """What differs between ``first`` and ``second``, and by how much."""
    pairs = zip_longest(first.blocks, second.blocks)
    figures = [
        Difference(name=name, first=getattr(first, field), second=getattr(second, field), unit=unit)
        for name, field, unit in (
            ("peak", "peak_bytes", "B"),
            ("reserved", "reserved_bytes", "B"),
            ("budget", "budget_bytes", "B"),
            ("step", "step_seconds", "s"),
        )
    ]
    if first.epochs or second.epochs:
        figures += [
            Difference(name=name, first=_last(first, field), second=_last(second, field), unit=unit)
            for name, field, unit in (
                ("images/s, last epoch", "images_per_s", "/s"),
                ("loss, last epoch", "loss", ""),
                ("accuracy, last epoch", "accuracy", ""),
                ("test accuracy, last epoch", "test_accuracy", ""),
            )
        ]
    return Comparison(
        titles=(first.title, second.title),
        figures=tuple(figure for figure in figures if (figure.first, figure.second) != (None, None)),
        blocks=tuple(
            BlockDifference(first=a, second=b)
            for a, b in pairs
            if a is None or b is None or (a.name, a.mode) != (b.name, b.mode)
        ),
    )


def comparison_tables(comparison: Comparison) -> tuple[Table, Table]:
    """The figures, and the blocks that differ."""
    a, b = comparison.titles
    figures = Table(
        "figures",
        "What it costs",
        f"A: {a}; B: {b}",
        ("figure", "A>", "B>", "B - A>", "B / A>"),
        tuple(_figure_row(figure) for figure in comparison.figures),
    )
    blocks = Table(
        "blocks",
        "Blocks that differ",
        "left: what a forward pass adds until the backward pass",
        ("block", "A", "B", "left A MiB>", "left B MiB>", "ms A>", "ms B>"),
        tuple(_block_row(block) for block in comparison.blocks),
        "" if comparison.blocks else "every block has the same mode in both",
    )
    return figures, blocks


def _last(report: Report, field: str) -> float | None:
    found: float | None = getattr(report.epochs[-1], field) if report.epochs else None
    return found


def _figure_row(figure: Difference) -> tuple[str, ...]:
    def text(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{mib(value)} MiB" if figure.unit == "B" else format_ms(value) if figure.unit == "s" else f"{value:.4g}"

    if figure.first is None or figure.second is None:
        return figure.name, text(figure.first), text(figure.second), "-", "-"
    ratio = f"{figure.second / figure.first:.3f}" if figure.first else "-"
    return figure.name, text(figure.first), text(figure.second), text(figure.second - figure.first), ratio


def _block_row(pair: BlockDifference) -> tuple[str, ...]:
    rows = pair.first, pair.second
    names = list(dict.fromkeys(row.name for row in rows if row is not None))
    modes = ["-" if row is None else row.mode.replace("_", " ") for row in rows]
    left = [mib(None if row is None else row.left_bytes) for row in rows]
    taken = ["-" if row is None or row.seconds is None else f"{1e3 * row.seconds:.2f}" for row in rows]
    return " / ".join(names), *modes, *left, *taken
