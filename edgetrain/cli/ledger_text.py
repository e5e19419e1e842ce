"""The ledger of memory as rows for a person."""

from __future__ import annotations

from rich.table import Table

from edgetrain.targets.ledger import Ledger
from edgetrain.units import format_mib

_SIZES = (
    ("this process", "process_bytes"),
    ("free on the GPU", "device_bytes"),
    ("context, by the profile", "context_bytes"),
    ("libraries, by the profile", "framework_bytes"),
    ("left to everything else", "reserve_bytes"),
    ("budget of the run", "budget_bytes"),
    ("in it: two batches", "loader_bytes"),
    ("in it: decoding an image", "decoding_bytes"),
    ("in it: the teacher", "teacher_bytes"),
)


def ledger_rows(ledger: Ledger) -> list[tuple[str, str]]:
    """Name and size; what is unknown is left out."""
    rows = [("memory", f"{format_mib(ledger.total_bytes)}, available {format_mib(ledger.available_bytes)}")]
    if ledger.swap is not None:
        rows.append(("swap", f"{format_mib(ledger.swap.total_bytes)}, used {format_mib(ledger.swap.used_bytes)}"))
    if ledger.zram is not None:
        held = ledger.zram_held_bytes
        packed = "" if held is None else f", compressed into {format_mib(held)} of memory"
        rows.append(
            ("zram", f"{format_mib(ledger.zram.total_bytes)}, used {format_mib(ledger.zram.used_bytes)}{packed}")
        )
    sizes = ((name, getattr(ledger, field)) for name, field in _SIZES)
    return rows + [(name, format_mib(size)) for name, size in sizes if size is not None]


def ledger_table(ledger: Ledger) -> Table:
    """The rows as a table without a frame."""
    table = Table(box=None, show_header=False)
    for row in ledger_rows(ledger):
        table.add_row(*row)
    return table
