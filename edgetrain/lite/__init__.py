"""Training without PyTorch: runs what ``edgetrain export --format train-step`` wrote, with NumPy and ONNX Runtime.

    import edgetrain.lite
    step = edgetrain.lite.load("export/train-step")
    for record in step.fit("photos", epochs=3):
        print(record.epoch, record.loss, record.accuracy)

On a small board the framework is the largest tensor: importing PyTorch takes more memory than a planned step. Names are
loaded when they are used, so that a budget can be set before NumPy is (:mod:`edgetrain.lite.budget`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetrain.lite.run import LiteRun, load

__all__ = ["LiteRun", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edgetrain.lite import run

    return getattr(run, name)
