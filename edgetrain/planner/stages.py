"""What the dynamic programme knows of a chain: a few bytes and seconds per block.

The numbers are those of the exact simulation (:mod:`edgetrain.memory.simulate`), boiled down: every instruction has one
peak above what is there when it begins. What is lost by that (copies for other layouts, memory that an instruction
frees half way) the search makes good by simulating what it finds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgetrain.chain import Block, Mode
from edgetrain.memory import BlockCosts, Costs
from edgetrain.memory.effects import Effect, Operand
from edgetrain.memory.simulate import BFLOAT16_BYTES
from edgetrain.memory.times import BlockTimes, Times
from edgetrain.runtime.offload import can_be_rounded
from edgetrain.runtime.program import INVERSIONS, SELECTIVE, Inversion, Place, Selective, kept_by


@dataclass(frozen=True)
class Way:
    """One way to get z[i] and g[i] from z[i+1] and g[i+1].

    Attributes:
        peak_bytes: most bytes above the two it starts from and ``held_bytes``.
        held_bytes: what the forward pass leaves for it besides z[i+1].
        forward_seconds: of that pass; ``forward_bytes`` its most bytes above z[i], z[i+1] among them.
    """

    how: Inversion
    seconds: float
    peak_bytes: int
    held_bytes: int
    forward_seconds: float
    forward_bytes: int


@dataclass(frozen=True)
class Selection:
    """Keeping z[i] and the results of a block's products, and running the rest of it again.

    Attributes:
        how: which results.
        products_bytes: what the forward pass leaves besides z[i] and z[i+1].
        keeps_output: whether one of the results is in the memory of z[i+1].
        forward_bytes: most bytes of the forward pass above z[i]; z[i+1] among them.
        backward_bytes: of the backward pass, above all that is kept and g[i+1].
    """

    how: Selective
    products_bytes: int
    keeps_output: bool
    forward_seconds: float
    forward_bytes: int
    backward_seconds: float
    backward_bytes: int


@dataclass(frozen=True)
class Stage:
    """One block.

    Attributes:
        output_bytes: of z[i+1], and of its gradient.
        saved_bytes: what ``forward all`` leaves besides z[i] and z[i+1].
        keeps_input: whether what it saved holds z[i]; ``keeps_output``: z[i+1].
        forward_seconds: of a pass that keeps z[i], ``forward_bytes`` its most bytes above z[i]; z[i+1] among them.
        dropping_seconds: of one that lets z[i] go, ``dropping_bytes`` likewise.
        forward_all_bytes: of one that keeps what autograd saves.
        backward_bytes: of ``backward saved``, above all that is kept and g[i+1].
        recompute_bytes: of ``backward recompute``, above z[i] and g[i+1].
        recompute_seconds: of it; None where the block cannot be run again.
        gradient_bytes: of its parameters, which its backward pass leaves.
        ways: of inverting it.
        selections: of the results that are kept.
    """

    output_bytes: int
    saved_bytes: int
    keeps_input: bool
    keeps_output: bool
    forward_seconds: float
    forward_all_seconds: float
    forward_bytes: int
    dropping_seconds: float
    dropping_bytes: int
    forward_all_bytes: int
    backward_seconds: float
    backward_bytes: int
    recompute_seconds: float | None
    recompute_bytes: int
    gradient_bytes: int
    ways: tuple[Way, ...] = ()
    selections: tuple[Selection, ...] = ()


@dataclass(frozen=True)
class Away:
    """Where a checkpoint can wait, other than as it is.

    Attributes:
        held_bytes: of z[0] ... z[L], what each takes of the device meanwhile; None: it cannot go there.
        seconds_per_byte: one way, by the bytes of the tensor itself.
        exact: whether it comes back as it was; else it is rounded.
    """

    to: Place
    held_bytes: tuple[int | None, ...]
    seconds_per_byte: float
    exact: bool


@dataclass(frozen=True)
class Problem:
    """A chain for the dynamic programme.

    Attributes:
        input_bytes: of z[0], the batch, which is the caller's.
        head_bytes: most bytes of the loss above z[L]; g[L] among them.
        head_seconds: of the loss.
        reach: for each block j the first block s such that z[s] is still good enough when blocks j..s are inverted
            from an exact z[j+1].
        rounded_reach: likewise from a z[j+1] that was rounded; asked for only where one of ``places`` rounds.
        places: where checkpoints can wait.
        gradients_stay: whether the gradients of all blocks are there until the end of the step.
    """

    stages: tuple[Stage, ...]
    input_bytes: int
    head_bytes: int
    head_seconds: float
    reach: tuple[int, ...]
    rounded_reach: tuple[int, ...] = ()
    places: tuple[Away, ...] = ()
    gradients_stay: bool = True

    @property
    def rounds(self) -> bool:
        """Whether one of the places does not give back what it got."""
        return not all(place.exact for place in self.places)

    @property
    def activation_bytes(self) -> tuple[int, ...]:
        """Of z[0] ... z[L]."""
        return (self.input_bytes, *(stage.output_bytes for stage in self.stages))

    @property
    def gradients_after(self) -> tuple[int, ...]:
        """For each i bytes of the parameters' gradients of blocks i, i+1, ..."""
        sums = [0]
        for stage in reversed(self.stages):
            sums.append(sums[-1] + (stage.gradient_bytes if self.gradients_stay else 0))
        return tuple(reversed(sums))


