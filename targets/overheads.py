"""What libraries take once per process, measured in fresh processes: a library is loaded only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

from edgetrain.errors import EdgetrainError
from edgetrain.targets.jetson import find_tegra
from edgetrain.targets.measured import Measured, summarise
from edgetrain.targets.proc import host_memory, proc_bytes

_RUNS = 3
_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Overheads:
    """What the libraries take once per process.

    Attributes:
        framework_bytes: resident host memory that ``import torch`` adds; with CUDA, after the first convolution.
        context_bytes: device memory beyond the allocator's; None without CUDA, or where nothing can read it.
    """

    framework_bytes: Measured
    context_bytes: Measured | None


def measure_overheads(device: Literal["cpu", "cuda"], *, runs: int = _RUNS) -> Overheads:
    """What the libraries take, each run in a fresh process.

    Raises:
        EdgetrainError: a process failed.
    """
    found = [_overheads_once(device) for _ in range(runs)]
    contexts = [run["context_bytes"] for run in found if run["context_bytes"] is not None]
    return Overheads(
        framework_bytes=summarise([run["framework_bytes"] for run in found]),
        context_bytes=summarise(contexts) if contexts else None,
    )


def overheads_of_this_process(device: str) -> dict[str, int | None]:
    """Loads torch, and with CUDA a context and a convolution, and says what they took; for a fresh process."""
    import psutil

    process = psutil.Process()
    resident = process.memory_info().rss
    before = _device_used_bytes() if device == "cuda" else None
    import torch

    context_bytes = None
    if device == "cuda":
        x = torch.ones(1, 8, 8, 8, device="cuda")
        torch.nn.functional.conv2d(x, torch.ones(8, 8, 3, 3, device="cuda"))
        torch.mm(x[0, 0], x[0, 0])
        torch.cuda.synchronize()
        after = _device_used_bytes()
        if before is not None and after is not None:
            context_bytes = after - before - torch.cuda.memory_reserved()
    framework_bytes = process.memory_info().rss - resident
    if context_bytes is not None and find_tegra() is not None:
        context_bytes -= framework_bytes  # one memory: what the process holds itself was counted, too
    return {
        "framework_bytes": framework_bytes,
        "context_bytes": None if context_bytes is None else max(0, context_bytes),
    }


def own_bytes(device: str, overheads: Overheads) -> int | None:
    """What this process itself takes of the memory of ``device``; None where the context is unknown.

    Resident pages of files do not count: the kernel can drop them, and calls them available.
    """
    if sys.platform.startswith("linux"):
        host_bytes = proc_bytes("self/status")["RssAnon"]
    else:
        import psutil

        host_bytes = int(psutil.Process().memory_info().rss)
    if device == "cpu":
        return host_bytes
    import torch

    if overheads.context_bytes is None:
        return None
    torch.cuda.empty_cache()
    device_bytes = torch.cuda.memory_reserved() + round(overheads.context_bytes.median)
    return device_bytes + (host_bytes if torch.cuda.get_device_properties().is_integrated else 0)


def _overheads_once(device: str) -> dict[str, Any]:
    code = (
        "import json\nfrom edgetrain.targets.overheads import overheads_of_this_process as measure\n"
        f"print(json.dumps(measure({device!r})))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        failure = f"ended with {done.returncode}: {done.stderr[-300:]}" if done.returncode else None
    except subprocess.TimeoutExpired:
        failure = f"did not end within {_TIMEOUT_SECONDS} s"
    if failure is not None:
        raise EdgetrainError(
            found=f"the process that measures overheads {failure}",
            expected="PyTorch to load and to use the device",
            action="run python -c 'import torch', and look at what it says",
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _device_used_bytes() -> int | None:
    """Bytes in use on the first CUDA device, read without a context; None where nothing can say.

    A context would take memory itself. Other processes count, so that only a difference means something.
    """
    if find_tegra() is not None:
        memory = host_memory()
        return memory.total_bytes - memory.available_bytes
    try:
        import pynvml
    except ImportError:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        get = pynvml.nvmlDeviceGetHandleByIndex if visible.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        return int(pynvml.nvmlDeviceGetMemoryInfo(get(int(visible) if visible.isdigit() else visible)).used)
    except pynvml.NVMLError:
        return None
