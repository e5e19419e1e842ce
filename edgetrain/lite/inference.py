"""The folded inference model of a state: new weights at their places in ``inference.onnx``.

``fold.onnx`` computes the folded weights from the state, as PyTorch's folds do. They are raw bytes in the file of the
network, at places that the manifest names; the rest of the file stays as it was exported. The result is compared with
``eval.onnx`` on the same state before it gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
    about, new = run.manifest["inference"], path.with_name(f".{path.name}.new")
    try:
        write_atomically(new, _pieces(run, folding, run.folder / about["file"], about["offsets"]))
        difference = _difference(run, new)
        if not difference <= about["bound"]:
            raise ExportError(
                found=f"a folded network whose logits are {difference:.1e} of the largest away from the state's",
                expected=f"at most {about['bound']:.0e}; infinite where the state holds what is no number",
                action="resume from an earlier checkpoint",
            )
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return difference


def _pieces(run: LiteRun, folding: Session, exported: Path, offsets: dict[str, int]) -> Iterator[bytes | memoryview]:
    """The file ``exported`` with the folded weights of ``run`` at their places."""
    found: dict[str, Array] = {name: np.empty(shape, dtype) for name, (shape, dtype) in folding.outputs.items()}
    folding.run(run.state, found)
    with exported.open("rb") as file:
        for name in sorted(offsets, key=lambda name: offsets[name]):
            yield file.read(offsets[name] - file.tell())
            weight = found.pop(_FOLDED + name).reshape(-1).view(np.uint8)
            yield weight.data
            file.seek(weight.nbytes, os.SEEK_CUR)
        yield file.read()


def _difference(run: LiteRun, path: Path) -> float:
    """Largest difference of a logit on random pixels, relative to the largest; in as little memory as it takes."""
    ort, shape = onnxruntime(), run.manifest["input_shape"]
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    count = min(_IMAGES, run.manifest["batch_size"] // run.manifest["micro_batches"])
    pixels = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    mean, std = (np.array(run.manifest[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    expected = run.logits((pixels - mean) / std)
    (logits,) = session.run(["logits"], {"images": pixels})
    if not (np.isfinite(expected).all() and np.isfinite(logits).all()):
        return float("inf")
    return float(np.abs(logits - expected).max() / np.abs(expected).max())
