"""Export of trained networks."""

from edgetrain.export.fold import Fold, FoldReport, fold
from edgetrain.export.onnx import Verification, export_onnx

__all__ = ["Fold", "FoldReport", "Verification", "export_onnx", "fold"]
