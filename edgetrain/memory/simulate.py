"""The memory of a Program, from the costs of its instructions: no tensor, no clock, a few milliseconds.

Follows the executor (:mod:`edgetrain.runtime.executor`) name by name: which z, g and stored graphs there are, who holds
the memory of each, when the last one lets go, and where something is copied because somebody else can see it.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgetrain.errors import ModelError
from edgetrain.memory.costs import Costs
from edgetrain.memory.effects import Effect, Layout, Operand, first_pass, key_of, owned_layout
from edgetrain.runtime.program import (
    DROPPING,
    INVERSIONS,
    SELECTIVE,
    Backward,
    Fetch,
    Forward,
    Free,
    Head,
    How,
    Instruction,
    Keep,
    Offload,
    Place,
    Program,
    Recompute,
    Update,
)

BFLOAT16_BYTES = 2
"""Of one element."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One instruction of a Program.

    Attributes:
        instruction: None: the step of the optimiser after the Program.
        before_bytes: allocated when it begins; ``peak_bytes`` the most while it runs, ``after_bytes`` at its end.
        z: indices of the z that exist at its end; ``g``, ``graphs`` and ``products``, by block, likewise.
    """

    instruction: Instruction | None
    before_bytes: int
    peak_bytes: int
    after_bytes: int
    z: tuple[int, ...]
    g: tuple[int, ...]
    graphs: tuple[int, ...]
    products: tuple[int, ...] = ()


@dataclass(frozen=True)
class Simulation:
    """The memory of one training step.

    Attributes:
        peak_bytes: most bytes allocated at once; weights, state of the optimiser and batch included.
        resident_bytes: those three.
        host_peak_bytes: most bytes offloaded to the host at once, where that is another memory.
        moments: one per instruction, and the optimiser's.
    """

    peak_bytes: int
    resident_bytes: int
    host_peak_bytes: int
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The first moment at which ``peak_bytes`` are reached."""
        return next(moment for moment in self.moments if moment.peak_bytes == self.peak_bytes)

    @property
    def peak_instruction(self) -> Instruction | None:
        """What runs at the peak; None: the step of the optimiser after the Program."""
        return self.peak.instruction


def simulate(program: Program, costs: Costs, *, optimizer_bytes: int | None = None) -> Simulation:
    """The memory of a step of ``program``.

    Args:
        costs: of the same chain, at the Program's batch size.
        optimizer_bytes: state of the optimiser on the device; None: as ``costs`` has it.

    Raises:
        ModelError: the costs are of another chain or batch size, or an instruction needs what is not there.
    """
    check_same_chain(program, costs)
    state = costs.optimizer_bytes if optimizer_bytes is None else optimizer_bytes
    simulator = Simulator(program, costs, costs.weight_bytes + state)
    resident = simulator.resident_bytes
    moments = [simulator.run(step) for step in program.instructions]
    if not updates_in_backward(program):
        after = resident + costs.gradient_bytes
        moments.append(Moment(None, after, after + costs.update_bytes, after, (), (), ()))
    return Simulation(max(m.peak_bytes for m in moments), resident, simulator.host_peak_bytes, tuple(moments))


def check_same_chain(program: Program, costs: Costs) -> None:
    """Raises ModelError where ``costs`` are of another chain or batch size."""
    if (program.names, program.shapes, program.channels_last) != (costs.names, costs.shapes, costs.channels_last):
        raise ModelError(
            found=f"costs of {len(costs.names)} blocks for {_named(costs)}",
            expected=f"those of the program: {len(program.names)} blocks for {_named(program)}",
            action="measure the costs of this model at this input and batch size",
        )


def _named(step: Program | Costs) -> str:
    return f"{step.shapes[0]}" + (" with channels last" if step.channels_last else "")


def updates_in_backward(program: Program) -> bool:
    """Whether the optimiser steps block by block, and not after the Program."""
    return any(isinstance(step, Update) for step in program.instructions)


class Storage:
    """Memory of a tensor.

    Attributes:
        holders: how many things keep it.
        names: how many of them are entries of z and g.
        noted: how many stored graphs are known to need it.
        foreign: whether somebody outside of the step can see it.
    """

    __slots__ = ("foreign", "holders", "names", "nbytes", "noted")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.holders = self.names = self.noted = 0
        self.foreign = False


_Tensor = tuple[Storage, Layout]
Operands = dict[Operand, Storage]


@dataclass(slots=True)
class _Held:
    """What a block keeps: by which instruction, and the shared memory that it holds.

    Attributes:
        layout: of its input; ``out_layout`` of its output.
    """

    stored_by: str
    layout: Layout
    out_layout: Layout
    held: Operands
    noted: list[Storage]


