"""Training: recipe, loop, checkpoints, data."""

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