def problem_of(
    blocks: Sequence[Block],
    costs: Costs,
    times: Times,
    *,
    reach: Sequence[int] | None = None,
    rounded_reach: Sequence[int] | None = None,
    too_noisy: Sequence[Collection[Mode]] | None = None,
    offload: bool = False,
    stored_bfloat16: bool = False,
    update_in_backward: bool = False,
) -> Problem:
    """The problem of choosing for ``blocks``.

    Args:
        costs: bytes of their instructions.
        times: seconds of their instructions.
        reach: as in :class:`Problem`, like ``rounded_reach``; None: an inversion has no noise worth speaking of.
        too_noisy: for each block the modes that noise forbids; None: none.
        offload: whether activations may go to the memory of the host.
        stored_bfloat16: whether they may be kept in bfloat16.
        update_in_backward: whether the optimiser steps block by block.
    """
    sizes = [_count(s) * b for s, b in zip(costs.shapes, costs.element_bytes, strict=True)]
    stages = []
    for i, block in enumerate(blocks):
        cost, time = costs.blocks[i], times.blocks[i]
        storing, saved = _named(cost, "forward all"), _named(cost, "backward saved after forward all")
        recompute = block.allows("recompute")
        again = _named(cost, "backward recompute after input") if recompute else None
        after = 0
        if update_in_backward:
            update = cost.effects.get(("update", None, None))
            after = max(0, sizes[i] - sizes[i + 1]) + cost.gradient_bytes + (update.peak_bytes if update else 0)
        noisy = () if too_noisy is None else too_noisy[i]
        ways = [_way(how, cost, time, sizes, i, after) for how in INVERSIONS if block.allows(how) and how not in noisy]
        stages.append(
            Stage(
                output_bytes=sizes[i + 1],
                saved_bytes=max(0, cost.saved_bytes),
                keeps_input="x" in storing.kept,
                keeps_output="y" in storing.kept,
                forward_seconds=time.forward,
                forward_all_seconds=time.forward_all,
                forward_bytes=_peak(_named(cost, "forward input"), sizes, i, set()) if recompute else 0,
                dropping_seconds=time.forward if time.forward_in_place is None else time.forward_in_place,
                dropping_bytes=_peak(_named(cost, "forward nothing"), sizes, i, {"x"}),
                forward_all_bytes=_peak(storing, sizes, i, set()),
                backward_seconds=time.backward_saved,
                backward_bytes=max(after, _peak(saved, sizes, i, {"dy", "x", "y"})),
                recompute_seconds=time.backward_recompute if recompute else None,
                recompute_bytes=max(after, _peak(again, sizes, i, {"dy"})) if again else 0,
                gradient_bytes=cost.gradient_bytes,
                ways=tuple(ways),
                selections=() if "selective" in noisy else _selections(block, cost, time, sizes, i, after),
            )
        )
    places = []
    if offload:
        places.append(Away("host", (0,) * len(sizes), 1 / times.copy_bytes_per_s, exact=True))
    if stored_bfloat16:
        rounded = [
            _count(shape) * BFLOAT16_BYTES if can_be_rounded(dtype) else None
            for shape, dtype in zip(costs.shapes, costs.dtypes, strict=True)
        ]
        places.append(Away("bfloat16", tuple(rounded), 1 / times.rounding_bytes_per_s, exact=False))
    head = next(iter(costs.heads.values()))
    return Problem(
        stages=tuple(stages),
        input_bytes=sizes[0],
        head_bytes=head.peak_bytes,
        head_seconds=times.head,
        reach=tuple(reach) if reach is not None else (0,) * len(stages),
        rounded_reach=tuple(rounded_reach) if rounded_reach is not None else (0,) * len(stages),
        places=tuple(places),
        gradients_stay=not update_in_backward,
    )


