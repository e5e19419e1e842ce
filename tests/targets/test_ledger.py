"""The ledger of memory, from files of the kernel's that a test writes, and the budget that follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetrain.cli.automatic_budget import automatic_budget
from edgetrain.cli.ledger_text import ledger_rows
from edgetrain.errors import BudgetError
from edgetrain.targets.ledger import Ledger, Swap, read_ledger
from edgetrain.units import GIB, KIB, MIB

SWAPS = """Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/zram0                              partition\t1048576\t\t3072\t\t100
/dev/zram1                              partition\t1048576\t\t1024\t\t100
/var/swap file                          file\t\t2097152\t\t512\t\t-2
"""


def system(root: Path, *, swaps: str | None = SWAPS) -> Path:
    files = {
        "proc/meminfo": "MemTotal:  4194304 kB\nMemAvailable: 2097152 kB\nSwapTotal: 4194304 kB\n",
        "proc/self/status": "VmRSS:\t 300000 kB\nRssAnon:\t 204800 kB\nRssFile:\t 95200 kB\n",
        "sys/block/zram0/mm_stat": f"{3 * MIB} 900000 {MIB} 0 1048576 0 0 0 0\n",
        "sys/block/zram1/mm_stat": f"{MIB} 300000 {512 * KIB} 0 1048576 0 0 0 0\n",
        "sys/block/sda/size": "1\n",
    }
    if swaps is not None:
        files["proc/swaps"] = swaps
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_device_with_zram_and_a_swap_file(tmp_path: Path) -> None:
    assert read_ledger(system(tmp_path)) == Ledger(
        total_bytes=4 * GIB,
        available_bytes=2 * GIB,
        swap=Swap(2 * GIB, 512 * KIB),
        zram=Swap(2 * GIB, 4 * MIB),
        zram_held_bytes=MIB + 512 * KIB,
        process_bytes=200 * MIB,
    )


@pytest.mark.parametrize("swaps", [None, SWAPS.splitlines()[0] + "\n"])
def test_a_device_without_swap(swaps: str | None, tmp_path: Path) -> None:
    found = read_ledger(system(tmp_path, swaps=swaps))
    assert (found.swap, found.zram) == (None, None)


def test_this_host() -> None:
    found = read_ledger()
    assert 0 < found.available_bytes <= found.total_bytes
    assert found.process_bytes is None or 0 < found.process_bytes < found.total_bytes


@pytest.mark.parametrize(
    ("available", "reserve"), [(8 * GIB, 8 * GIB // 10), (GIB, 256 * MIB)], ids=["a tenth", "256 MiB"]
)
def test_the_automatic_budget_is_what_is_available_less_a_reserve(available: int, reserve: int) -> None:
    ledger = Ledger(16 * GIB, available, Swap(GIB, 0), None, None, 0)
    assert automatic_budget(ledger, None) == (available - reserve, reserve)
    bounded, _ = automatic_budget(ledger, "gtx750")  # whose default is 400 MiB
    assert bounded == 400 * MIB


def test_a_gpu_with_its_own_memory_bounds_the_automatic_budget() -> None:
    ledger = Ledger(16 * GIB, 8 * GIB, None, None, None, 0, device_bytes=2 * GIB)
    assert automatic_budget(ledger, None) == (2 * GIB - 256 * MIB, 256 * MIB)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(BudgetError, match=r"200\.0 MiB available"):
        automatic_budget(Ledger(GIB, 200 * MIB, Swap(GIB, 0), None, None, 0), None)


def test_rows_leave_out_what_is_unknown() -> None:
    assert ledger_rows(
        Ledger(4 * GIB, 2 * GIB, Swap(GIB, MIB), Swap(GIB, 4 * MIB), 2 * MIB, None, decoding_bytes=0)
    ) == [
        ("memory", "4096.0 MiB, available 2048.0 MiB"),
        ("swap", "1024.0 MiB, used 1.0 MiB"),
        ("zram", "1024.0 MiB, used 4.0 MiB, compressed into 2.0 MiB of memory"),
        ("in it: decoding an image", "0.0 MiB"),
    ]
