"""edgetrain: training convolutional networks where memory is short.

Names are loaded when they are used, so that ``import edgetrain`` costs nothing: no torch, no CUDA, no ONNX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgetrain import chain, export, memory, models, nn, planner, report, runtime, train
    from edgetrain.chain import freeze
    from edgetrain.export import EngineReport, build_engine, export_onnx, infer
    from edgetrain.export.fold import fold
    from edgetrain.memory import Estimate, estimate
    from edgetrain.models import create_model
    from edgetrain.planner import Plan, plan, uniform_plan
    from edgetrain.runtime import Wrapped, wrap
    from edgetrain.train import Trainer

_HOMES = {
    "build_engine": "edgetrain.export",
    "create_model": "edgetrain.models",
    "EngineReport": "edgetrain.export",
    "Estimate": "edgetrain.memory",
    "estimate": "edgetrain.memory",
    "export_onnx": "edgetrain.export",
    "fold": "edgetrain.export",
    "freeze": "edgetrain.chain",
    "infer": "edgetrain.export",
    "Plan": "edgetrain.planner",
    "plan": "edgetrain.planner",
    "Trainer": "edgetrain.train",
    "uniform_plan": "edgetrain.planner",
    "Wrapped": "edgetrain.runtime",
    "wrap": "edgetrain.runtime",
}
_ROOMS = ("chain", "export", "memory", "models", "nn", "planner", "report", "runtime", "train")

__all__ = [
    "EngineReport",
    "Estimate",
    "Plan",
    "Trainer",
    "Wrapped",
    "__version__",
    "build_engine",
    "chain",
    "create_model",
    "estimate",
    "export",
    "export_onnx",
    "fold",
    "freeze",
    "infer",
    "memory",
    "models",
    "nn",
    "plan",
    "planner",
    "report",
    "runtime",
    "train",
    "uniform_plan",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"edgetrain.{name}")
    raise AttributeError(f"module 'edgetrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
