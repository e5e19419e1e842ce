"""The simulator against the trace of random nested programs, instruction by instruction to the byte."""

from __future__ import annotations

import pytest
from programs import NESTED_SHAPE, NETWORKS, nested_plan
from test_simulate import assert_exact

from edgetrain.memory import measure_costs


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_to_the_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (batch, *shape) = NETWORKS[name](), NESTED_SHAPE
    costs = measure_costs(model, input_shape=tuple(shape), batch_size=batch, optimizer=None)
    for seed in range(4):
        assert_exact(model, nested_plan(model, seed), costs, monkeypatch, batch=batch, shape=tuple(shape))