def _way(how: Inversion, cost: BlockCosts, time: BlockTimes, sizes: Sequence[int], i: int, after: int) -> Way:
    """``after``: bytes above what is held, z[i] and g[i], that are needed once the gradients are there."""
    forward = f"forward {kept_by(how)}"
    selective = how == "invert_selective"
    backward = f"backward {how} after {forward}" if selective else f"backward {how}"
    seconds, forward_seconds = time.backward_seconds(how), time.forward_seconds(kept_by(how))
    assert seconds is not None
    assert forward_seconds is not None
    return Way(
        how,
        seconds=seconds,
        peak_bytes=max(after, _peak(_named(cost, backward), sizes, i, set())),
        held_bytes=max(0, cost.products_only_bytes) if selective else 0,
        forward_seconds=forward_seconds,
        forward_bytes=_peak(_named(cost, forward), sizes, i, {"x"}),
    )


def _selections(
    block: Block, cost: BlockCosts, time: BlockTimes, sizes: Sequence[int], i: int, after: int
) -> tuple[Selection, ...]:
    """Those that differ in what they keep.

    Args:
        after: bytes above z[i] and g[i+1] that are needed once the gradients are there.
    """
    found: dict[int, Selection] = {}
    for how, keep in SELECTIVE.items():
        forward_seconds, backward_seconds = time.forward_seconds(keep), time.backward_seconds(how)
        if not block.allows(how) or forward_seconds is None or backward_seconds is None:
            continue
        forward, backward = _named(cost, f"forward {keep}"), _named(cost, f"backward {how} after forward {keep}")
        kept = max(0, cost.products_bytes(how))
        selection = Selection(
            how=how,
            products_bytes=kept,
            keeps_output="y" in forward.kept,
            forward_seconds=forward_seconds,
            forward_bytes=_peak(forward, sizes, i, set()),
            backward_seconds=backward_seconds,
            backward_bytes=max(after, _peak(backward, sizes, i, {"dy", "y"})),
        )
        found.setdefault(kept, selection)
    return tuple(found.values())


def _named(cost: BlockCosts, name: str) -> Effect:
    effect = cost.usual(name)
    assert effect is not None
    return effect


def _peak(effect: Effect, sizes: Sequence[int], i: int, freed: set[Operand]) -> int:
    """Most bytes above those at the start, if the operands in ``freed`` go as soon as it lets go of them."""
    level = peak = 0
    for part in effect.parts:
        peak = max(peak, level + part.peak_bytes)
        level += part.net_bytes
        if part.releases in freed:
            level -= sizes[i] if part.releases == "x" else sizes[i + 1]
    return peak


def _count(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
