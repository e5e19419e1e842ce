"""The dynamic programme against every schedule of small chains."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.planner.dynamic import Table
from edgetrain.planner.stages import Problem, Stage, Way
from tests.planner.schedules import every_schedule, peak_of, seconds_of

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
    ways = [Way("invert", draw(whole_seconds), inverse_bytes + draw(small))]
    if draw(st.booleans()):
        ways.append(Way("invert_layerwise", draw(whole_seconds), inverse_bytes + draw(small)))
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
