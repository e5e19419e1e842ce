"""Single instructions on single blocks, run by the executor's own code under the recorder.

Each instruction gets tensors that nobody else holds. Where it frees one, it has let go of it; afterwards the bench
drops all that the executor keeps by name (z and g), and what is still there is held by the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgetrain.chain import Block
from edgetrain.memory.cuda_allocator import MemoryEvent, Release
from edgetrain.memory.effects import Effect, Key, Layout, Made, Operand, Output, Part
from edgetrain.memory.trace import Call, Recorder
from edgetrain.memory.work import work_of
from edgetrain.nn.layouts import channels_last_strides
from edgetrain.runtime.executor import Execution, Updater
from edgetrain.runtime.program import Backward, Forward, Head, Program, Recompute, Update


@dataclass(frozen=True)
class Form:
    """What a tensor without data is made from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = None

    def make(self) -> Tensor:
        """A new tensor in memory of its own."""
        if self.layout is None:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.empty_strided(self.shape, self.layout, dtype=self.dtype)


def layout_of(tensor: Tensor) -> Layout:
    """Strides of ``tensor``, None if it is contiguous."""
    if tensor.is_contiguous():
        return None
    if tensor.is_contiguous(memory_format=torch.channels_last):  # whatever the stride of a dimension of one element is
        return channels_last_strides(tuple(tensor.shape))
    return tuple(tensor.stride())


@dataclass(frozen=True)
class Given:
    """An output: its block in the trace, its bytes and form."""

    number: int
    nbytes: int
    form: Form


@dataclass(frozen=True)
class Observation:
    """One instruction in the trace.

    Attributes:
        start: mark before it; ``end`` the one after it, ``probed`` the one after all names were dropped.
        operands: blocks of the trace.
        gradients: of the parameters after it, likewise.
    """

    key: Key
    start: int
    end: int
    probed: int
    operands: dict[Operand, int]
    outputs: dict[Operand, Given]
    noted: tuple[Operand, ...] = ()
    gradients: tuple[int, ...] = ()


class Bench(Execution):
    """Runs instructions of one block one by one.

    Args:
        update: called for ``update i``.

    Attributes:
        observations: of the instructions that ran, in order.
    """

    def __init__(self, blocks: Sequence[Block], recorder: Recorder, *, update: Updater) -> None:
        super().__init__(Program((), (), (Head(),)), blocks, update=update)
        self.observations: list[Observation] = []
        self._recorder = recorder
        self._stored: dict[Operand, int] = {}

    def observe(
        self,
        key: Key,
        step: Forward | Recompute | Backward | Update,
        *,
        x: Form | None = None,
        y: Form | None = None,
        dy: Form | None = None,
    ) -> Observation:
        """Runs ``step`` on new tensors in the place of z[i], z[i+1] and g[i+1]."""
        i = step.first if isinstance(step, Recompute) else step.block
        operands = dict(self._stored) if key[0].startswith(("backward saved", "backward selective")) else {}
        if x is not None:
            self._z[i] = x.make()
            operands["x"] = self._recorder.number_of(self._z[i])
        if y is not None:
            self._z[i + 1] = y.make()
            operands["y"] = self._recorder.number_of(self._z[i + 1])
        if dy is not None:
            self._g[i + 1] = dy.make()
            operands["dy"] = self._recorder.number_of(self._g[i + 1])
        start = self._recorder.mark()
        self._run(step)
        end = self._recorder.mark()
        outputs: dict[Operand, Given] = {}
        if isinstance(step, Forward | Recompute):
            outputs["y"] = self._given(self._z[i + 1])
        elif i in self._g:
            outputs["dx"] = self._given(self._g[i])
        if isinstance(step, Backward) and step.how.startswith("invert"):
            outputs["x"] = self._given(self._z[i])
        noted = self._noted(i)
        self._z.clear()
        self._g.clear()
        grads = [p.grad for p in self._blocks[i].module.parameters() if p.grad is not None]
        gradients = tuple(self._recorder.number_of(grad) for grad in grads)
        seen = Observation(key, start, end, self._recorder.mark(), operands, outputs, noted, gradients)
        self._stored = {**operands, **{name: given.number for name, given in outputs.items()}}
        self.observations.append(seen)
        return seen

    def _given(self, tensor: Tensor) -> Given:
        form = Form(tuple(tensor.shape), tensor.dtype, layout_of(tensor))
        return Given(self._recorder.number_of(tensor), tensor.untyped_storage().nbytes(), form)

    def _noted(self, i: int) -> tuple[Operand, ...]:
        storages = self._graphs[i].storages if i in self._graphs else set[int]()
        storages = storages | (self._products[i].storages if i in self._products else set())
        named: list[tuple[Operand, Tensor | None]] = [("x", self._z.get(i)), ("y", self._z.get(i + 1))]
        return tuple(name for name, z in named if z is not None and z.untyped_storage()._cdata in storages)


