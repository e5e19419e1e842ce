"""Which blocks of a chain are equal, so that what one of them does is known of all."""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations


def fingerprint(module: nn.Module, i: int) -> Any:
    """Equal for modules that differ in nothing but the values of their tensors; ``i`` where nobody can tell."""
    numbers: dict[int, int] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            number = numbers.setdefault(id(value), len(numbers))
            return number, tuple(value.shape), tuple(value.stride()), str(value.dtype), value.requires_grad

        def reducer_override(self, value: Any) -> Any:
            # torch refuses to pickle a module with a parametrised weight, whose class is made for it alone
            if isinstance(value, nn.Module) and is_parametrized(value):
                return type_before_parametrizations, (type_before_parametrizations(value),), vars(value)
            return NotImplemented

    written = io.BytesIO()
    try:
        Pickler(written).dump(module)
    except Exception:  # whatever a module may hold: a lambda, a lock, an open file
        return i
    return written.getvalue()
