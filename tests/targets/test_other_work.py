"""What other processes took of the processors: from files that a test writes, and from a process that it starts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetrain.targets.other_work import ProcessorTicks, others_share, processor_ticks


def system(root: Path, stat: str, own: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/stat").write_text(stat)
    (root / "proc/self/stat").write_text(own)
    return root


def test_ticks_are_those_of_the_kernels_files(tmp_path: Path):
    root = system(
        tmp_path,
        # user nice system idle iowait irq softirq steal guest guest_nice; guests are in user and nice already
        "cpu  100 20 30 400 50 6 7 8 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n",
        "42 (a name) with ) spaces) S 1 42 42 0 -1 4194560 100 0 0 0 60 11 0 0 20 0 1 0 1000\n",
    )
    assert processor_ticks(root) == ProcessorTicks(total=621, busy=171, own=71)


def test_a_system_without_the_files_gives_none(tmp_path: Path):
    assert processor_ticks(tmp_path) is None
    assert others_share(None, ProcessorTicks(1000, 500, 100)) is None


@pytest.mark.parametrize(
    ("after", "share"),
    [
        (ProcessorTicks(1100, 600, 150), 0.5),  # of 100 ticks all were busy, 50 of this process
        (ProcessorTicks(1200, 600, 200), 0.0),
        (ProcessorTicks(1200, 550, 160), 0.0),  # a process is charged later than its processor: never below none
        (ProcessorTicks(1040, 540, 100), None),  # too short to tell
    ],
)
def test_share_is_of_all_processors_less_ones_own(after: ProcessorTicks, share: float | None):
    assert others_share(ProcessorTicks(1000, 500, 100), after) == share


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts in /proc/stat")
def test_a_busy_process_is_seen():
    before = processor_ticks()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(2.0)
        used = Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()
        after = processor_ticks()
    finally:
        busy.kill()
        busy.wait()
    share = others_share(before, after)
    assert before is not None
    assert after is not None
    assert share is not None
    assert share * (after.total - before.total) >= 0.8 * (int(used[11]) + int(used[12])) > 0
