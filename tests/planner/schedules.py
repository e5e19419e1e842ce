"""Every schedule of a small chain, by enumeration, and its memory, by counting. Shares nothing with the planner."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from edgetrain.planner.stages import Problem, Selection, Stage, Way
from edgetrain.runtime.program import SELECTIVE, Backward, Fetch, Forward, Free, Head, Instruction, Offload, Recompute

Steps = tuple[Instruction, ...]

KEEP = {"invert": "nothing", "invert_layerwise": "nothing", "invert_selective": "products_only"}
"""The forward pass before each kind of inversion."""


def every_schedule(problem: Problem) -> Iterator[Steps]:
    """All of the family that the planner searches."""
    yield from _between(problem, 0, len(problem.stages) - 1, foreign=True, needed=False)


def _between(
    problem: Problem, s: int, t: int, *, foreign: bool, needed: bool, near: bool = False, rounded: bool = False
) -> Iterator[Steps]:
    """From z[s] through the backward passes of t..s.

    Args:
        foreign: somebody else keeps z[s]; ``needed``: it must be there in the end.
        near: whether it may then be rounded; ``rounded``: it is, or was computed from one that is.
    """
    count = len(problem.stages)
    end: Steps = () if foreign or needed else (Free(s),)
    if s == t + 1:
        yield ((Head(),) if t == count - 1 else ()) + end
        return
    stage = problem.stages[s]

    def run(i: int, keep: str) -> Steps:
        return (Forward(i, keep),) if t == count - 1 else (Recompute(i, i, keep),)  # type: ignore[arg-type]

    for rest in _between(problem, s + 1, t, foreign=stage.keeps_output, needed=False, rounded=rounded):
        drop: Steps = (Free(s + 1),) if stage.keeps_output else ()
        yield (*run(s, "all"), *end, *rest, *drop, Backward(s, "saved"))
    for selection in stage.selections:
        kept = selection.keeps_output
        for rest in _between(problem, s + 1, t, foreign=kept, needed=False, rounded=rounded):
            drop = (Free(s + 1),) if kept else ()
            yield (*run(s, SELECTIVE[selection.how]), *rest, *drop, Backward(s, selection.how), *end)
    if stage.recompute_seconds is not None:
        if s == t < count - 1:
            yield (Backward(s, "recompute"), *end)
        for k in range(s + 1, t + 1):
            forward = tuple(step for i in range(s + 1, k) for step in run(i, "nothing"))
            for rest in _between(problem, k, t, foreign=False, needed=False, rounded=rounded):
                for again in _between(problem, s, k - 1, foreign=foreign, needed=needed, near=near, rounded=rounded):
                    yield (*run(s, "input"), *forward, *rest, *again)
                    for place in problem.places:
                        if place.exact and not foreign:
                            yield (*run(s, "input"), Offload(s, place.to), *forward, *rest, Fetch(s), *again)
                for place in problem.places:
                    may = not place.exact and place.held_bytes[s] is not None and (near or rounded or not needed)
                    for again in (
                        _between(problem, s, k - 1, foreign=False, needed=needed, rounded=True)
                        if may and not foreign
                        else ()
                    ):
                        yield (*run(s, "input"), Offload(s, place.to), *forward, *rest, Fetch(s), *again)
    if stage.ways and not foreign and not needed and not rounded:
        for accepted, reach in ((False, problem.reach), (True, problem.rounded_reach)):
            for j in range(s, t + 1):
                if (accepted and not problem.rounds) or not problem.stages[j].ways or reach[j] > s:
                    break
                for rest in _between(problem, j + 1, t, foreign=False, needed=True, near=accepted):
                    for ways in itertools.product(*(problem.stages[i].ways for i in range(s, j + 1))):
                        forward = tuple(step for i, way in enumerate(ways, s) for step in run(i, KEEP[way.how]))
                        backward = tuple(Backward(i, way.how) for i, way in enumerate(ways, s))
                        yield (*forward, *rest, *reversed(backward), *end)


def _keeping(stage: Stage, keep: str) -> Selection:
    return next(selection for selection in stage.selections if SELECTIVE[selection.how] == keep)


def _keeping_products(stage: Stage) -> Way:
    return next(way for way in stage.ways if way.how == "invert_selective")


def _forward_seconds(stage: Stage, keep: str) -> float:
    if keep in SELECTIVE.values():
        return _keeping(stage, keep).forward_seconds
    if keep == "products_only":
        return _keeping_products(stage).forward_seconds
    return {"all": stage.forward_all_seconds, "input": stage.forward_seconds, "nothing": stage.dropping_seconds}[keep]


def seconds_of(problem: Problem, steps: Steps) -> float:
    """Of a whole step."""
    total = problem.head_seconds
    z = problem.activation_bytes
    away: dict[int, str] = {}
    for step in steps:
        if isinstance(step, Forward):
            total += _forward_seconds(problem.stages[step.block], step.keep)
        elif isinstance(step, Recompute):
            total += sum(_forward_seconds(problem.stages[i], step.keep) for i in range(step.first, step.last + 1))
        elif isinstance(step, Backward):
            stage = problem.stages[step.block]
            if step.how == "saved":
                total += stage.backward_seconds
            elif step.how in SELECTIVE:
                total += _keeping(stage, SELECTIVE[step.how]).backward_seconds
            elif step.how == "recompute":
                assert stage.recompute_seconds is not None
                total += stage.recompute_seconds
            else:
                total += next(way.seconds for way in stage.ways if way.how == step.how)
        elif isinstance(step, Offload | Fetch):
            if isinstance(step, Offload):
                away[step.index] = step.to
            place = next(place for place in problem.places if place.to == away[step.index])
            total += z[step.index] * place.seconds_per_byte
    return total


def peak_of(problem: Problem, steps: Steps) -> int:
    """Most bytes at once, z[0] left out because it is the caller's."""
    size, count = problem.activation_bytes, len(problem.stages)
    holders = {i: 0 for i in range(count + 1)}
    holders[0] = 1
    named, graphs, gradient, trained, away = {0}, dict[int, list[int]](), None, 0, dict[int, int]()
    products, inverting = dict[int, tuple[Selection, list[int]]](), set[int]()
    peak = 0

    def level() -> int:
        kept = sum(size[i] for i, number in holders.items() if number and i > 0)
        saved = sum(problem.stages[i].saved_bytes for i in graphs)
        saved += sum(selection.products_bytes for selection, _ in products.values())
        saved += sum(_keeping_products(problem.stages[i]).held_bytes for i in inverting)
        return kept + saved + trained + sum(away.values()) + (size[gradient] if gradient is not None else 0)

    def drop(i: int) -> None:
        named.discard(i)
        holders[i] -= 1

    def run(i: int, keep: str) -> None:
        nonlocal peak
        stage = problem.stages[i]
        assert i in named
        extra = {"all": stage.forward_all_bytes, "input": stage.forward_bytes, "nothing": stage.dropping_bytes}
        for selection in stage.selections:
            extra[SELECTIVE[selection.how]] = selection.forward_bytes
        if keep == "products_only":
            extra[keep] = _keeping_products(stage).forward_bytes
        peak = max(peak, level() + extra[keep])
        if keep in ("nothing", "products_only"):
            drop(i)
        if keep == "products_only":
            inverting.add(i)
        if i + 1 not in named:
            named.add(i + 1)
            holders[i + 1] += 1
        if keep == "all":
            graphs[i] = [i] * stage.keeps_input + [i + 1] * stage.keeps_output
            for held in graphs[i]:
                holders[held] += 1
        if keep in SELECTIVE.values():
            selection = _keeping(stage, keep)
            products[i] = selection, [i + 1] * selection.keeps_output
            for held in products[i][1]:
                holders[held] += 1

    for step in steps:
        if isinstance(step, Forward):
            run(step.block, step.keep)
        elif isinstance(step, Recompute):
            for i in range(step.first, step.last + 1):
                run(i, step.keep)
        elif isinstance(step, Head):
            peak = max(peak, level() + problem.head_bytes)
            gradient = count
        elif isinstance(step, Free):
            drop(step.index)
        elif isinstance(step, Offload):
            held = next(place.held_bytes[step.index] for place in problem.places if place.to == step.to)
            assert held is not None
            away[step.index] = held
            peak = max(peak, level())
            drop(step.index)
        elif isinstance(step, Fetch):
            named.add(step.index)
            holders[step.index] += 1
            peak = max(peak, level())
            del away[step.index]
        elif isinstance(step, Backward):
            stage = problem.stages[step.block]
            assert gradient == step.block + 1
            if step.how == "saved":
                peak = max(peak, level() + stage.backward_bytes)
                for held in graphs.pop(step.block):
                    holders[held] -= 1
            elif step.how in SELECTIVE:
                assert step.block in named
                selection, shared = products[step.block]
                assert selection.how == step.how
                peak = max(peak, level() + selection.backward_bytes)
                del products[step.block]
                for held in shared:
                    holders[held] -= 1
            elif step.how == "recompute":
                assert step.block in named
                peak = max(peak, level() + stage.recompute_bytes)
            else:
                way = next(way for way in stage.ways if way.how == step.how)
                peak = max(peak, level() + way.peak_bytes)
                if step.how == "invert_selective":
                    inverting.remove(step.block)
                drop(step.block + 1)
                assert step.block not in named
                named.add(step.block)
                holders[step.block] += 1
            if problem.gradients_stay:
                trained += stage.gradient_bytes
            gradient = step.block
        peak = max(peak, level())
    assert gradient == 0
    return peak
