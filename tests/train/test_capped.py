"""What a run inside a cap refuses and advises, without a cap on this process."""

from __future__ import annotations

import functools
import sys

import pytest

from edgetrain.errors import BudgetError
from edgetrain.models import create_model
from edgetrain.train.advice import _grown, _shrunk
from edgetrain.train.capped import check_budget
from edgetrain.train.trial import Trial, Trials
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


def test_grown_gives_up_after_twelve_tries():
    assert _grown(10, lambda mib: mib >= 12) == 12
    assert _grown(10, lambda mib: False) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux")
def test_trial_in_a_helper():
    trial = Trial(make, "invert_layerwise", (1, 16, 16), 4, 100 * MIB)
    with Trials() as trials:
        assert trials._ask(trial) == 0
        assert trials._ask(Trial(make, "invert_layerwise", (1, 16, 16), 512, 8 * MIB)) == 1
        assert trials._ask(Trial(lambda: make(), "invert_layerwise", (1, 16, 16), 4, MIB)) == 2  # cannot be pickled
        assert trials.fits(trial)
