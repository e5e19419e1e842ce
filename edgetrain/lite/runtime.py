"""ONNX Runtime as it has to be set up for a planned step.

The graph's nodes stand in the order of the plan, and nothing may change it: a recomputation that is moved to the front,
or found to be "common" with the pass that it repeats, keeps in disguise what the plan drops. So graph optimisations are
off and nodes run by priority, which without priorities is their order.

A value's memory is free after its last reader only where ONNX Runtime does not plan to use it again for values of the
same shape: such a place it holds until the last of them, which in a step that goes forward and back is nearly the whole
step. So reuse by plan is off. A session's own arena grows by doubling and is off too. In its place the process has one
arena, which takes from the system what a value needs and no more, and which all sessions share. Without any, every
value is in fresh pages, and their faults take several times as long as the arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.errors import MissingExtraError, ModelError, StorageError

Array = npt.NDArray[Any]
_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
_MMAP_THRESHOLD, _THRESHOLD_BYTES = -3, 1 << 18  # mallopt(3)
_UNLIMITED, _AS_REQUESTED, _LARGEST_REST = 0, 1, -1  # OrtArenaCfg; -1: ONNX Runtime's own choice


@contextlib.contextmanager
def _without_pytorch() -> Iterator[None]:
    """Keeps a package that imports PyTorch where there is one from doing so: it takes 200 MB."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("torch", None)


def onnxruntime() -> Any:
    """The module, of whichever package is installed.

    Raises:
        MissingExtraError: none is.
    """
    try:
        with _without_pytorch():
            return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError(
            found="no ONNX Runtime",
            expected="the package onnxruntime",
            action="pip install onnxruntime",
        ) from error


def return_large_blocks() -> None:
    """Lets glibc give every large block back as soon as it is freed; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _THRESHOLD_BYTES)


@functools.cache
def _share_one_arena() -> None:
    """The allocator of sessions with ``session.use_env_allocators``: it grows by what is asked for.

    Where another part of the process has registered one already, that one serves.
    """
    ort = onnxruntime()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(RuntimeError):
        ort.create_and_register_allocator(place, ort.OrtArenaCfg(_UNLIMITED, _AS_REQUESTED, -1, _LARGEST_REST))


class Session:
    """A graph, ready to run on arrays that stay where they are.

    Args:
        providers: execution providers in the order of preference; None: :func:`default_providers`.
        profile: where the file of :meth:`end_profiling` begins; None: nothing is measured.

    Raises:
        StorageError: ONNX Runtime does not take the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        profile: Path | None = None,
    ) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        _share_one_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.enable_mem_reuse = False
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=list(providers or default_providers(ort))
            )
        except Exception as error:  # each release has its own
            raise StorageError(
                found=f"{path}: {error}",
                expected="a graph that this ONNX Runtime reads",
                action="export the run again, for the opset that is installed here",
            ) from error
        self.inputs = {i.name: (tuple(i.shape), np.dtype(_TYPES[i.type])) for i in self._session.get_inputs()}
        self.outputs = {o.name: (tuple(o.shape), np.dtype(_TYPES[o.type])) for o in self._session.get_outputs()}

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return list(self._session.get_providers())

    def end_profiling(self) -> str:
        """The file of what has run, and for how long."""
        return str(self._session.end_profiling())

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Runs the graph on ``inputs``; each result is written to its array in ``outputs``.

        An array may be both: a new value may take the place of its old one.
        """
        binding = self._session.io_binding()
        for name, (shape, dtype) in self.inputs.items():
            array = _checked(name, inputs[name], shape, dtype)
            binding.bind_input(name, "cpu", 0, dtype.type, shape, array.ctypes.data)
        for name, (shape, dtype) in self.outputs.items():
            array = _checked(name, outputs[name], shape, dtype)
            binding.bind_output(name, "cpu", 0, dtype.type, shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def _checked(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``array``, whose memory the runtime is given; raises ModelError where the graph has another shape or type."""
    if array.shape == shape and array.dtype == dtype and array.flags.c_contiguous:
        return array
    raise ModelError(
        found=f"{name} of shape {array.shape}, type {array.dtype}" + ("" if array.flags.c_contiguous else ", strided"),
        expected=f"shape {shape} and type {dtype}, dense",
        action="give batches of the size for which the step was exported",
    )


def default_providers(ort: Any) -> list[str]:
    """TensorRT's and CUDA's where they are installed, then the CPU's."""
    wanted = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    return [name for name in wanted if name in ort.get_available_providers()]
