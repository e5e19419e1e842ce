"""What a planner knows of a model's instructions: bytes and seconds, by samples and layout, and which layout to take.

Everything is measured once. Times that are compared with each other are scaled alike: of parts of a batch as of the
whole, and of both layouts by a whole step or by none.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from edgetrain.chain import Mode, chain_of
from edgetrain.errors import UsageError
from edgetrain.memory import Costs, Guest, measure_costs
from edgetrain.memory.estimate import DTYPES, Precision
from edgetrain.memory.measured_times import measured_times
from edgetrain.memory.predicted_times import predicted_times
from edgetrain.memory.rates import OperatorRates
from edgetrain.memory.step import Loss, OptimizerFactory
from edgetrain.memory.times import Times
from edgetrain.nn.layouts import check_channels_last, corrupting_convolution
from edgetrain.planner.place import Place
from edgetrain.planner.search import CLOCK_ERROR
from edgetrain.runtime.program import INVERSIONS

_LOG = logging.getLogger(__name__)
_TURNING: tuple[Mode, ...] = (*INVERSIONS, "selective")
"""Modes of an invertible block that would turn what it keeps into the other layout."""


@dataclass(frozen=True)
class Asked:
    """What the arguments of :class:`edgetrain.planner.Planner` say of measuring.

    Attributes:
        channels_last: None: the faster layout, where that may be chosen.
        may_choose: whether results may change by rounding.
        times: of a step, or the rates from which they follow; None: measured, or from the profile's rates.
        guest: what it holds is counted among the weights.
    """

    model: nn.Module
    input_shape: tuple[int, int, int]
    place: Place
    precision: Precision
    optimizer: str | OptimizerFactory
    loss: Loss
    channels_last: bool | Literal["either"] | None
    may_choose: bool
    times: Times | OperatorRates | None
    guest: Guest


class Measures:
    """Bytes and seconds of one model's instructions.

    Args:
        asked: of what, and how.
        samples: of the largest batch that is asked for, on which the layouts are compared.

    Raises:
        UsageError: channels last are asked for, and the model does not run so or the times are of the other layout.
    """

    def __init__(self, asked: Asked, samples: int) -> None:
        self._asked, self._largest = asked, samples
        if asked.channels_last:
            check_channels_last(asked.model)
        if isinstance(asked.times, Times) and asked.channels_last not in (None, asked.times.channels_last):
            raise UsageError(
                found=f"channels_last={asked.channels_last!r} and times that were measured otherwise",
                expected="times of the layout that is asked for",
                action="pass them to measured_times too, or leave one out",
            )
        self._chain = chain_of(asked.model)
        self._any_times: Times | None = None
        self._costs: dict[tuple[int, bool], Costs] = {}
        self._measured: dict[tuple[int, bool], Times] = {}
        self._latest: Times | None = None

    def take_seconds_of(self, other: Measures) -> None:
        """From now on of the seconds only that there are some: those of ``other``, of whatever it measured."""
        self._any_times = other._latest or other._any_times

    def costs(self, samples: int, channels_last: bool = False) -> Costs:
        """Bytes of every instruction on a batch of ``samples``."""
        key, asked = (samples, channels_last), self._asked
        if key not in self._costs:
            own = measure_costs(
                asked.model,
                input_shape=asked.input_shape,
                batch_size=samples,
                dtype=DTYPES[asked.precision],
                optimizer=asked.optimizer,
                loss=asked.loss,
                device=asked.place.kind,
                channels_last=channels_last,
            )
            self._costs[key] = replace(own, weight_bytes=own.weight_bytes + asked.guest.standing_bytes)
        return self._costs[key]

    def times(self, samples: int, channels_last: bool = False) -> Times:
        """Seconds of every instruction on a batch of ``samples``."""
        self._latest = self._times(samples, channels_last)
        return self._latest

    def _times(self, samples: int, channels_last: bool) -> Times:
        asked = self._asked
        if isinstance(asked.times, Times) and asked.times.shapes == self._chain.shapes((samples, *asked.input_shape)):
            return asked.times
        rates = asked.times if isinstance(asked.times, OperatorRates) else asked.place.profile
        if rates is not None:
            return predicted_times(self.costs(samples, channels_last), rates, asked.precision)
        if self._any_times is not None:
            costs = self.costs(samples, channels_last)
            blocks = self._any_times.blocks[-len(costs.blocks) :]
            return replace(self._any_times, shapes=costs.shapes, blocks=blocks, channels_last=channels_last)
        key = samples, channels_last
        if key not in self._measured:
            # of parts of the batch as of the whole: what is compared is scaled alike
            known = next((times for (_, last), times in self._measured.items() if last == channels_last), None)
            self._measured[key] = measured_times(
                asked.model,
                input_shape=asked.input_shape,
                batch_size=samples,
                optimizer=asked.optimizer,
                dtype=DTYPES[asked.precision],
                loss=asked.loss,
                channels_last=channels_last,
                step_ratio=None if known is None else known.step_ratio or 1.0,
            )
        return self._measured[key]

    def timed(self, samples: int, channels_last: bool) -> Times | None:
        """What was measured of a batch of ``samples`` in this layout; None: nothing was."""
        return self._measured.get((samples, channels_last))

    def forbidden(self, samples: int, channels_last: bool) -> Sequence[Sequence[Mode]] | None:
        """For each block the modes that this layout does not allow; None: all do."""
        if not channels_last:
            return None
        return [() if cost.inverts_in_layout else _TURNING for cost in self.costs(samples, channels_last).blocks]

    @functools.cached_property
    def layouts(self) -> tuple[bool, ...]:
        """Whether channels come last, by preference: last, where that is measurably faster, or first."""
        asked = self._asked
        if asked.channels_last == "either":
            return (True, False)
        if asked.channels_last is not None:
            return (asked.channels_last,)
        if isinstance(asked.times, Times):
            return (asked.times.channels_last,)
        timed = asked.times is None and self._any_times is None and asked.place.profile is None
        if not (timed and asked.may_choose and asked.place.kind == "cpu" and self._takes_images):
            return (False,)
        if self.costs(self._largest).draws_by_layout:
            return (False,)  # dropout would drop other elements
        first = self.times(self._largest, False)
        try:
            last = self.times(self._largest, True)
            self.costs(self._largest, True)
        except Exception as error:  # such as a view that takes channels first; the model runs as it is
            _LOG.info("channels stay first: with channels last the model fails (%s)", error)
            self._measured.pop((self._largest, True), None)
            return (False,)
        if (first.step_ratio is None) != (last.step_ratio is None):  # a whole step was timed in one layout alone
            first, last = first.alone(), last.alone()
            self._measured |= {(self._largest, False): first, (self._largest, True): last}
        return (True, False) if last.keep_all_seconds < (1 - CLOCK_ERROR) * first.keep_all_seconds else (False,)

    @property
    def _takes_images(self) -> bool:
        """Whether there are convolutions, all of which run with channels last."""
        model, shape = self._asked.model, self._asked.input_shape
        if len(shape) != 3 or shape[0] == 1:
            return False  # of a single channel it is both first and last
        return any(isinstance(layer, nn.Conv2d) for layer in model.modules()) and corrupting_convolution(model) is None
