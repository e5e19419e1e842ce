"""Programs, their execution, and ``wrap()`` for ordinary training loops."""

from edgetrain.runtime.executor import Execution
from edgetrain.runtime.program import (
    Backward,
    Fetch,
    Forward,
    Free,
    Head,
    Instruction,
    Offload,
    Program,
    Recompute,
    Update,
)
from edgetrain.runtime.wrap import Wrapped, wrap

__all__ = [
    "Backward",
    "Execution",
    "Fetch",
    "Forward",
    "Free",
    "Head",
    "Instruction",
    "Offload",
    "Program",
    "Recompute",
    "Update",
    "Wrapped",
    "wrap",
]
