"""Waiting between steps: while a file exists, or while the device is too hot.

With hysteresis: above ``max_celsius`` the run waits until the hottest thermal zone is 5 degrees below it, so that it
does not start and stop with every reading. A device whose zones cannot be read any more does not wait for ever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from edgetrain.errors import UsageError

HYSTERESIS_CELSIUS = 5.0
_ZONES = "/sys/class/thermal"
_PLAUSIBLE_CELSIUS = (-40.0, 150.0)  # zones that are switched off report nonsense
_POLL_SECONDS, _READ_SECONDS = 0.25, 1.0


class Throttle:
    """Says when to wait.

    Args:
        pause_file: the run waits while it exists.
        max_celsius: the run waits while the hottest zone is above.
        read_celsius: gives the temperature of that zone, None where there is none.

    Raises:
        UsageError: a limit, and no thermal zone that can be read.
    """

    def __init__(
        self,
        *,
        pause_file: Path | None = None,
        max_celsius: float | None = None,
        read_celsius: Callable[[], float | None] | None = None,
    ) -> None:
        self._pause_file = pause_file
        self._max_celsius = max_celsius
        self._read_celsius = read_celsius or hottest_celsius
        self._too_hot = False
        self._celsius: float | None = None
        self._read_at = float("-inf")
        if max_celsius is not None and self._read_celsius() is None:
            raise UsageError(
                found=f"a limit of {max_celsius:g} °C and no thermal zone that can be read",
                expected="a temperature from psutil or /sys/class/thermal",
                action="leave --max-temp out on this machine",
            )

    def reason(self) -> str | None:
        """Why to wait now, None where there is no reason."""
        if self._pause_file is not None and self._pause_file.exists():
            return f"{self._pause_file} exists"
        if self._max_celsius is None:
            return None
        if time.monotonic() - self._read_at >= _READ_SECONDS:
            self._celsius, self._read_at = self._read_celsius(), time.monotonic()
        limit = self._max_celsius - (HYSTERESIS_CELSIUS if self._too_hot else 0.0)
        self._too_hot = self._celsius is not None and self._celsius > limit
        if not self._too_hot:
            return None
        return f"{self._celsius:.1f} °C is above {limit:g} °C, goes on at {self._max_celsius - HYSTERESIS_CELSIUS:g} °C"

    def wait(self, *, stopped: Callable[[], bool], tell: Callable[[str | None], None]) -> float:
        """Waits as long as there is a reason and nobody has ``stopped`` it; gives the seconds.

        Args:
            tell: gets the reason at the beginning, and None at the end; neither where there is no wait.
        """
        began, waited = time.monotonic(), False
        while (reason := self.reason()) is not None and not stopped():
            if not waited:
                tell(reason)
            waited = True
            time.sleep(_POLL_SECONDS)
        if not waited:
            return 0.0
        tell(None)
        return time.monotonic() - began


def hottest_celsius() -> float | None:
    """The highest temperature that psutil or the kernel's thermal zones give; None where there is none."""
    import psutil

    found: list[float] = []
    if hasattr(psutil, "sensors_temperatures"):  # not on every system
        with contextlib.suppress(OSError):
            found += [sensor.current for sensors in psutil.sensors_temperatures().values() for sensor in sensors]
    # psutil reads the zones only where there is no other sensor
    for zone in Path(_ZONES).glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    low, high = _PLAUSIBLE_CELSIUS
    return max((value for value in found if low < value < high), default=None)