class Simulator:
    """Runs the instructions of a Program one after the other.

    Attributes:
        level: bytes allocated; ``peak``: the most since the last instruction began.
        resident_bytes: of the level, what stays from step to step.
        host_peak_bytes: most bytes offloaded to the host at once.
    """

    def __init__(self, program: Program, costs: Costs, resident_bytes: int) -> None:
        self._costs, self._plain = costs, program.is_plain
        self._shapes = program.shapes
        self._sizes = [_size(shape) * b for shape, b in zip(program.shapes, costs.element_bytes, strict=True)]
        self._z: dict[int, _Tensor] = {}
        self._g: dict[int, _Tensor] = {}
        self._graphs: dict[int, _Held] = {}
        self._products: dict[int, _Held] = {}
        self._first: dict[int, str] = {}
        self._offloaded: dict[int, tuple[Storage, Layout, Place]] = {}
        self._host_bytes = self.host_peak_bytes = 0
        self.level = self.peak = self.resident_bytes = resident_bytes + self._sizes[0]
        batch = Storage(self._sizes[0])
        batch.holders, batch.foreign = 1, True
        layout = costs.input_layout
        self._put(self._z, 0, batch if layout is None else self._new(self._sizes[0]), layout)

    def run(self, step: Instruction) -> Moment:
        """What ``step`` does."""
        before = self.peak = self.level
        try:
            self._run(step)
        except KeyError as missing:
            raise ModelError(
                found=f"{step} without its tensor {missing}",
                expected="a program in which every instruction finds what it needs",
                action="keep, recompute or fetch it before",
            ) from missing
        alive = (tuple(found) for found in (self._z, self._g, self._graphs, self._products))
        return Moment(step, before, self.peak, self.level, *alive)

    def _run(self, step: Instruction) -> None:
        if isinstance(step, Forward):
            self._forward(step.block, step.keep, again=False)
        elif isinstance(step, Backward):
            self._backward(step.block, step.how)
        elif isinstance(step, Free):
            if step.index in self._z:
                self._drop(self._pop(self._z, step.index)[0])
        elif isinstance(step, Recompute):
            for block in range(step.first, step.last + 1):
                self._forward(block, step.keep, again=True)
        elif isinstance(step, Head):
            self._head()
        elif isinstance(step, Offload):
            self._offload(step.index, step.to)
        elif isinstance(step, Fetch):
            self._fetch(step.index)
        elif key_of("update") in self._costs.blocks[step.block].effects:
            self._apply(self._costs.blocks[step.block].effect(key_of("update")), {})

    def _forward(self, i: int, keep: Keep, *, again: bool) -> None:
        block = self._costs.blocks[i]
        in_place = block.invertible and keep in DROPPING
        if in_place:
            layout = self._owned_layout(i, self._z[i][1])
            x = self._own(self._z, i, layout)
        elif keep in DROPPING:
            x, layout = self._pop(self._z, i)
        else:
            x, layout = self._z[i]
        if again:
            key = key_of(f"recompute {keep}", after=self._first[i], x=layout)
        else:
            key = key_of(f"forward {keep}", x=layout)
            self._first[i] = first_pass(keep)
        effect = block.effect(key)
        operands: Operands = {"x": x}
        self._apply(effect, operands)
        if keep not in ("input", "nothing"):
            held = {operand: operands[operand] for operand in effect.kept}
            out_layout = next(output.layout for output in effect.outputs if output.name == "y")
            found = _Held(key[0], layout, out_layout, held, [operands[operand] for operand in effect.noted])
            (self._graphs if keep == "all" else self._products)[i] = found
            for storage in found.noted:
                storage.noted += 1
        self._name(effect, operands, self._z, i + 1, "y")
        if keep in DROPPING:
            self._let_go(effect, operands, "x")

    def _head(self) -> None:
        last = len(self._costs.blocks)
        y, layout = self._z[last]
        y.foreign = True
        effect = self._costs.heads.get(layout)
        if effect is None:
            raise KeyError(f"z[{last}]")
        operands: Operands = {"y": y}
        self._apply(effect, operands)
        operands["dy"].foreign = True
        self._name(effect, operands, self._g, last, "dy")
        if self._plain and "dy" in effect.kept:  # the function around the chain would hold it to the end
            self._drop(operands["dy"])

    def _backward(self, i: int, how: How) -> None:
        block = self._costs.blocks[i]
        operands: Operands
        taken: tuple[Operand, ...]
        if how == "saved" or how in SELECTIVE:
            found = (self._graphs if how == "saved" else self._products).pop(i)
            for storage in found.noted:
                storage.noted -= 1
            x_layout = found.layout
            if how != "saved":  # z[i] stays, and may have come back in another layout
                found.held["x"], x_layout = self._z[i]
            if how == "selective" and block.invertible:
                layout = self._owned_layout(i, found.out_layout, of=i + 1)
                dy = self._own(self._g, i + 1, layout)
            else:
                dy, layout = self._pop(self._g, i + 1)
            effect = block.effect(key_of(f"backward {how}", after=found.stored_by, x=x_layout, dy=layout))
            operands = {**found.held, "dy": dy}
            taken = tuple(name for name in operands if how == "saved" or name != "x")
        elif how == "recompute":
            x, x_layout = self._z[i]
            dy, layout = self._pop(self._g, i + 1)
            effect = block.effect(key_of("backward recompute", after=self._first[i], x=x_layout, dy=layout))
            operands, taken = {"x": x, "dy": dy}, ("dy",)
        else:
            layout = self._owned_layout(i, self._z[i + 1][1], of=i + 1)
            y, dy = self._own(self._z, i + 1, layout), self._own(self._g, i + 1, layout)
            after = self._products.pop(i).stored_by if how == "invert_selective" else ""
            effect = block.effect(key_of(f"backward {how}", after=after, dy=layout))
            operands, taken = {"y": y, "dy": dy}, ("y", "dy")
        self._apply(effect, operands)
        self._name(effect, operands, self._g, i, "dx")
        if how in INVERSIONS:
            self._name(effect, operands, self._z, i, "x")
        self._let_go(effect, operands, *taken)

    def _offload(self, index: int, place: Place) -> None:
        storage, layout = self._pop(self._z, index)
        if place == "bfloat16" or (place == "host" and self._costs.device == "cpu"):
            halves = self._sizes[index] // self._costs.element_bytes[index] * BFLOAT16_BYTES
            copy = self._new(halves if place == "bfloat16" else self._sizes[index])
            copy.holders += 1
        else:
            copy = Storage(self._sizes[index])
        if place == "host":
            self._host_bytes += 0 if self._costs.device == "cpu" else copy.nbytes
            self.host_peak_bytes = max(self.host_peak_bytes, self._host_bytes)
        self._offloaded[index] = copy, layout, place
        self._drop(storage)

    def _fetch(self, index: int) -> None:
        storage, layout, place = self._offloaded.pop(index)
        if place == "host" and storage.holders:  # the host's memory is the device's
            self._put(self._z, index, storage, layout)
        else:
            self._put(self._z, index, self._new(self._sizes[index]), layout)
        if storage.holders:
            self._drop(storage)
        elif place == "host":
            self._host_bytes -= storage.nbytes

    def _owned_layout(self, i: int, layout: Layout, *, of: int | None = None) -> Layout:
        """In which block i takes a z or g that comes in ``layout``: that of its input, or of index ``of``."""
        return owned_layout(self._shapes[i if of is None else of], layout, keeps=self._costs.blocks[i].keeps_layout)

    def _own(self, tensors: dict[int, _Tensor], i: int, layout: Layout) -> Storage:
        """Memory of ``tensors[i]``, taken out, in ``layout``: a copy where the executor copies."""
        storage, given = self._pop(tensors, i)
        if given == layout and not (storage.names or storage.noted or storage.foreign):
            return storage
        copy = self._new(self._sizes[i], storage)
        copy.holders += 1
        self._drop(storage)
        return copy

    def _apply(self, effect: Effect, operands: Operands) -> None:
        """Runs an instruction; its outputs join ``operands``."""
        level, peak = self.level, self.peak
        for part in effect.parts:
            peak = max(peak, level + part.peak_bytes)
            level += part.net_bytes
            if part.releases is not None:
                storage = operands[part.releases]
                storage.holders -= 1
                if not storage.holders:
                    level -= storage.nbytes
        self.level, self.peak = level, peak
        for output in effect.outputs:
            operands[output.name] = Storage(output.nbytes) if output.inside is None else operands[output.inside]
        for operand in effect.kept:
            operands[operand].holders += 1

    def _name(self, effect: Effect, operands: Operands, tensors: dict[int, _Tensor], i: int, name: Operand) -> None:
        for output in effect.outputs:
            if output.name == name:
                self._put(tensors, i, operands[name], output.layout)

    def _let_go(self, effect: Effect, operands: Operands, *taken: Operand) -> None:
        """Drops what the instruction was given and did not let go of itself: it went into an output."""
        released = {part.releases for part in effect.parts}
        for name in taken:
            if name not in released:
                self._drop(operands[name])

    def _new(self, nbytes: int, like: Storage | None = None) -> Storage:
        """New memory, in which something of ``like`` will be."""
        self.level += nbytes
        self.peak = max(self.peak, self.level)
        return Storage(nbytes)

    def _put(self, tensors: dict[int, _Tensor], i: int, storage: Storage, layout: Layout) -> None:
        storage.names += 1
        storage.holders += 1
        if i in tensors:
            self._drop(self._pop(tensors, i)[0])
        tensors[i] = storage, layout

    def _pop(self, tensors: dict[int, _Tensor], i: int) -> _Tensor:
        storage, layout = tensors.pop(i)
        storage.names -= 1
        return storage, layout

    def _drop(self, storage: Storage) -> None:
        storage.holders -= 1
        if not storage.holders:
            self._free(storage)

    def _free(self, storage: Storage) -> None:
        self.level -= storage.nbytes


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
