"""Why each block does what it does, from the program that was chosen and what the alternatives cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from edgetrain.chain import MODES, Block, Mode
from edgetrain.memory import BlockCosts, Costs
from edgetrain.memory.times import BlockTimes, Times
from edgetrain.planner.plans import Alternative
from edgetrain.runtime.program import (
    INVERSIONS,
    Backward,
    Fetch,
    Forward,
    Offload,
    Place,
    Program,
    Recompute,
)
from edgetrain.units import format_mib

_PLACES: dict[Place, str] = {"host": "the host's memory", "disk": "a file", "bfloat16": "bfloat16"}
_PRODUCTS: dict[Mode, str] = {
    "selective": "its expensive convolutions and matrix products",
    "selective_all": "its convolutions and matrix products",
}
_MODES: dict[str, Mode] = {mode: mode for mode in MODES}  # of a backward pass: named alike, but for "saved"


def modes_of(program: Program) -> tuple[Mode, ...]:
    """How each block's backward pass comes by its activations."""
    kept = {step.block for step in program.instructions if isinstance(step, Forward) and step.keep == "all"}
    how = {step.block: step.how for step in program.instructions if isinstance(step, Backward)}
    return tuple(
        ("store" if i in kept else "recompute") if how[i] == "saved" else _MODES[how[i]] for i in range(len(how))
    )


def rounded_in(program: Program) -> frozenset[int]:
    """Blocks whose backward pass starts from a z that was kept in bfloat16: their input, or output if inverted."""
    waiting, rounded, found = set[int](), set[int](), set[int]()
    for step in program.instructions:
        if isinstance(step, Offload):
            (waiting.add if step.to == "bfloat16" else waiting.discard)(step.index)
        elif isinstance(step, Fetch) and step.index in waiting:
            rounded.add(step.index)
        elif isinstance(step, Forward):
            rounded.discard(step.block + 1)
        elif isinstance(step, Recompute):
            rounded.difference_update(range(step.first + 1, step.last + 2))
        elif isinstance(step, Backward):
            inverted = step.how in INVERSIONS
            if step.block + inverted in rounded:
                found.add(step.block)
            if inverted:
                rounded.discard(step.block)
    return frozenset(found)


def explain(
    program: Program,
    blocks: Sequence[Block],
    costs: Costs,
    times: Times,
    too_noisy: Sequence[Mapping[Mode, float]] | None = None,
) -> tuple[tuple[str, ...], tuple[tuple[Alternative, ...], ...]]:
    """A reason for every block, and for everything that it does not do.

    Args:
        too_noisy: for each block the modes that noise forbids, with their signal-to-noise ratio; None: no noise.
    """
    runs = Counter[int]()
    for step in program.instructions:
        if isinstance(step, Forward):
            runs[step.block] += 1
        elif isinstance(step, Recompute):
            runs.update(range(step.first, step.last + 1))
        elif isinstance(step, Backward) and step.how == "recompute":
            runs[step.block] += 1
    places: dict[int, Place] = {step.index: step.to for step in program.instructions if isinstance(step, Offload)}
    modes = modes_of(program)
    reasons, rejected = [], []
    for i, (block, mode) in enumerate(zip(blocks, modes, strict=True)):
        reasons.append(_reason(i, mode, runs[i], costs.blocks[i], times.blocks[i], places.get(i)))
        noisy = {} if too_noisy is None else too_noisy[i]
        rejected.append(tuple(_others(block, mode, costs.blocks[i], times.blocks[i], noisy)))
    return tuple(reasons), tuple(rejected)


