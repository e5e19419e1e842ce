"""Training without PyTorch: runs what ``edgetrain export --format train-step`` wrote, with NumPy and ONNX Runtime.

    import edgetrain.lite
    step = edgetrain.lite.load("export/train-step")
    for record in step.fit("photos", epochs=3):
        print(record.epoch, record.loss, record.accuracy)

On a small board the framework is the largest tensor: importing PyTorch takes more memory than a planned step.
"""

from __future__ import annotations

from edgetrain.lite.run import LiteRun, load

__all__ = ["LiteRun", "load"]
