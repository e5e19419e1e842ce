"""Tensors that have a shape but no data, for running a model without computing anything."""

from __future__ import annotations

import inspect
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode


def fake_mode() -> FakeTensorMode:
    """A mode in which new tensors are fake ones of the CPU; real ones that are met are taken for fake ones.

    An operator that torch could only try out on zeros fails, because trying takes memory.
    """
    return _Fakes(allow_non_fake_inputs=True, allow_fallback_kernels=False)


class _Fakes(FakeTensorMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; it would cost a detour at every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname.startswith("_fused_"):
            return None  # an optimiser's update in place, of which torch says nothing but by running it
        return inspect.unwrap(FakeTensorMode.__torch_dispatch__)(self, func, types, args, kwargs)
