"""The form of a device profile.

To add a quantity: a field of type ``Quantity | None`` in :class:`Profile`, and its units in ``_UNITS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from pydantic import Field, model_validator

from edgetrain.profiles import quantity as units
from edgetrain.profiles.consistency import check_consistency
from edgetrain.profiles.quantity import Fact, Quantity, Sourced, Strict
from edgetrain.units import MIB

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Training = Literal["pytorch", "exported-step", "none"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

CUBLAS_WORKSPACE_BYTES = 8_519_680  # CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8, that is 2 x 4096 KiB + 8 x 16 KiB
LARGE_CUBLAS_WORKSPACE_BYTES = 32 * MIB
_LARGE_CUBLAS_MAJORS = (9, 10, 12)

# by the first part of the path of a field; rates and convolution have a precision as the second
_UNITS: dict[str, Mapping[str, float]] = {
    **dict.fromkeys(("memory", "carve_out", "system_reserved", "context", "framework"), units.SIZES),
    **dict.fromkeys(("default_budget", "cublas_workspace", "cudnn_workspace"), units.SIZES),
    **dict.fromkeys(("bandwidth", "elementwise"), units.BANDWIDTHS),
    **dict.fromkeys(("rates", "convolution"), units.FLOAT_RATES),
    "compute_capability": units.CAPABILITIES,
    "software": units.OPSETS,
}


class Rates(Strict):
    """Arithmetic peak per precision; a multiplication with its addition counts as two."""

    fp32: Quantity | None = None
    fp16: Quantity | None = None
    bf16: Quantity | None = None
    int8: Quantity | None = None


class CudnnWorkspace(Sourced):
    """How cuDNN chooses scratch memory for a convolution.

    Attributes:
        benchmark: whether every plan whose scratch fits the largest free block is tried
            (``torch.backends.cudnn.benchmark``); the peak then depends on what was free.
        cap: limit set with ``CUDNN_CONV_WSCAP_DBG``; None: PyTorch has no limit of its own.
    """

    benchmark: bool
    cap: Quantity | None = None


class Software(Strict):
    """The last versions that support the device."""

    jetpack: Fact | None = None
    cuda: Fact | None = None
    cudnn: Fact | None = None
    tensorrt: Fact | None = None
    onnx_opset: Quantity | None = None
    python: Fact | None = None
    torch: Fact | None = None


class Profile(Strict):
    """What is known about a device. None means unknown: ask the host.

    Attributes:
        name: short name, as given to ``--device``.
        description: one line for a person.
        kind: which target runs it.
        unified: whether GPU and host share one memory.
        extends: the profile whose fields hold where this one has none.
        power_mode: the clock setting that rates and bandwidth belong to.
        training: how it trains: with PyTorch, with the exported step only, or not at all.
        training_reason: why so.
        memory: what the device has, as its maker says.
        carve_out: how much of it firmware and kernel keep; the rest is MemTotal.
        system_reserved: what processes of system and desktop take.
        context: device memory that the CUDA context and its libraries take, once per process.
        framework: host memory that PyTorch and its libraries take, once per process.
        default_budget: what training may take where nobody says otherwise.
        compute_capability: CUDA's, major.minor.
        bandwidth: of the memory; reads and writes both count.
        rates: arithmetic peak per precision.
        cublas_workspace: scratch of cuBLAS, where it is not PyTorch's default.
        cudnn_workspace: how cuDNN chooses its scratch.
        software: the last versions that support it.
        convolution: measured rate of 3x3 convolutions by precision and channel count.
        elementwise: measured bytes per second of an elementwise addition, by precision.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    kind: Literal["cpu", "cuda"]
    unified: bool
    extends: str | None = None
    power_mode: Fact | None = None
    training: Training = "pytorch"
    training_reason: str | None = None
    memory: Quantity | None = None
    carve_out: Quantity | None = None
    system_reserved: Quantity | None = None
    context: Quantity | None = None
    framework: Quantity | None = None
    default_budget: Quantity | None = None
    compute_capability: Quantity | None = None
    bandwidth: Quantity | None = None
    rates: Rates = Rates()
    cublas_workspace: Quantity | None = None
    cudnn_workspace: CudnnWorkspace | None = None
    software: Software = Software()
    convolution: dict[Precision, dict[int, Quantity]] = Field(default_factory=dict)
    elementwise: dict[Precision, Quantity] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_consistent(self) -> Profile:
        for path, sourced in self.sourced():
            known = _units_of(path)
            if isinstance(sourced, Quantity) and sourced.unit not in known:
                raise ValueError(f"{path} is in {sourced.unit!r}, expected one of {', '.join(known)}")
        check_consistency(self)
        return self

    def sourced(self) -> Iterator[tuple[str, Sourced]]:
        """Every number and fact with its path, such as ``("rates.fp32", Quantity(...))``."""
        for name in type(self).model_fields:
            yield from _walk(name, getattr(self, name))

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the device; None: as many as the host has."""
        return _bytes(self.memory)

    @property
    def context_bytes(self) -> int | None:
        """Device bytes that the CUDA context takes; None: unknown, or no GPU."""
        return _bytes(self.context)

    @property
    def framework_bytes(self) -> int | None:
        """Host bytes that PyTorch's libraries take; None: unknown."""
        return _bytes(self.framework)

    @property
    def available_bytes(self) -> int | None:
        """Memory that is left for training: without carve-out, system and context.

        Where GPU and host share the memory, and on a CPU, without the framework's libraries, too. An overhead that
        nobody measured (:attr:`unknown_overheads`) is not taken off: then this is the most there can be.
        """
        if self.memory is None:
            return None
        taken = (self.carve_out, self.system_reserved, self.context, self.framework if self._one_memory else None)
        return (_bytes(self.memory) or 0) - sum(_bytes(overhead) or 0 for overhead in taken)

    @property
    def unknown_overheads(self) -> tuple[str, ...]:
        """Names of the overheads that the device has and this profile has no figure for."""
        asked = ["system_reserved"]
        asked += ["carve_out"] * self.unified + ["context"] * (self.kind == "cuda") + ["framework"] * self._one_memory
        return tuple(name for name in asked if getattr(self, name) is None)

    @property
    def default_budget_bytes(self) -> int | None:
        """Budget in bytes where none is given; None: what the host has available."""
        return _bytes(self.default_budget)

    @property
    def bandwidth_bytes_per_second(self) -> float | None:
        """Bytes that the memory moves in a second; None: unknown."""
        return None if self.bandwidth is None else amount("bandwidth", self.bandwidth)

    def rate_flops(self, precision: Precision) -> float | None:
        """Operations per second at ``precision``, dense; None: unknown, or the device has none."""
        rate: Quantity | None = getattr(self.rates, precision)
        return None if rate is None else amount(f"rates.{precision}", rate)

    @property
    def compute_capability_pair(self) -> tuple[int, int] | None:
        """Compute capability as (major, minor); None on a CPU or where the device has to be asked."""
        if self.compute_capability is None:
            return None
        tenths = round(self.compute_capability.value * 10)
        return tenths // 10, tenths % 10

    @property
    def cublas_workspace_bytes(self) -> int | None:
        """Scratch of one cuBLAS handle and stream, taken from PyTorch's allocator; None: no GPU, or an unknown one."""
        if self.cublas_workspace is not None:
            return _bytes(self.cublas_workspace)
        capability = self.compute_capability_pair
        return None if capability is None else default_cublas_workspace_bytes(capability[0])

    @property
    def onnx_opset(self) -> int | None:
        """The newest ONNX opset that the device's last TensorRT reads; None: unknown."""
        opset = self.software.onnx_opset
        return None if opset is None else int(opset.value)

    @property
    def _one_memory(self) -> bool:
        return self.unified or self.kind == "cpu"


def default_cublas_workspace_bytes(major: int) -> int:
    """PyTorch's cuBLAS workspace for compute capability ``major``.x (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
    return LARGE_CUBLAS_WORKSPACE_BYTES if major in _LARGE_CUBLAS_MAJORS else CUBLAS_WORKSPACE_BYTES


def amount(path: str, quantity: Quantity) -> float:
    """``quantity`` in bytes, bytes per second or operations per second, whichever the field at ``path`` holds."""
    return quantity.value * _units_of(path)[quantity.unit]


def _units_of(path: str) -> Mapping[str, float]:
    field, *rest = path.split(".")
    known = _UNITS.get(field, {})
    return units.INTEGER_RATES if known is units.FLOAT_RATES and rest[:1] == ["int8"] else known


def _walk(path: str, value: object) -> Iterator[tuple[str, Sourced]]:
    if isinstance(value, Sourced):
        yield path, value
    children: dict[str, object] = {}
    if isinstance(value, Strict):
        children = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, dict):
        children = {str(key): child for key, child in value.items()}
    for name, child in children.items():
        yield from _walk(f"{path}.{name}", child)


def _bytes(quantity: Quantity | None) -> int | None:
    return None if quantity is None else int(quantity.value * units.SIZES[quantity.unit])
