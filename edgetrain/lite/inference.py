"""The folded inference model of a state: new weights at their places in ``inference.onnx``.

``fold.onnx`` computes the folded weights from the state, as PyTorch's folds do. They are raw bytes in the file of the
network, at places that the manifest names; the rest of the file stays as it was exported. The result is compared with
``eval.onnx`` on the same state before it gets its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrain.errors import ExportError
from edgetrain.files import write_atomically
from edgetrain.lite.runtime import Array, Session, onnxruntime

if TYPE_CHECKING:
    from edgetrain.lite.run import LiteRun

_FOLDED = "folded."
_IMAGES = 4


def write_inference(run: LiteRun, folding: Session, path: Path) -> float:
    """Writes the folded network with the weights of ``run`` to ``path``; gives the largest difference of a logit.

    Raises:
        ExportError: the export holds no folded network, or what was made disagrees with the state.
        StorageError: see :func:`edgetrain.files.write_atomically`.
    """
    about = run.manifest["inference"]
    found: dict[str, Array] = {name: np.empty(shape, dtype) for name, (shape, dtype) in folding.outputs.items()}
    folding.run(run.state, found)
    model = bytearray((run.folder / about["file"]).read_bytes())
    for name, offset in about["offsets"].items():
        data = found[_FOLDED + name].tobytes()
        model[offset : offset + len(data)] = data
    difference = _difference(run, bytes(model))
    if not difference <= about["bound"]:
        raise ExportError(
            found=f"a folded network whose logits are {difference:.1e} of the largest away from the state's",
            expected=f"at most {about['bound']:.0e}; infinite where the state holds what is no number",
            action="resume from an earlier checkpoint",
        )
    write_atomically(path, bytes(model))
    return difference


def _difference(run: LiteRun, model: bytes) -> float:
    """Largest difference of a logit on random pixels, relative to the largest."""
    ort, shape = onnxruntime(), run.manifest["input_shape"]
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session: Any = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    count = min(_IMAGES, run.manifest["batch_size"] // run.manifest["micro_batches"])
    pixels = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    mean, std = (np.array(run.manifest[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    expected = run.logits((pixels - mean) / std)
    (logits,) = session.run(["logits"], {"images": pixels})
    if not (np.isfinite(expected).all() and np.isfinite(logits).all()):
        return float("inf")
    return float(np.abs(logits - expected).max() / np.abs(expected).max())
