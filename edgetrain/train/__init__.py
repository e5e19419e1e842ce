"""Training: recipe, loop, checkpoints, data.

Names are loaded when they are used: what reads images and writes records serves where there is no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetrain.files import write_atomically
    from edgetrain.train.callbacks import Callback
    from edgetrain.train.checkpoint import load_weights, newest_checkpoint
    from edgetrain.train.evaluation import evaluate
    from edgetrain.train.objectives import CrossEntropy, Objective
    from edgetrain.train.recipe import Recipe, undecayed_parameters
    from edgetrain.train.records import EpochRecord, StepRecord
    from edgetrain.train.stopping import InterruptedRunError
    from edgetrain.train.throttle import Throttle
    from edgetrain.train.trainer import Trainer

_HOMES = {
    "Callback": "callbacks",
    "CrossEntropy": "objectives",
    "EpochRecord": "records",
    "InterruptedRunError": "stopping",
    "Objective": "objectives",
    "Recipe": "recipe",
    "StepRecord": "records",
    "Throttle": "throttle",
    "Trainer": "trainer",
    "evaluate": "evaluation",
    "load_weights": "checkpoint",
    "newest_checkpoint": "checkpoint",
    "undecayed_parameters": "recipe",
}

__all__ = [
    "Callback",
    "CrossEntropy",
    "EpochRecord",
    "InterruptedRunError",
    "Objective",
    "Recipe",
    "StepRecord",
    "Throttle",
    "Trainer",
    "evaluate",
    "load_weights",
    "newest_checkpoint",
    "undecayed_parameters",
    "write_atomically",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"edgetrain.train.{_HOMES[name]}"), name)
    if name == "write_atomically":
        return importlib.import_module("edgetrain.files").write_atomically
    raise AttributeError(f"module 'edgetrain.train' has no attribute {name!r}")
