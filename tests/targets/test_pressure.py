"""Memory pressure, from files of the kernel's that a test writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgetrain.targets.pressure import PressureGauge, read_pressure
from edgetrain.units import MIB

PAGE = os.sysconf("SC_PAGE_SIZE")


class System:
    """A tree of files and a clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.seconds = root, 0.0
        (root / "proc/pressure").mkdir(parents=True)
        self.write()

    def write(self, *, full: float = 0.0, came: int = 0, went: int = 0, available: int = 500) -> None:
        (self.root / "proc/pressure/memory").write_text(
            f"some avg10=90.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={full:.2f} avg60=0.00 avg300=0.00 total=1\n"
        )
        (self.root / "proc/vmstat").write_text(f"nr_free 1\npswpin {came // PAGE}\npswpout {went // PAGE}\nx 2\n")
        (self.root / "proc/meminfo").write_text(f"MemTotal: {1000 * 1024} kB\nMemAvailable: {available * 1024} kB\n")

    def gauge(self) -> PressureGauge:
        return PressureGauge(lambda: read_pressure(self.root), clock=lambda: self.seconds)


def test_readings(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.write(full=12.5, came=3 * MIB, went=5 * MIB)
    found = read_pressure(tmp_path)
    assert (found.stalled, found.swapped_in_bytes, found.swapped_out_bytes) == (0.125, 3 * MIB, 5 * MIB)
    assert (found.available_bytes, found.total_bytes) == (500 * MIB, 1000 * MIB)


def test_a_kernel_that_does_not_say(tmp_path: Path) -> None:
    system = System(tmp_path)
    (tmp_path / "proc/pressure/memory").unlink()
    (tmp_path / "proc/vmstat").unlink()
    gauge = system.gauge()
    assert gauge.reason() is None
    assert gauge.warning() is None


@pytest.mark.parametrize(("full", "pressed"), [(9.0, False), (11.0, True)])
def test_stalls(full: float, pressed: bool, tmp_path: Path) -> None:
    system = System(tmp_path)
    system.write(full=full)
    gauge = system.gauge()
    reason = gauge.reason()
    assert (reason == "every task waited for memory 11% of the last 10 s, above 10%") is pressed
    assert gauge.warning() == reason
    assert gauge.warning() is None


@pytest.mark.parametrize(("came", "went", "pressed"), [(100, 100, True), (0, 100, False), (100, 0, False)])
def test_pages_that_come_back_and_go_again(came: int, went: int, pressed: bool, tmp_path: Path) -> None:
    system = System(tmp_path)
    gauge = system.gauge()
    assert gauge.reason() is None
    system.seconds = 4.0
    system.write(came=came * MIB, went=went * MIB)
    reason = gauge.reason()
    assert (reason is not None and "25.0 MiB/s in, 25.0 MiB/s out" in reason) is pressed


def test_little_left_and_time_to_settle(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.write(available=19)
    gauge = system.gauge()
    assert gauge.reason() == "19.0 MiB of 1000.0 MiB are available, less than 20.0 MiB"
    assert gauge.warning() is None  # short, but nothing thrashes
    for seconds, told in ((0.5, False), (10.0, False), (16.0, True)):
        system.seconds = seconds
        assert (gauge.reason() is not None) is told
