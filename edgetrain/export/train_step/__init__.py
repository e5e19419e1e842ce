"""The training step of a plan as an ordinary ONNX graph, see :mod:`edgetrain.export.train_step.record`."""
