"""Training: recipe, loop, checkpoints, data."""

from edgetrain.files import write_atomically
from edgetrain.train.checkpoint import load_weights, save_checkpoint
from edgetrain.train.recipe import Recipe, undecayed_parameters
from edgetrain.train.trainer import EpochRecord, InterruptedRunError, StepRecord, Trainer, evaluate

__all__ = [
    "EpochRecord",
    "InterruptedRunError",
    "Recipe",
    "StepRecord",
    "Trainer",
    "evaluate",
    "load_weights",
    "save_checkpoint",
    "undecayed_parameters",
    "write_atomically",
]
