"""Training steps with ONNX Runtime's training artifacts; imports numpy and onnxruntime, never torch.

``edgetrain export RUN --format ort-training`` writes the artifacts (:mod:`edgetrain.export.ort_training`).
``onnxruntime.training.api`` offers the same steps, but imports torch; here the bindings below it are used.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.errors import MissingExtraError, StorageError

TRAINING, EVAL, OPTIMIZER = "training_model.onnx", "eval_model.onnx", "optimizer_model.onnx"
CHECKPOINT, MANIFEST = "checkpoint", "manifest.json"

Array = npt.NDArray[Any]


class OrtSteps:
    """A network being trained by ONNX Runtime on the CPU.

    Args:
        folder: with the artifacts.
        checkpoint: the state to start from; None: the one in ``folder``.
        threads: of ONNX Runtime; None: all.
        arena: let ONNX Runtime keep memory that it has freed; faster, and a higher peak.

    Attributes:
        manifest: what ``manifest.json`` says.

    Raises:
        MissingExtraError: onnxruntime is absent or has no training.
        StorageError: an artifact is missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        checkpoint: str | Path | None = None,
        threads: int | None = None,
        arena: bool = False,
    ) -> None:
        api = training_api()
        folder = Path(folder)
        self._api = api
        self._device = api.OrtDevice(api.OrtDevice.cpu(), api.OrtDevice.default_memory(), 0)
        options = api.SessionOptions()
        options.enable_cpu_mem_arena = arena
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = threads or 0
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self._state = api.load_checkpoint(str(checkpoint or folder / CHECKPOINT))
            models = str(folder / TRAINING), self._state, str(folder / EVAL)
            self._module = api.Module(*models, self._device, options)
            self._optimizer = api.Optimizer(str(folder / OPTIMIZER), self._state, self._device, options)
        except (OSError, ValueError, RuntimeError) as error:
            raise StorageError(
                found=f"{folder} cannot be read: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
                expected="the training artifacts of edgetrain export --format ort-training",
                action="export them again",
            ) from error

    def gradients(self, images: Array, labels: Array) -> tuple[float, Array]:
        """Loss and logits (n, classes) of a batch; the gradients are added to those that are there.

        Args:
            images: (n, c, h, w) float32 on the scale that the manifest says.
            labels: (n,) int64.
        """
        return self._run(self._module.train_step_with_ort_values, images, labels)

    def update(self, rate: float) -> None:
        """One optimiser step with learning rate ``rate``; the gradients are then zero."""
        self._optimizer.set_learning_rate(rate)
        self._optimizer.optimizer_step()
        self._module.lazy_reset_grad()

    def step(self, images: Array, labels: Array, *, rate: float) -> tuple[float, Array]:
        """:meth:`gradients`, then :meth:`update`."""
        found = self.gradients(images, labels)
        self.update(rate)
        return found

    def evaluate(self, images: Array, labels: Array) -> tuple[float, Array]:
        """Loss and logits (n, classes) in evaluation mode: batch norms by running statistics."""
        return self._run(self._module.eval_step_with_ort_values, images, labels)

    def names(self, *, trained: bool = True) -> list[str]:
        """Names of the parameters, sorted; with ``trained`` False, of all that the checkpoint holds."""
        names: list[str] = sorted(self._state.parameter_names())
        return [name for name in names if not trained or self._state.get_parameter(name).requires_grad]

    def value(self, name: str) -> Array:
        """A copy of a parameter or running statistic."""
        return np.array(self._state.get_parameter(name).data.numpy())

    def gradient(self, name: str) -> Array:
        """A copy of the gradient that the last calls of :meth:`gradients` added up."""
        return np.array(self._state.get_parameter(name).grad.numpy())

    def save(self, path: str | Path) -> None:
        """The state, that of the optimiser included, to ``path``; pass it as ``checkpoint`` to go on."""
        self._api.save_checkpoint(self._state, str(path), True)

    def _run(self, call: Any, images: Array, labels: Array) -> tuple[float, Array]:
        feeds, fetches = self._api.OrtValueVector(), self._api.OrtValueVector()
        for value in (np.ascontiguousarray(images, np.float32), np.ascontiguousarray(labels, np.int64)):
            feeds.push_back(self._api.OrtValue.ortvalue_from_numpy(value, self._device))
        call(feeds, fetches)
        loss, logits = (np.array(fetched.numpy()) for fetched in fetches)
        return float(loss), logits


def training_api() -> Any:
    """The bindings of onnxruntime-training.

    Raises:
        MissingExtraError: onnxruntime is absent or has no training.
    """
    try:
        with _keeping_out("torch", "onnx"):
            from onnxruntime.capi import _pybind_state
    except ImportError as error:
        raise _missing("onnxruntime is not installed") from error
    if not hasattr(_pybind_state, "PropagateCastOpsStrategy"):
        raise _missing("the onnxruntime that is installed is the one without training")
    return _pybind_state


@contextlib.contextmanager
def _keeping_out(*names: str) -> Iterator[None]:
    """Inside, packages that are not loaded yet cannot be: the training wheel of ONNX Runtime takes what it finds."""
    barred = [name for name in names if name not in sys.modules]
    for name in barred:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        for name in barred:
            del sys.modules[name]


def _missing(found: str) -> MissingExtraError:
    return MissingExtraError(
        found=found,
        expected="onnxruntime-training-cpu 1.19.2, which exists for Linux on x86-64 and Python up to 3.12",
        action="run pip uninstall onnxruntime, then pip install onnxruntime-training-cpu==1.19.2; both own one module",
    )
