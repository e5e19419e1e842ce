"""Export of trained networks."""

from edgetrain.export.onnx import Verification, export_onnx

__all__ = ["Verification", "export_onnx"]
