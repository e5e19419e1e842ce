"""What this host is: CPU and memory, Tegra, and its NVIDIA GPUs as driver and PyTorch see them.

Which figure counts (``available_bytes`` of a :class:`Gpu`): on a GPU that shares the host's memory the kernel's
MemAvailable, else the driver's free memory. Torch is imported only where a CUDA driver is installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from edgetrain.targets.jetson import Tegra, find_tegra, gpu_used_bytes
from edgetrain.targets.ledger import Ledger, read_ledger
from edgetrain.targets.memory import HostMemory, select_target
from edgetrain.targets.proc import ROOT, host_memory


@dataclass(frozen=True)
class NvmlGpu:
    """A GPU as NVML sees it; None where NVML does not support the question, as on Tegra.

    Attributes:
        name: as the driver calls it.
        total_bytes: its memory.
        used_bytes: what all processes and the driver hold.
    """

    name: str
    total_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """A GPU as PyTorch sees it.

    Attributes:
        name: as the driver calls it.
        compute_capability: (major, minor).
        integrated: whether it shares the host's memory.
        driver_free_bytes: free memory that ``cudaMemGetInfo`` gives.
        total_bytes, available_bytes: by the rule above.
    """

    name: str
    compute_capability: tuple[int, int]
    integrated: bool
    driver_free_bytes: int
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Host:
    """This host.

    Attributes:
        machine: architecture, such as ``"aarch64"``.
        cpu: name of the CPU; None: the kernel does not say.
        cpus: logical CPUs that this process may use.
        memory: MemTotal and MemAvailable.
        ledger: what the memory is divided into.
        tegra: the board, where it is a Tegra.
        gpu_used_bytes: ``NvMapMemUsed``, where the kernel has it.
        nvml: GPUs as NVML sees them.
        nvml_missing: why there are none.
        gpus: GPUs as PyTorch sees them.
        gpus_missing: why there are none.
    """

    machine: str
    cpu: str | None
    cpus: int
    memory: HostMemory
    ledger: Ledger
    tegra: Tegra | None
    gpu_used_bytes: int | None
    nvml: tuple[NvmlGpu, ...]
    nvml_missing: str | None
    gpus: tuple[Gpu, ...]
    gpus_missing: str | None


def probe_host(root: Path = ROOT) -> Host:
    """Reads this host. ``root`` is where ``/proc`` and ``/etc`` are found; drivers are always asked directly."""
    nvml, nvml_missing = _nvml_gpus()
    gpus, gpus_missing = _torch_gpus()
    return Host(
        machine=platform.machine(),
        cpu=cpu_name(root),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=host_memory(root),
        ledger=read_ledger(root),
        tegra=find_tegra(root),
        gpu_used_bytes=gpu_used_bytes(root),
        nvml=nvml,
        nvml_missing=nvml_missing,
        gpus=gpus,
        gpus_missing=gpus_missing,
    )


def cpu_name(root: Path = ROOT) -> str | None:
    """``model name`` or ``Model`` of ``/proc/cpuinfo``: that of the CPU, or on ARM boards that of the board."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name") or fields.get("Model") or None


def _nvml_gpus() -> tuple[tuple[NvmlGpu, ...], str | None]:
    try:
        import pynvml
    except ImportError:
        return (), "nvidia-ml-py is not installed: pip install 'edgetrain[gpu]'"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"{error}"
    try:
        count = pynvml.nvmlDeviceGetCount()
        found = tuple(_nvml_gpu(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count))
    except pynvml.NVMLError as error:
        return (), f"{error}"
    finally:
        pynvml.nvmlShutdown()
    return found, None if found else "the driver has no device"


def _nvml_gpu(handle: object) -> NvmlGpu:
    import pynvml

    name = pynvml.nvmlDeviceGetName(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return NvmlGpu(name, None, None)
    return NvmlGpu(name, int(memory.total), int(memory.used))


def _torch_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    if not _has_cuda_driver():
        return (), "no CUDA driver is installed"
    import torch

    if torch.version.cuda is None:
        return (), f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return (), f"PyTorch {torch.__version__} cannot use the CUDA driver"
    return tuple(_torch_gpu(index) for index in range(torch.cuda.device_count())), None


def _torch_gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    memory = select_target(f"cuda:{index}").probe()
    return Gpu(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        integrated=bool(properties.is_integrated),
        driver_free_bytes=torch.cuda.mem_get_info(index)[0],
        total_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
    )


def _has_cuda_driver() -> bool:
    library = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
