"""The dynamic programme against every schedule of small chains."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import every_schedule, peak_of, seconds_of

from edgetrain.planner.dynamic import Table
from edgetrain.planner.stages import Away, Problem, Selection, Stage, Way
from edgetrain.runtime.program import SELECTIVE, Backward, Fetch, Forward, Instruction, Offload, Recompute

small = st.integers(0, 4)
whole_seconds = st.integers(1, 9).map(float)


@st.composite
def stages(draw: st.DrawFn, given: int) -> Stage:
    """A block whose input has ``given`` bytes; no peak is below what the instruction leaves."""
    output, gradients = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    left = given + gradients
    forward, saved = draw(whole_seconds), draw(small)
    invertible, recompute = draw(st.booleans()), draw(st.integers(0, 5)) > 0
    inverse_bytes = gradients + max(0, 2 * (given - output))
    dropping = draw(whole_seconds), output + draw(small)  # seconds, bytes
    ways = [Way("invert", draw(whole_seconds), inverse_bytes + draw(small), 0, *dropping)]
    if draw(st.booleans()):
        ways.append(Way("invert_layerwise", draw(whole_seconds), inverse_bytes + draw(small), 0, *dropping))
    if draw(st.booleans()):
        held = draw(small)
        keeping = draw(whole_seconds), output + held + draw(small)
        ways.append(Way("invert_selective", draw(whole_seconds), inverse_bytes + draw(small), held, *keeping))
    selections = []
    for how in draw(st.sets(st.sampled_from(sorted(SELECTIVE)))):
        products = draw(small)
        selections.append(
            Selection(
                how=how,
                products_bytes=products,
                keeps_output=draw(st.booleans()),
                forward_seconds=draw(whole_seconds),
                forward_bytes=output + products + draw(small),
                backward_seconds=draw(whole_seconds),
                backward_bytes=left + draw(small),
            )
        )
    return Stage(
        output_bytes=output,
        saved_bytes=saved,
        keeps_input=draw(st.booleans()),
        keeps_output=not invertible and draw(st.booleans()),
        forward_seconds=forward,
        forward_all_seconds=forward,
        forward_bytes=output + draw(small),
        dropping_seconds=dropping[0],
        dropping_bytes=dropping[1],
        forward_all_bytes=output + saved + draw(small),
        backward_seconds=draw(whole_seconds),
        backward_bytes=left + draw(small),
        recompute_seconds=draw(whole_seconds) if recompute else None,
        recompute_bytes=left + draw(small),
        gradient_bytes=gradients,
        ways=tuple(ways) if invertible else (),
        selections=tuple(selections) if recompute and not invertible else (),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    first = size = draw(st.integers(1, 4))
    chain: list[Stage] = []
    for _ in range(draw(st.integers(1, 4))):
        chain.append(draw(stages(size)))
        size = chain[-1].output_bytes
    sizes = [first, *(stage.output_bytes for stage in chain)]
    places = [Away("host", (0,) * len(sizes), 0.5, exact=True)] if draw(st.booleans()) else []
    if draw(st.booleans()):
        halves = tuple(draw(st.sampled_from([size // 2, None])) for size in sizes)
        places.append(Away("bfloat16", halves, draw(st.sampled_from([0.0, 0.25])), exact=False))
    reach = tuple(draw(st.integers(0, j)) for j in range(len(chain)))
    return Problem(
        stages=tuple(chain),
        input_bytes=first,
        head_bytes=size + draw(small),
        head_seconds=draw(whole_seconds),
        reach=reach,
        rounded_reach=tuple(draw(st.integers(exact, j + 1)) for j, exact in enumerate(reach)),
        places=tuple(places),
        gradients_stay=draw(st.booleans()),
    )


@settings(max_examples=400, deadline=None)
@given(problems())
def test_equals_the_best_of_all_schedules_at_every_budget(problem: Problem) -> None:
    found = [(peak_of(problem, steps), seconds_of(problem, steps)) for steps in every_schedule(problem)]
    top = max(peak for peak, _ in found) + 2
    table = Table(problem, top, slots=top)
    assert table.unit_bytes == 1
    for m in range(top + 1):
        best = min((seconds for peak, seconds in found if peak <= m), default=math.inf)
        assert table.seconds(m) == pytest.approx(best), m
        if best < math.inf:
            steps = table.instructions(m)
            assert peak_of(problem, steps) <= m
            check_reach(problem, steps)
            assert seconds_of(problem, steps) == pytest.approx(best)


def check_reach(problem: Problem, steps: tuple[Instruction, ...]) -> None:
    """No run of inversions is longer than allowed from what it starts from, and none starts behind a rounding.

    Follows every z: ``exact``, ``rounded`` itself, or run from a z that was, ``derived``.
    """
    exact = {place.to: place.exact for place in problem.places}
    z: dict[int, str] = dict.fromkeys(range(len(problem.stages) + 1), "exact")
    away: dict[int, str] = {}
    reach: tuple[int, ...] | None = None
    start = 0
    for step in steps:
        if isinstance(step, Forward | Recompute):
            blocks = [step.block] if isinstance(step, Forward) else range(step.first, step.last + 1)
            for i in blocks:
                z[i + 1] = "exact" if z[i] == "exact" else "derived"
        elif isinstance(step, Offload):
            away[step.index] = step.to
        elif isinstance(step, Fetch) and not exact[away[step.index]]:
            z[step.index] = "rounded" if z[step.index] == "exact" else z[step.index]
        if isinstance(step, Backward) and step.how.startswith("invert"):
            if reach is None:
                start = step.block
                reach = {"exact": problem.reach, "rounded": problem.rounded_reach}[z[start + 1]]
            assert reach[start] <= step.block
        else:
            reach = None


def test_an_anchor_waits_in_bfloat16_where_the_run_from_it_may_be_that_long() -> None:
    """z[2], from which block 1 is inverted: against every schedule, for a run from a rounded one allowed and not."""

    def stage(saved: int, *, recompute: bool, invert: bool) -> Stage:
        return Stage(
            output_bytes=8,
            saved_bytes=saved,
            keeps_input=False,
            keeps_output=False,
            forward_seconds=1.0,
            forward_all_seconds=1.0,
            forward_bytes=8,
            dropping_seconds=1.0,
            dropping_bytes=8,
            forward_all_bytes=8 + saved,
            backward_seconds=1.0,
            backward_bytes=8,
            recompute_seconds=2.0 if recompute else None,
            recompute_bytes=8,
            gradient_bytes=0,
            ways=(Way("invert", 3.0, 4, 0, 1.0, 8),) if invert else (),
        )

    chain = (
        stage(2, recompute=False, invert=False),
        stage(40, recompute=False, invert=True),
        stage(40, recompute=True, invert=False),
        stage(20, recompute=False, invert=False),
    )
    anchors = []
    for rounded_reach in ((0, 1, 2, 3), (1, 2, 3, 4)):
        problem = Problem(
            chain,
            input_bytes=8,
            head_bytes=8,
            head_seconds=1.0,
            reach=(0, 1, 2, 3),
            rounded_reach=rounded_reach,
            places=(Away("bfloat16", (4,) * 5, 0.25, exact=False),),
        )
        schedules = [(peak_of(problem, steps), seconds_of(problem, steps)) for steps in every_schedule(problem)]
        table = Table(problem, 120, slots=120)
        chosen = []
        for m in range(121):
            assert table.seconds(m) == min((s for peak, s in schedules if peak <= m), default=math.inf), m
            if table.seconds(m) < math.inf:
                steps = table.instructions(m)
                check_reach(problem, steps)
                chosen.append(Offload(2, "bfloat16") in steps and Backward(1, "invert") in steps)
        anchors.append(any(chosen))
    assert anchors == [True, False]


def test_activations_too_large_for_any_number_of_slots_do_not_fit() -> None:
    huge = 2**33
    stage = Stage(
        output_bytes=huge,
        saved_bytes=huge,
        keeps_input=True,
        keeps_output=False,
        forward_seconds=1.0,
        forward_all_seconds=1.0,
        forward_bytes=huge,
        dropping_seconds=1.0,
        dropping_bytes=huge,
        forward_all_bytes=huge,
        backward_seconds=1.0,
        backward_bytes=huge,
        recompute_seconds=2.0,
        recompute_bytes=huge,
        gradient_bytes=0,
        ways=(Way("invert_selective", 1.0, huge, huge, 1.0, huge),),
    )
    table = Table(Problem((stage,) * 3, huge, huge, 1.0, (0,) * 3), 300, rounding="down")
    assert table.least() is None


@pytest.mark.parametrize(("blocks", "limit_s"), [(60, 1.0), (150, 5.0)])
@pytest.mark.parametrize("invertible", [False, True])
def test_solves_long_chains_quickly(blocks: int, limit_s: float, *, invertible: bool) -> None:
    numbers = random.Random(0)

    def stage() -> Stage:
        seconds, output = numbers.uniform(0.5, 2), 100_000 * numbers.randint(5, 20)
        return Stage(
            output_bytes=output,
            saved_bytes=100_000 * numbers.randint(0, 40),
            keeps_input=True,
            keeps_output=not invertible and numbers.random() < 0.5,
            forward_seconds=seconds,
            forward_all_seconds=seconds,
            forward_bytes=output,
            dropping_seconds=seconds,
            dropping_bytes=output,
            forward_all_bytes=4 * output,
            backward_seconds=2 * seconds,
            backward_bytes=2 * output,
            recompute_seconds=3 * seconds,
            recompute_bytes=3 * output,
            gradient_bytes=10_000,
            ways=(
                Way("invert", 3 * seconds, 3 * output, 0, seconds, output),
                Way("invert_selective", 2 * seconds, 3 * output, 2 * output, seconds, 3 * output),
                Way("invert_layerwise", 4 * seconds, output, 0, seconds, output),
            )
            * invertible,
        )

    chain = tuple(stage() for _ in range(blocks))
    problem = Problem(chain, 100_000, 2_000_000, 0.1, (0,) * blocks)
    began = time.process_time()
    table = Table(problem, sum(one.output_bytes + one.saved_bytes for one in chain), slots=500)
    assert time.process_time() - began < limit_s
    assert table.least() is not None
