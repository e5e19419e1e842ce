"""Training: recipe, loop, checkpoints, data."""

from edgetrain.files import write_atomically
from edgetrain.train.callbacks import Callback
from edgetrain.train.checkpoint import load_weights, newest_checkpoint
from edgetrain.train.evaluation import evaluate
from edgetrain.train.objectives import CrossEntropy, Objective
from edgetrain.train.recipe import Recipe, undecayed_parameters
from edgetrain.train.records import EpochRecord, StepRecord
from edgetrain.train.stopping import InterruptedRunError
from edgetrain.train.tensorboard import TensorBoard
from edgetrain.train.throttle import Throttle
from edgetrain.train.trainer import Trainer

__all__ = [
    "Callback",
    "CrossEntropy",
    "EpochRecord",
    "InterruptedRunError",
    "Objective",
    "Recipe",
    "StepRecord",
    "TensorBoard",
    "Throttle",
    "Trainer",
    "evaluate",
    "load_weights",
    "newest_checkpoint",
    "undecayed_parameters",
    "write_atomically",
]
