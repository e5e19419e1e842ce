"""What the memory of a Program consists of, instruction by instruction: :func:`edgetrain.memory.simulate`, by kind.

Every byte that the simulation counts is one of

    weights, optimiser, batch      there before the step, and to its end
    gradients                      of parameters, and of activations on their way back
    kept activations               z[i], what autograd or a block's products hold, and what waits offloaded nearby
    hidden activations             what an instruction makes and lets go of before it ends
    temporaries                    what an operator takes for itself; what the loss and the optimiser's step take

so the kinds add up to the peak of each instruction exactly. Where several moments of an instruction have the same
peak, the first one counts.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from edgetrain.memory.costs import Costs
from edgetrain.memory.effects import Effect, Made
from edgetrain.memory.simulate import Operands, Simulator, Storage, check_same_chain, updates_in_backward
from edgetrain.runtime.program import Head, Instruction, Program, Update


@dataclass(frozen=True)
class Composition:
    """Bytes at the peak of one instruction.

    Attributes:
        instruction: None: the step of the optimiser after the Program.
    """

    instruction: Instruction | None
    weights: int
    optimizer: int
    batch: int
    gradients: int
    kept: int
    hidden: int
    temporaries: int

    @property
    def peak_bytes(self) -> int:
        """All of them."""
        always = self.weights + self.optimizer + self.batch
        return always + self.gradients + self.kept + self.hidden + self.temporaries


def compose(program: Program, costs: Costs) -> tuple[Composition, ...]:
    """One entry per instruction of ``program``, and one for the optimiser where it steps after them.

    Raises:
        ModelError: as :func:`edgetrain.memory.simulate`.
    """
    check_same_chain(program, costs)
    composer = _Composer(program, costs, costs.weight_bytes + costs.optimizer_bytes)
    found = [_composition(costs, step, composer.made_by(step)) for step in program.instructions]
    if not updates_in_backward(program):
        at_end = Made(kept=_batch_bytes(costs), gradients=costs.gradient_bytes, inner=costs.update_bytes)
        found.append(_composition(costs, None, at_end))
    return tuple(found)


def _composition(costs: Costs, step: Instruction | None, made: Made) -> Composition:
    outside = step is None or isinstance(step, Head | Update)  # nothing there is an activation of a block
    hidden, temporaries = (0, made.hidden + made.inner) if outside else (made.hidden, made.inner)
    return Composition(
        instruction=step,
        weights=costs.weight_bytes,
        optimizer=costs.optimizer_bytes,
        batch=_batch_bytes(costs),
        gradients=made.gradients,
        kept=made.kept - _batch_bytes(costs),
        hidden=hidden,
        temporaries=temporaries,
    )


def _batch_bytes(costs: Costs) -> int:
    return math.prod(costs.shapes[0]) * costs.element_bytes[0]


class _Composer(Simulator):
    """The simulation, with a tally of what its level consists of."""

    def __init__(self, program: Program, costs: Costs, resident_bytes: int) -> None:
        self._gradient_storages: set[Storage] = set()
        self._now = self._at_peak = Made(kept=_batch_bytes(costs))
        super().__init__(program, costs, resident_bytes)

    def made_by(self, step: Instruction) -> Made:
        """What is there at the peak of ``step``, weights and state of the optimiser left out."""
        self._at_peak = self._now
        self.run(step)
        return self._at_peak

    def _apply(self, effect: Effect, operands: Operands) -> None:
        start, level, peak = self._now, self.level, self.peak
        freed = Made()
        holders = {storage: storage.holders for storage in operands.values()}
        for part in effect.parts:
            if level + part.peak_bytes > peak:
                peak = level + part.peak_bytes
                self._at_peak = _sum(start, freed, part.at_peak)
            level += part.net_bytes
            if part.releases is not None:
                storage = operands[part.releases]
                holders[storage] -= 1
                if not holders[storage]:
                    level -= storage.nbytes
                    freed = _sum(freed, self._tally(storage, -storage.nbytes))
        super()._apply(effect, operands)
        for output in effect.outputs:
            if output.inside is None and output.name in ("dx", "dy"):
                self._gradient_storages.add(operands[output.name])
        self._now = _sum(start, freed, effect.parts[-1].at_end)

    def _new(self, nbytes: int, like: Storage | None = None) -> Storage:
        peak = self.peak
        storage = super()._new(nbytes, like)
        if like in self._gradient_storages:
            self._gradient_storages.add(storage)
        self._now = _sum(self._now, self._tally(storage, nbytes))
        if self.peak > peak:
            self._at_peak = self._now
        return storage

    def _free(self, storage: Storage) -> None:
        super()._free(storage)
        self._now = _sum(self._now, self._tally(storage, -storage.nbytes))

    def _tally(self, storage: Storage, nbytes: int) -> Made:
        return Made(gradients=nbytes) if storage in self._gradient_storages else Made(kept=nbytes)


def _sum(*made: Made) -> Made:
    return Made(*(sum(amounts) for amounts in zip(*map(astuple, made), strict=True)))
