"""Rounding to bfloat16 by hand, in place of what a program does with a z that waits in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from edgetrain.runtime import Execution, Fetch, Instruction, Offload


def rounded(x: Tensor) -> Tensor:
    """The nearest numbers of 24 significant bits, then of 8, ties to the even one; type and strides as before."""
    for bits in (24, 8):
        mantissa, exponent = torch.frexp(x)  # 1/2 <= |mantissa| < 1
        x = torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
    return x


@contextmanager
def by_hand() -> Iterator[list[int]]:
    """Programs keep every z as it is, and round those that they would have fetched from bfloat16: these are listed."""
    run, found, waiting = Execution._run, list[int](), set[int]()

    def patched(self: Execution, step: Instruction) -> None:
        if isinstance(step, Offload) and step.to == "bfloat16":
            waiting.add(step.index)
        elif isinstance(step, Fetch) and step.index in waiting:
            self._z[step.index] = rounded(self._z[step.index])
            waiting.remove(step.index)
            found.append(step.index)
        else:
            run(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Execution, "_run", patched)
        yield found
    assert not waiting