def _reason(i: int, mode: Mode, runs: int, cost: BlockCosts, time: BlockTimes, place: Place | None) -> str:
    extra = _extra(time, mode)
    if mode == "store":
        return f"keeps {format_mib(max(0, cost.saved_bytes))} for its gradient: there is room for it"
    waits = "" if place is None else f"; z[{i}] waits in {_PLACES[place]}"
    if mode == "selective" or mode == "selective_all":
        kept = cost.products_bytes(mode)
        if cost.invertible:
            return (
                "keeps its output besides its input, and gets its hidden activations from there: spares "
                f"{format_mib(max(0, cost.saved_bytes - kept))} for {1e3 * extra:.1f} ms{waits}"
            )
        seconds = extra + (runs - 1) * time.forward
        return (
            f"keeps the results of {_PRODUCTS[mode]}, {format_mib(max(0, kept))}, and runs what it needs of the rest "
            f"again: spares {format_mib(max(0, cost.saved_bytes - kept))} for {1e3 * seconds:.1f} ms{waits}"
        )
    if mode == "recompute":
        how = f"run {runs} times" if place is None else f"z[{i}] waits in {_PLACES[place]}"
        seconds = (runs - 1) * time.forward
        return f"{how}: spares {format_mib(max(0, cost.saved_bytes))} for {1e3 * seconds:.1f} ms"
    held, spared = "holding its hidden activations", _kept(cost)
    if mode == "invert_selective":
        held = f"from the results of its convolutions and matrix products, {format_mib(cost.products_only_bytes)}"
        spared -= cost.products_only_bytes
    elif mode == "invert_layerwise":
        held = "holding nothing"
    return f"its input comes back from its output, {held}: spares {format_mib(spared)} for {1e3 * extra:.1f} ms"


def _others(
    block: Block, chosen: Mode, cost: BlockCosts, time: BlockTimes, too_noisy: Mapping[Mode, float]
) -> list[Alternative]:
    found = []
    for mode in MODES:
        if mode == chosen:
            continue
        if not block.allows(mode):
            found.append(Alternative(mode, block.refusals[mode]))
            continue
        from_output = mode in INVERSIONS or (mode == "selective" and cost.invertible)
        if from_output and not cost.inverts_in_layout:
            found.append(Alternative(mode, "works on channels first"))
            continue
        if from_output and mode in too_noisy:
            found.append(Alternative(mode, f"would leave a signal-to-noise ratio of {too_noisy[mode]:.1e}"))
            continue
        difference = _extra(time, mode) - _extra(time, chosen)
        slower = f"{1e3 * abs(difference):.1f} ms {'more' if difference > 0 else 'less'}"
        if mode == "store":
            reason = f"would hold {format_mib(max(0, cost.saved_bytes))} until its gradient is there, for {slower}"
        elif mode == "selective" and cost.invertible:
            reason = f"would hold its input and its output, for {slower}"
        elif mode == "selective" or mode == "selective_all":
            reason = (
                f"would hold its input and {format_mib(max(0, cost.products_bytes(mode)))} of results, for {slower}"
            )
        elif mode == "recompute":
            reason = f"would hold its input or run from an earlier one, for {slower}"
        elif mode == "invert_selective":
            reason = f"would hold {format_mib(cost.products_only_bytes)} of results, for {slower}"
        else:
            reason = f"would take {slower}"
        found.append(Alternative(mode, reason))
    return found


def _extra(time: BlockTimes, mode: Mode) -> float:
    """Seconds of a block's forward and backward pass above storing."""
    stored = time.forward_all + time.backward_saved
    taken = {
        "store": stored,
        "selective": (time.forward_products or 0.0) + (time.backward_selective or 0.0),
        "selective_all": (time.forward_all_products or 0.0) + (time.backward_selective_all or 0.0),
        "recompute": time.forward + (time.backward_recompute or 0.0),
        "invert": time.forward + (time.backward_invert or 0.0),
        "invert_selective": (time.forward_products_only or 0.0) + (time.backward_invert_selective or 0.0),
        "invert_layerwise": time.forward + (time.backward_invert_layerwise or 0.0),
    }
    return taken[mode] - stored


def _kept(cost: BlockCosts) -> int:
    """Bytes that storing would hold, its input among them."""
    effect = cost.usual("forward all")
    assert effect is not None
    inputs = next((o.nbytes for o in effect.outputs if o.name == "y"), 0) if "x" in effect.kept else 0
    return max(0, cost.saved_bytes) + inputs
