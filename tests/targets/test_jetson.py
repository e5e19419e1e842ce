"""Unified memory, on trees of files as a Nano, an Orin, a Thor and a PC have them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetrain.errors import BudgetError, UsageError
from edgetrain.targets import select_target
from edgetrain.targets.host import cpu_name, probe_host
from edgetrain.targets.jetson import JetsonTarget, find_tegra, gpu_used_bytes
from edgetrain.units import KIB, MIB

MEMINFO = "MemTotal:        4051032 kB\nMemFree:          204800 kB\nMemAvailable:    2097152 kB\nHugePages_Total: 0\n"
RELEASE = "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64, DATE: Sat Feb 19 2022\n"


def tree(root: Path, **files: str) -> Path:
    """A root folder with files; a double underscore in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("0", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return tree(
        tmp_path,
        proc__meminfo=MEMINFO + "NvMapMemUsed:     614400 kB\n",
        etc__nv_tegra_release=RELEASE,
        proc__device0tree__compatible="nvidia,p3450-0000\0nvidia,tegra210\0",
        proc__device0tree__model="NVIDIA Jetson Nano Developer Kit\0",
        proc__cpuinfo="processor\t: 0\nBogoMIPS\t: 38.40\n",
    )


class Allocator:
    """PyTorch's allocator on an integrated GPU of 4 GB, as far as a target asks it."""

    name = "Orin"
    reserved_bytes = 100 * MIB

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def readings(self) -> dict[str, int]:
        return {"allocator": 60 * MIB, "reserved": self.reserved_bytes}

    def cap(self, budget_bytes: int) -> None:
        self.calls.append(("cap", budget_bytes))

    def uncap(self) -> None:
        self.calls.append(("uncap", 0))

    def is_out_of_memory(self, error: BaseException) -> bool:
        return "CUDA out of memory" in str(error)


def target(root: Path, **keys: Any) -> tuple[JetsonTarget, Allocator]:
    allocator = Allocator()
    return JetsonTarget(allocator, root=root, environment=keys), allocator  # type: ignore[arg-type]


def test_nano_is_found_by_its_release_file(nano: Path):
    found = find_tegra(nano)
    assert found is not None
    assert found.l4t == "32.7.1"
    assert found.model == "NVIDIA Jetson Nano Developer Kit"
    assert found.compatible == ("nvidia,p3450-0000", "nvidia,tegra210")


def test_orin_is_found_by_its_device_tree(tmp_path: Path):
    """A container has no release file, and some have the tree under /sys only."""
    root = tree(tmp_path, sys__firmware__devicetree__base__compatible="nvidia,p3767-0005\0nvidia,tegra234\0")
    found = find_tegra(root)
    assert found is not None
    assert (found.model, found.l4t, found.compatible[-1]) == (None, None, "nvidia,tegra234")


def test_release_file_of_another_form(tmp_path: Path):
    found = find_tegra(tree(tmp_path, etc__nv_tegra_release="custom build\n"))
    assert found is not None
    assert found.l4t is None


def test_other_boards_are_none(tmp_path: Path):
    assert find_tegra(tmp_path) is None
    assert find_tegra(tree(tmp_path, proc__device0tree__compatible="raspberrypi,5-model-b\0brcm,bcm2712\0")) is None


def test_available_is_the_kernels_figure_and_page_cache_counts(nano: Path):
    memory = target(nano)[0].probe()
    assert memory.total_bytes == 4051032 * KIB
    assert memory.available_bytes == 2048 * MIB  # not the 200 MiB of MemFree


def test_gpu_memory_of_all_processes(nano: Path, tmp_path: Path):
    assert target(nano)[0].gpu_used_bytes() == 600 * MIB
    thor = tree(tmp_path / "thor", proc__meminfo=MEMINFO)
    assert target(thor)[0].gpu_used_bytes() is None
    assert gpu_used_bytes(tmp_path / "nowhere") is None


def test_readings_are_the_allocators(nano: Path):
    assert target(nano)[0].readings() == {"allocator": 60 * MIB, "reserved": 100 * MIB}


def test_cap_goes_to_the_allocator(nano: Path):
    jetson, allocator = target(nano)
    jetson.cap(400 * MIB)
    jetson.uncap()
    assert allocator.calls == [("cap", 400 * MIB), ("uncap", 0)]
    assert jetson.is_out_of_memory(RuntimeError("CUDA out of memory. Tried"))


def test_cap_that_host_and_gpu_cannot_hold(nano: Path):
    """2048 MiB are available and the allocator holds 100: beyond that the kernel ends a process."""
    jetson, allocator = target(nano)
    jetson.cap(2148 * MIB)
    with pytest.raises(BudgetError, match=r"at most the 2148\.0 MiB that CPU and GPU of Orin have left"):
        jetson.cap(2149 * MIB)
    with pytest.raises(UsageError, match="more than zero bytes"):
        jetson.cap(0)
    assert allocator.calls == [("cap", 2148 * MIB)]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_warned_of(nano: Path, name: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        target(nano, **{name: "backend:native,expandable_segments:True"})
    assert "expandable_segments" in caplog.text
    caplog.clear()
    target(nano, **{name: "expandable_segments:False"})
    assert caplog.text == ""


@pytest.mark.parametrize("integrated", [True, False])
def test_integrated_devices_get_this_target(integrated: bool, monkeypatch: pytest.MonkeyPatch):
    class Properties:
        is_integrated = integrated

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert type(select_target("cuda")).__name__ == ("JetsonTarget" if integrated else "CudaTarget")


def test_probe_of_the_host(nano: Path):
    host = probe_host(nano)
    assert host.memory.available_bytes == 2048 * MIB
    assert host.gpu_used_bytes == 600 * MIB
    assert host.tegra == find_tegra(nano)
    assert host.cpu is None
    assert bool(host.nvml) == (host.nvml_missing is None)
    assert bool(host.gpus) == (host.gpus_missing is None)


def test_name_of_the_cpu(tmp_path: Path):
    assert cpu_name(tree(tmp_path, proc__cpuinfo="processor\t: 0\nmodel name\t: AMD EPYC\n")) == "AMD EPYC"
    pi = tree(tmp_path / "pi", proc__cpuinfo="processor\t: 0\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n")
    assert cpu_name(pi) == "Raspberry Pi 5 Model B Rev 1.0"


@pytest.mark.gpu
def test_probe_of_a_gpu():
    (gpu, *_), missing = (host := probe_host()).gpus, host.gpus_missing
    assert missing is None
    assert gpu.compute_capability == torch.cuda.get_device_capability(0)
    assert 0 < gpu.available_bytes <= gpu.total_bytes
