"""The tables of ``edgetrain devices``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from edgetrain.cli.ledger_text import ledger_rows
from edgetrain.units import GIB, format_mib

if TYPE_CHECKING:
    from edgetrain.profiles import Profile
    from edgetrain.profiles.quantity import Sourced
    from edgetrain.targets.host import Host

_BARE_UNITS = {"major.minor": "{:.1f}", "opset": "{:.0f}"}


def print_profiles(built_in: list[Profile], own: list[Profile]) -> None:
    """A row for each, the user's own below a line."""
    from edgetrain.profiles import user_profile_folder

    numbers = ("memory\nGiB", "left\nGiB", "memory\nGB/s", "fp32\nTFLOP/s", "cc")
    table = _table("device", *numbers, "trains with", right=numbers)
    for profile in built_in:
        table.add_row(*_row(profile))
    table.add_section()
    for profile in own:
        table.add_row(*_row(profile))
    _print(table)
    _print("left: after system, CUDA context and framework; ≤ where one of them is unknown")
    _print("-: unknown, or read from this host when it is needed")
    if own:
        _print(f"below the line: your own, from {user_profile_folder()}")
    _print("edgetrain devices NAME: every number with its source; --probe: this host")


def _row(profile: Profile) -> list[str]:
    bandwidth, rate, capability = profile.bandwidth_bytes_per_second, profile.rate_flops("fp32"), None
    if pair := profile.compute_capability_pair:
        capability = f"{pair[0]}.{pair[1]}"
    at_most = "≤ " if profile.unknown_overheads else ""
    return [
        profile.name,
        _or_dash(profile.memory_bytes, "{:.3g}", GIB),
        _or_dash(profile.available_bytes, at_most + "{:.1f}", GIB),
        _or_dash(bandwidth, "{:.4g}", 1e9),
        _or_dash(rate, "{:.3g}", 1e12),
        capability or "-",
        profile.training.replace("-", " "),
    ]


def _or_dash(value: float | None, form: str, unit: float) -> str:
    return "-" if value is None else form.format(value / unit)


def print_profile(profile: Profile) -> None:
    """Every field with its origin."""
    table = _table("field", "value", "from")
    for path, sourced in profile.sourced():
        table.add_row(path, _value(sourced), _origin(sourced))
    table.add_section()
    if profile.available_bytes is not None:
        missing = (
            f"; at most, since unknown: {', '.join(profile.unknown_overheads)}" if profile.unknown_overheads else ""
        )
        table.add_row("left for training", format_mib(profile.available_bytes), f"memory without overheads{missing}")
    if profile.cublas_workspace is None and profile.cublas_workspace_bytes is not None:
        table.add_row(
            "cuBLAS workspace",
            format_mib(profile.cublas_workspace_bytes),
            "PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp, by compute capability",
        )
    reason = f" ({profile.training_reason})" if profile.training_reason else ""
    shared = "one memory with the host" if profile.unified else "a memory of its own"
    _print(f"{profile.name}: {profile.description}")
    _print(f"target: {profile.kind}{f', {shared}' if profile.kind == 'cuda' else ''}")
    _print(f"trains with: {profile.training.replace('-', ' ')}{reason}")
    if profile.extends:
        _print(f"extends: {profile.extends}")
    if table.row_count:
        _print(table)
    else:
        _print("every number is read from the host when it is needed")


def _value(sourced: Sourced) -> str:
    from edgetrain.profiles import Fact, Quantity
    from edgetrain.profiles.profile import CudnnWorkspace

    if isinstance(sourced, Quantity):
        bare = _BARE_UNITS.get(sourced.unit)
        return bare.format(sourced.value) if bare else f"{sourced.value:,.12g} {sourced.unit}"
    if isinstance(sourced, CudnnWorkspace):
        return f"benchmark {'on' if sourced.benchmark else 'off'}, {'capped' if sourced.cap else 'no cap'}"
    return sourced.value if isinstance(sourced, Fact) else ""


def _origin(sourced: Sourced) -> str:
    said = [f"{sourced.source} ({sourced.date})" if sourced.date else sourced.source or ""]
    said = [f"ASSUMED: {sourced.note}", *[f"seen: {text}" for text in said if text]] if sourced.assumption else said
    if sourced.note and not sourced.assumption:
        said.append(sourced.note)
    return "\n".join(said)


def print_host(host: Host) -> None:
    """What the host is; what it has not, with the reason."""
    table = _table("", "")
    table.show_header = False
    table.add_row("machine", ", ".join(text for text in (host.cpu, f"{host.cpus} CPUs", host.machine) if text))
    table.add_row(
        "memory", f"{format_mib(host.memory.total_bytes)}, available {format_mib(host.memory.available_bytes)}"
    )
    for name, size in ledger_rows(host.ledger)[1:]:
        table.add_row(name, size)
    if host.tegra is not None:
        release = f"L4T {host.tegra.l4t}" if host.tegra.l4t else "L4T release unknown"
        table.add_row("Tegra", "\n".join([host.tegra.model or "board unknown", release, *host.tegra.compatible]))
    else:
        table.add_row("Tegra", "no")
    if host.gpu_used_bytes is not None:
        table.add_row("held by the GPU", f"{format_mib(host.gpu_used_bytes)} (NvMapMemUsed)")
    for device in host.nvml:
        used = "memory not supported"
        if device.total_bytes is not None and device.used_bytes is not None:
            used = f"{format_mib(device.total_bytes)}, used {format_mib(device.used_bytes)}"
        table.add_row("NVML", f"{device.name}: {used}")
    if host.nvml_missing:
        table.add_row("NVML", f"none: {host.nvml_missing}")
    for gpu in host.gpus:
        capability = "{}.{}".format(*gpu.compute_capability)
        rule = "MemAvailable: one memory with the host" if gpu.integrated else "free by the driver"
        table.add_row(
            "CUDA",
            f"{gpu.name}, compute capability {capability}\n{format_mib(gpu.total_bytes)}, available "
            f"{format_mib(gpu.available_bytes)} ({rule})",
        )
    if host.gpus_missing:
        table.add_row("CUDA", f"none: {host.gpus_missing}")
    _print(table)


def _table(*headers: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def _print(content: object) -> None:
    if isinstance(content, str):
        typer.echo(content)  # rich would break its lines
        return
    Console(highlight=False, markup=False, emoji=False).print(content)
