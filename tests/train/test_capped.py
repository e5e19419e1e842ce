"""What a run inside a cap refuses and advises, without a cap on this process."""

from __future__ import annotations

import functools
import sys

import pytest

from edgetrain.errors import BudgetError
from edgetrain.models import create_model
from edgetrain.train.advice import _least, _shrunk
from edgetrain.train.helper import Helper
from edgetrain.train.prepared import check_budget
from edgetrain.train.trial import Trial, fits
from edgetrain.units import MIB

make = functools.partial(create_model, "hybrid18", in_channels=1, width=8)


def test_budget_below_the_weights():
    needed = 3 * sum(p.numel() * 4 for p in make().parameters())
    with pytest.raises(BudgetError, match="before any activation"):
        check_budget(make, needed)
    check_budget(make, 2 * needed)


@pytest.mark.parametrize("most", [0, 2, 3, 17, 40, 99, 100])
def test_shrunk_finds_the_largest_to_a_tenth_in_twelve_tries(most: int):
    tried: list[int] = []

    def runs(n: int) -> bool:
        tried.append(n)
        return n <= most

    found = _shrunk(100, runs)
    assert len(tried) <= 12
    assert found == most or (0.85 * most <= found <= most and found in tried)


@pytest.mark.parametrize("needed", [25, 38, 77, 78, 120])
def test_the_least_budget_is_found_to_a_twentieth_and_has_room_for_another_run(needed: int):
    tried: list[int] = []

    def runs(mib: int) -> bool:
        tried.append(mib)
        return mib >= needed

    named = _least(24, 77, runs)
    found = min(mib for mib in tried if mib >= needed)
    assert needed <= found <= 1.05 * needed + 1
    assert 1.05 * found < named <= 1.05 * found + 2
    assert len(tried) <= 12


def test_no_budget_is_named_where_none_of_twelve_runs():
    tried: list[int] = []
    assert _least(4, 10, lambda mib: bool(tried.append(mib))) == 0
    assert len(tried) == 12


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_trial_in_a_helper():
    with Helper() as helper:
        assert fits(Trial(make, "invert_layerwise", (1, 16, 16), 4, 100 * MIB), helper)
        assert not fits(Trial(make, "invert_layerwise", (1, 16, 16), 512, 8 * MIB), helper)
