"""From one mode per block to the Program of a training step: what is freed when.

z[i] outlives the forward pass only if something of the backward pass starts from it:

* block i is recomputed, all of it or in part: z[i] is its input;
* block i-1 is inverted: z[i] is its output, unless the inversion of block i gives it back.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.chain import Mode
from edgetrain.runtime.program import (
    INVERSIONS,
    SELECTIVE,
    Backward,
    Forward,
    Free,
    Head,
    How,
    Instruction,
    Keep,
    Program,
    Update,
    kept_by,
)

_KEEP: dict[Mode, Keep] = {
    "store": "all",
    **{selective: keep for selective, keep in SELECTIVE.items()},
    "recompute": "input",
    **{inversion: kept_by(inversion) for inversion in INVERSIONS},
}
_HOW: dict[Mode, How] = {
    "store": "saved",
    **{how: how for how in SELECTIVE},
    "recompute": "recompute",
    **{inversion: inversion for inversion in INVERSIONS},
}
_FROM_INPUT: tuple[Mode, ...] = (*SELECTIVE, "recompute")


def schedule(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    modes: Sequence[Mode],
    *,
    update_in_backward: bool = False,
    channels_last: bool = False,
) -> Program:
    """The Program that runs block i in ``modes[i]``.

    Args:
        names: of the L blocks.
        shapes: of z[0] ... z[L].
        modes: of the L blocks.
        update_in_backward: step the optimiser of each block as soon as its gradients are there.
        channels_last: as of the Program.
    """
    count = len(modes)
    inverted = [mode in INVERSIONS for mode in modes]

    def outlives_forward(i: int) -> bool:
        if i < count and modes[i] in _FROM_INPUT:
            return True
        output_of_inverted = i > 0 and inverted[i - 1]
        given_back = i < count and inverted[i]
        return output_of_inverted and not given_back

    steps: list[Instruction] = []
    for i, mode in enumerate(modes):
        steps.append(Forward(i, _KEEP[mode]))
        if not inverted[i] and not outlives_forward(i):
            steps.append(Free(i))
    steps.append(Head())
    if not outlives_forward(count):
        steps.append(Free(count))
    for i in reversed(range(count)):
        steps.append(Backward(i, _HOW[modes[i]]))
        if update_in_backward:
            steps.append(Update(i))
        alive = inverted[i] or modes[i] in _FROM_INPUT
        if alive and not (i > 0 and inverted[i - 1]):
            steps.append(Free(i))
    return Program(tuple(names), tuple(shapes), tuple(steps), channels_last)
