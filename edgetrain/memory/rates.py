"""How fast a device works, as far as its profile says: what turns work into seconds.

The roofline model (S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009): an operator takes as long as its arithmetic or its memory traffic,
whichever is longer, and the time to start it.

A calibrated profile (``edgetrain calibrate``) holds rates that were measured. A profile from data sheets holds peaks;
the shares of them that training reaches, and what nobody publishes, are assumptions of this module, in its constants.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.errors import UsageError
from edgetrain.memory.work import Work

if TYPE_CHECKING:
    from edgetrain.profiles import Profile
    from edgetrain.profiles.profile import Precision

PEAK_RATE_SHARE = 0.5
"""Assumed share of the arithmetic peak that convolutions reach."""

PEAK_BANDWIDTH_SHARE = 0.75
"""Assumed share of the peak bandwidth that an addition of two tensors reaches."""

START_SECONDS: dict[str, float] = {"cpu": 5e-6, "cuda": 10e-6}
"""Assumed time to start an operator, Python and autograd included."""

INSTRUCTION_SECONDS = 1e-4
"""Assumed time of the executor's Python, or the optimiser's, around the operators of an instruction."""

BUS_BYTES_PER_SECOND = 6e9
"""Assumed rate of copies between a graphics card and pageable host memory, PCI Express 3.0 x16."""


@dataclass(frozen=True)
class OperatorRates:
    """Rates of a device at one precision.

    Attributes:
        flops_per_s: of convolutions by channels, at least one entry; matrix products go by the same.
        bytes_per_s: of the memory, read and written.
        copy_bytes_per_s: of a tensor to the host, or back.
        start_s: until an operator runs.
        instruction_s: of an instruction, besides its operators.
        name: of the device.
    """

    flops_per_s: Mapping[int, float]
    bytes_per_s: float
    copy_bytes_per_s: float
    start_s: float
    instruction_s: float
    name: str

    def seconds(self, work: Iterable[Work]) -> float:
        """Seconds of an instruction that consists of ``work``, one operator after the other; 0 without any."""
        taken = [part.calls * self._seconds_of_call(part) for part in work]
        return math.fsum(taken) + self.instruction_s if taken else 0.0

    @property
    def rounding_bytes_per_s(self) -> float:
        """Of a float32 tensor to bfloat16, or back: reads and writes one and a half times its bytes."""
        return self.bytes_per_s / 1.5

    def rate_at(self, channels: int) -> float:
        """Operations per second with ``channels``: between two entries on a straight line of logarithms."""
        known = sorted(self.flops_per_s)
        if channels <= known[0] or len(known) == 1:
            return self.flops_per_s[known[0]]
        for low, high in itertools.pairwise(known):
            if channels <= high:
                share = math.log(channels / low) / math.log(high / low)
                return float(self.flops_per_s[low] ** (1 - share) * self.flops_per_s[high] ** share)
        return self.flops_per_s[known[-1]]

    def _seconds_of_call(self, work: Work) -> float:
        arithmetic = work.flops / self.rate_at(work.channels) if work.flops else 0.0
        return max(arithmetic, work.moved_bytes / self.bytes_per_s) + self.start_s


def rates_of(profile: Profile, precision: Precision = "fp32") -> OperatorRates:
    """The rates of ``profile``: measured ones where it has them, assumed shares of its peaks elsewhere.

    Raises:
        UsageError: the profile knows neither.
    """
    from edgetrain.profiles.profile import amount

    peak = profile.rate_flops(precision)
    measured = profile.convolution.get(precision, {})
    flops = {channels: amount(f"convolution.{precision}", rate) for channels, rate in measured.items()}
    if not flops and peak is not None:
        flops = {1: peak * PEAK_RATE_SHARE}
    bandwidth = profile.bandwidth_bytes_per_second
    addition = profile.elementwise.get(precision)
    moved = None if bandwidth is None else bandwidth * PEAK_BANDWIDTH_SHARE
    if addition is not None:
        moved = amount(f"elementwise.{precision}", addition)
    if not flops or moved is None:
        missing = "rate" if not flops else "memory bandwidth"
        raise UsageError(
            found=f"profile {profile.name} without a {missing} for {precision}",
            expected="a profile that says how fast the device is",
            action="run edgetrain calibrate on the device, or add rates and bandwidth to the profile",
        )
    one_memory = profile.unified or profile.kind == "cpu"
    # a copy inside one memory reads and writes every byte
    copy = moved / 2 if one_memory else BUS_BYTES_PER_SECOND
    return OperatorRates(flops, moved, copy, START_SECONDS[profile.kind], INSTRUCTION_SECONDS, profile.name)
