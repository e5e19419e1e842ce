"""Export of trained networks."""

from edgetrain.export.engines.parsing import engine_weight_names
from edgetrain.export.engines.refit import refit_engine
from edgetrain.export.engines.report import EngineReport, read_report
from edgetrain.export.engines.run import Comparison, EngineRun, run_engine
from edgetrain.export.onnx import Verification, export_onnx
from edgetrain.export.tensorrt import build_engine

__all__ = [
    "Comparison",
    "EngineReport",
    "EngineRun",
    "Verification",
    "build_engine",
    "engine_weight_names",
    "export_onnx",
    "read_report",
    "refit_engine",
    "run_engine",
]
