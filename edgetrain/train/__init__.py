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
    from edgetrain.train.distillation import TeacherObjective
    from edgetrain.train.embeddings import Contrastive, Triplet, nearest_centroid
    from edgetrain.train.evaluation import evaluate
    from edgetrain.train.guard import Guard
    from edgetrain.train.objectives import CrossEntropy, Objective
    from edgetrain.train.recipe import Recipe, undecayed_parameters
    from edgetrain.train.records import EpochRecord, MemoryEvent, StepRecord
    from edgetrain.train.stopping import InterruptedRunError
    from edgetrain.train.teacher import Teacher, tapped_student
    from edgetrain.train.tensorboard import TensorBoard
    from edgetrain.train.throttle import Throttle
    from edgetrain.train.trainer import Trainer

_HOMES = {
    "Callback": "callbacks",
    "Contrastive": "embeddings",
    "CrossEntropy": "objectives",
    "EpochRecord": "records",
    "Guard": "guard",
    "InterruptedRunError": "stopping",
    "MemoryEvent": "records",
    "Objective": "objectives",
    "Recipe": "recipe",
    "StepRecord": "records",
    "Teacher": "teacher",
    "TeacherObjective": "distillation",
    "TensorBoard": "tensorboard",
    "Throttle": "throttle",
    "Trainer": "trainer",
    "Triplet": "embeddings",
    "evaluate": "evaluation",
    "load_weights": "checkpoint",
    "nearest_centroid": "embeddings",
    "newest_checkpoint": "checkpoint",
    "tapped_student": "teacher",
    "undecayed_parameters": "recipe",
}

__all__ = [
    "Callback",
    "Contrastive",
    "CrossEntropy",
    "EpochRecord",
    "Guard",
    "InterruptedRunError",
    "MemoryEvent",
    "Objective",
    "Recipe",
    "StepRecord",
    "Teacher",
    "TeacherObjective",
    "TensorBoard",
    "Throttle",
    "Trainer",
    "Triplet",
    "evaluate",
    "load_weights",
    "nearest_centroid",
    "newest_checkpoint",
    "tapped_student",
    "undecayed_parameters",
    "write_atomically",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"edgetrain.train.{_HOMES[name]}"), name)
    if name == "write_atomically":
        return importlib.import_module("edgetrain.files").write_atomically
    raise AttributeError(f"module 'edgetrain.train' has no attribute {name!r}")
