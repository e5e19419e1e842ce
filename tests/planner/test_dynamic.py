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
from edgetrain.planner.stages import Problem, Selection, Stage, Way

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
    products = draw(small)
    ways = [Way("invert", draw(whole_seconds), inverse_bytes + draw(small))]
    if draw(st.booleans()):
        ways.append(Way("invert_layerwise", draw(whole_seconds), inverse_bytes + draw(small)))
    selection = Selection(
        products_bytes=products,
        keeps_output=draw(st.booleans()),
        forward_seconds=draw(whole_seconds),
        forward_bytes=output + products + draw(small),
        backward_seconds=draw(whole_seconds),
        backward_bytes=left + draw(small),
    )
    return Stage(
        output_bytes=output,
        saved_bytes=saved,
        keeps_input=draw(st.booleans()),
        keeps_output=not invertible and draw(st.booleans()),
        forward_seconds=forward,
        forward_all_seconds=forward,
        forward_bytes=output + draw(small),
        dropping_seconds=draw(whole_seconds),
        dropping_bytes=output + draw(small),
        forward_all_bytes=output + saved + draw(small),
        backward_seconds=draw(whole_seconds),
        backward_bytes=left + draw(small),
        recompute_seconds=draw(whole_seconds) if recompute else None,
        recompute_bytes=left + draw(small),
        gradient_bytes=gradients,
        ways=tuple(ways) if invertible else (),
        selection=selection if recompute and not invertible and draw(st.booleans()) else None,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    first = size = draw(st.integers(1, 4))
    chain: list[Stage] = []
    for _ in range(draw(st.integers(1, 4))):
        chain.append(draw(stages(size)))
        size = chain[-1].output_bytes
    return Problem(
        stages=tuple(chain),
        input_bytes=first,
        head_bytes=size + draw(small),
        head_seconds=draw(whole_seconds),
        reach=tuple(draw(st.integers(0, j)) for j in range(len(chain))),
        offload_seconds_per_byte=draw(st.sampled_from([None, 0.5])),
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
            assert seconds_of(problem, steps) == pytest.approx(best)


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
            ways=(Way("invert", 3 * seconds, 3 * output), Way("invert_layerwise", 4 * seconds, output)) * invertible,
        )

    chain = tuple(stage() for _ in range(blocks))
    problem = Problem(chain, 100_000, 2_000_000, 0.1, (0,) * blocks)
    began = time.process_time()
    table = Table(problem, sum(one.output_bytes + one.saved_bytes for one in chain), slots=500)
    assert time.process_time() - began < limit_s
    assert table.least() is not None
