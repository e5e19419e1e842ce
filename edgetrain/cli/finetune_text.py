"""What ``edgetrain finetune`` shows: the choices and their price before it begins, results per class at its end."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from edgetrain.train.metrics import Confusion
from edgetrain.train.prices import Price
from edgetrain.units import MIB, format_mib


def price_table(prices: Iterable[Price], *, chosen: str, budget_bytes: int | None) -> Table:
    """A row for each choice, the chosen one marked."""
    table = Table("--train", box=None, header_style="bold")
    for name in ("parameters", "keeping everything", "leanest mode", ""):
        table.add_column(name, justify="right" if name else "left")
    for price in prices:
        parts = f" in {price.parts} parts" if price.parts > 1 else ""
        table.add_row(
            f"{'>' if price.trained == chosen else ' '} {price.trained}",
            f"{price.parameters:,}",
            f"{price.keep_all_bytes / MIB:.1f} MiB",
            f"{price.least_bytes / MIB:.1f} MiB{parts}",
            _verdict(price, budget_bytes),
            style="bold" if price.trained == chosen else None,
        )
    return table


def _verdict(price: Price, budget_bytes: int | None) -> str:
    if budget_bytes is None or price.keep_all_bytes <= budget_bytes:
        return "" if budget_bytes is None else "fits as it is"
    return f"a plan fits {format_mib(budget_bytes)}" if price.least_bytes <= budget_bytes else "may not fit"


_WIDEST = 20


def class_table(result: Confusion) -> Table:
    """Precision, recall and F1 of every class, and beside them the confusion matrix of up to 20 classes."""
    table = Table("class", box=None, header_style="bold")
    predicted = result.classes if len(result.classes) <= _WIDEST else ()
    for name in ("images", "precision", "recall", "F1", *(f"-> {name}" for name in predicted)):
        table.add_column(name, justify="right")
    for row, counts in zip(result.results(), result.counts, strict=True):
        found = [row.precision, row.recall, row.f1]
        values = ["-" if value is None else f"{value:.1%}" for value in found]
        table.add_row(row.name, str(row.images), *values, *(str(count) for count in counts[: len(predicted)]))
    return table


def print_wide(*lines: Table | str, stderr: bool = False) -> None:
    """Prints without breaking lines: a table is copied, or read by a program."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
