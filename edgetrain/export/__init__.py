"""Export of trained networks: folded, as a graph, verified, with a certificate."""

from edgetrain.export.certificate import Certificate
from edgetrain.export.describe import About
from edgetrain.export.fold import Fold, FoldReport, fold
from edgetrain.export.images import ImageSet, Normalisation
from edgetrain.export.inference import Inference, Prediction, infer
from edgetrain.export.lint import Finding, lint
from edgetrain.export.onnx import Export, export_onnx

__all__ = [
    "About",
    "Certificate",
    "Export",
    "Finding",
    "Fold",
    "FoldReport",
    "ImageSet",
    "Inference",
    "Normalisation",
    "Prediction",
    "export_onnx",
    "fold",
    "infer",
    "lint",
]