@dataclass
class History:
    """The expanded trace of many observations.

    Args:
        events: with the number of the call in which each happens, in order.
        observations: all that were made in it.
        calls: the operators of the trace.
        first_inner: number of the first block that an operator takes for itself.
    """

    events: list[tuple[int, MemoryEvent]]
    observations: list[Observation]
    calls: Sequence[Call]
    first_inner: int
    _first: dict[int, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _made: dict[int, int] = field(default_factory=dict)
    _released: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for position, (call, event) in enumerate(self.events):
            self._first.setdefault(call, position)
            if isinstance(event, Release):
                self._released[event.block] = call
            else:
                self._sizes[event.block] = event.nbytes
                self._made[event.block] = call
        self._shared = {n for seen in self.observations for n in seen.operands.values()}
        self._shared |= {given.number for seen in self.observations for given in seen.outputs.values()}
        self._gradients = {number for seen in self.observations for number in seen.gradients}
        self._gradients |= {
            given.number for seen in self.observations for name, given in seen.outputs.items() if name in ("dx", "dy")
        }

    def peak_between(self, start: int, end: int) -> int:
        """Most bytes between two marks, above those at the first."""
        return max(part.peak_bytes for part in self._parts(start, end, {}))

    def effect(self, seen: Observation) -> Effect:
        """What ``seen`` did."""
        operands: dict[int, Operand] = {}
        for name, number in seen.operands.items():
            operands.setdefault(number, name)
        names = dict(operands)
        outputs = []
        for name, given in seen.outputs.items():
            outputs.append(Output(name, given.nbytes, given.form.layout, names.get(given.number)))
            names.setdefault(given.number, name)
        kept = [name for number, name in names.items() if self._released.get(number, seen.probed + 1) > seen.probed]
        parts = self._parts(seen.start, seen.end, operands)
        noted = {names[number] for name, number in _numbers(seen) if name in seen.noted}
        work = work_of(self.calls[seen.start : seen.end])
        return Effect(tuple(parts), tuple(outputs), tuple(kept), tuple(sorted(noted)), work)

    def _parts(self, start: int, end: int, operands: dict[int, Operand]) -> list[Part]:
        parts: list[Part] = []
        level = peak = 0
        made: Counter[str] = Counter()
        at_peak = Made()
        for call, event in self._between(start, end):
            assert start < call <= end
            if not isinstance(event, Release):
                level += event.nbytes
                made[self._use(event.block, start, end)] += event.nbytes
                if level > peak:
                    peak, at_peak = level, Made(**made)
            elif event.block in operands:
                now = Made(**made)
                parts.append(Part(peak, level, operands[event.block], at_peak, now))
                level = peak = 0
                at_peak = now
            elif event.block not in self._shared:
                level -= self._sizes[event.block]
                made[self._use(event.block, start, end)] -= self._sizes[event.block]
        return [*parts, Part(peak, level, None, at_peak, Made(**made))]

    def _use(self, number: int, start: int, end: int) -> str:
        """As what a block serves between two marks: a field of :class:`Made`."""
        if number >= self.first_inner:
            return "inner"
        if number in self._gradients:
            return "gradients"
        inside = self._made[number] > start and self._released.get(number, end + 1) <= end
        return "hidden" if inside else "kept"

    def _between(self, start: int, end: int) -> list[tuple[int, MemoryEvent]]:
        calls = range(start + 1, end + 1)
        position = next((self._first[call] for call in calls if call in self._first), None)
        found: list[tuple[int, MemoryEvent]] = []
        while position is not None and position < len(self.events) and self.events[position][0] <= end:
            found.append(self.events[position])
            position += 1
        return found


def _numbers(seen: Observation) -> list[tuple[Operand, int]]:
    return [*seen.operands.items(), *((name, given.number) for name, given in seen.outputs.items())]
