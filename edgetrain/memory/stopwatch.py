"""Single instructions on single blocks, run for real by the executor's own code and timed.

A block runs short sequences that begin with its forward pass, as in a step: stored, recomputed from its input with and
without the results of its products, and inverted in each way that it allows. What the step would drop after an
instruction is dropped while the clock runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetrain.chain import Block
from edgetrain.memory.step import Loss
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.layouts import channels_last_strides
from edgetrain.nn.lean import lean_operators_in
from edgetrain.runtime.executor import Execution, Updater
from edgetrain.runtime.offload import offload
from edgetrain.runtime.program import INVERSIONS, SELECTIVE, Backward, Forward, Head, Place, Program, Update, kept_by

_COPIES = 3

Step = Forward | Backward | Update
Clock = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """One example of a tensor between two blocks; a batch is made of it.

    Attributes:
        shape: of a batch.
        strides: likewise.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_channels_last(self) -> bool:
        """Whether it is laid out so, without holes."""
        return len(self.shape) == 4 and self.strides == channels_last_strides(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        """What ``tensor`` looks like."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def make(self) -> Tensor:
        """Normal random numbers, or zeros where they are no floating point numbers; in memory of its own."""
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return tensor.normal_() if self.dtype.is_floating_point else tensor.zero_()


class Stopwatch(Execution):
    """Times the instructions of block ``i`` one after the other.

    Args:
        update: called for ``update i``.
        clock: seconds since some moment.
    """

    def __init__(self, blocks: Sequence[Block], i: int, *, update: Updater, clock: Clock) -> None:
        super().__init__(Program((), (), (Head(),)), blocks, update=update)
        self._i, self._clock = i, clock

    def time(self, sequence: Sequence[Step], x: Sample) -> tuple[list[float], Sample]:
        """Seconds of each instruction of ``sequence``, which begins with a forward pass from ``x``; and its output."""
        i = self._i
        self._z[i] = x.make()
        if i == 0:  # the batch belongs to the caller
            self._foreign.add(int(self._z[i].untyped_storage()._cdata))
        y = x
        taken = []
        for step in sequence:
            if isinstance(step, Backward):
                for parameter in self._blocks[i].module.parameters():
                    parameter.grad = None
                strides = y.strides if y.has_channels_last else _contiguous(y.shape)
                self._g[i + 1] = Sample(y.shape, strides, y.dtype, y.device).make()
            _wait_for(x.device)
            began = self._clock()
            self._run(step)
            self._drop_after(step)
            _wait_for(x.device)
            taken.append(self._clock() - began)
            if isinstance(step, Forward):
                y = Sample.of(self._z[i + 1])
        self._z.clear()
        self._g.clear()
        for parameter in self._blocks[i].module.parameters():
            parameter.grad = None
        return taken, y

    def _drop_after(self, step: Step) -> None:
        if isinstance(step, Forward):
            if step.keep not in ("products", "all_products", "input"):
                self._z.pop(self._i, None)
        else:
            self._z.pop(self._i + 1, None)


def sequences(block: Block, i: int, *, update: bool) -> list[list[Step]]:
    """What is timed of ``block``: every instruction that it allows."""
    found: list[list[Step]] = [[Forward(i, "all"), Backward(i, "saved")]]
    if update:
        found[0].append(Update(i))
    if block.allows("recompute"):
        found.append([Forward(i, "input"), Backward(i, "recompute")])
    found += [[Forward(i, keep), Backward(i, how)] for how, keep in SELECTIVE.items() if block.allows(how)]
    if isinstance(block.module, Invertible):
        for how in INVERSIONS:
            if block.allows(how):
                found.append([Forward(i, kept_by(how)), Backward(i, how)])
    elif not block.allows("recompute"):
        found.append([Forward(i, "nothing")])
    return found


def head_seconds(y: Sample, loss: Loss, clock: Clock) -> float:
    """Seconds of ``loss`` from the model's output, forward and backward."""
    logits = y.make().requires_grad_()
    _wait_for(y.device)
    began = clock()
    with torch.enable_grad():
        loss(logits).backward()
    _wait_for(y.device)
    return clock() - began


def keep_all_seconds(blocks: Sequence[Block], x: Sample, loss: Loss, clock: Clock) -> float:
    """Seconds of a step from ``x`` that stores every block, the loss included, the optimiser left out."""
    batch = x.make()
    _wait_for(x.device)
    began = clock()
    with torch.enable_grad():
        y = batch
        for block in blocks:
            with lean_operators_in(block.module):
                y = block.module(y)
        loss(y).backward()
    _wait_for(x.device)
    seconds = clock() - began
    for block in blocks:
        for parameter in block.module.parameters():
            parameter.grad = None
    return seconds


def copy_rate(z: Sample, place: Place, clock: Clock) -> float:
    """Bytes of ``z`` per second to ``place``, or back: the mean of the two ways."""
    taken = []
    for _ in range(_COPIES):
        tensor = z.make()
        _wait_for(z.device)
        began = clock()
        offload(tensor, place).fetch()
        _wait_for(z.device)
        taken.append(clock() - began)
    return 2 * z.nbytes / min(taken)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
