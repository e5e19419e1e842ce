"""How torch's operators are written with ONNX's, a file per kind; importing this package makes them known."""

from edgetrain.export.train_step.rules import convolution, elementwise, loss, memory, normalisation, pooling, reductions

__all__ = ["convolution", "elementwise", "loss", "memory", "normalisation", "pooling", "reductions"]
