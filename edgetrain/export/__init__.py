"""Export of trained networks: folded, as a graph, verified, with a certificate."""

from edgetrain.export.certificate import Certificate
from edgetrain.export.describe import About
from edgetrain.export.engines.parsing import engine_weight_names
from edgetrain.export.engines.refit import refit_engine
from edgetrain.export.engines.report import EngineReport, read_report
from edgetrain.export.engines.run import EngineRun, run_engine
from edgetrain.export.fold import Fold, FoldReport, fold
from edgetrain.export.images import ImageSet, Normalisation
from edgetrain.export.inference import Inference, Prediction, infer
from edgetrain.export.lint import Finding, lint
from edgetrain.export.onnx import Export, export_onnx
from edgetrain.export.ort_training import OrtTraining, export_ort_training
from edgetrain.export.tensorrt import build_engine
from edgetrain.export.verify import Comparison

__all__ = [
    "About",
    "Certificate",
    "Comparison",
    "EngineReport",
    "EngineRun",
    "Export",
    "Finding",
    "Fold",
    "FoldReport",
    "ImageSet",
    "Inference",
    "Normalisation",
    "OrtTraining",
    "Prediction",
    "build_engine",
    "engine_weight_names",
    "export_onnx",
    "export_ort_training",
    "fold",
    "infer",
    "lint",
    "read_report",
    "refit_engine",
    "run_engine",
]
