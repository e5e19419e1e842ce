"""``edgetrain calibrate``: measures this host and writes what it found as a profile of the user's."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from edgetrain.errors import UsageError, near_matches
from edgetrain.units import MIB

if TYPE_CHECKING:
    from edgetrain.profiles import Profile
    from edgetrain.targets.calibrate import Calibration
    from edgetrain.targets.measured import Measured

_DEVICES = ["cpu", "cuda"]
_UNIT_FACTORS = {"GFLOP/s": 1e9, "GB/s": 1e9, "MiB": float(MIB)}


def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="File to write, ending in .toml; default: your folder of profiles.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as one JSON document.")] = False,
) -> None:
    """Measure rates and overheads of this host, and write them as a device profile."""
    if device not in _DEVICES:
        raise UsageError(found=f"--device {device}", expected="cpu or cuda", action=near_matches(device, _DEVICES))
    if out is not None and out.suffix != ".toml":
        raise UsageError(found=f"--out {out}", expected="a name that ends in .toml", action=f"write --out {out}.toml")

    from rich.console import Console

    from edgetrain.profiles import to_toml, user_profile_folder
    from edgetrain.targets import calibrate as measuring

    name = _slug(out.stem if out is not None else f"{platform.node() or 'host'}-{device}")
    path = out if out is not None else user_profile_folder() / f"{name}.toml"
    with Console(stderr=True).status("measuring this host for about 20 s"):
        calibration = measuring.calibrate(cast(Literal["cpu", "cuda"], device))
    profile = profile_of(calibration, name=name, device=device)

    from edgetrain.train import write_atomically

    write_atomically(path, to_toml(profile).encode())
    if as_json:
        typer.echo(json.dumps({"profile": str(path), "name": name, "device": device, **asdict(calibration)}))
        return
    _show(calibration)
    typer.echo(f"profile: {path}")
    typer.echo(f"use it:  --device {path if out is not None else name}")


def profile_of(calibration: Calibration, *, name: str, device: str) -> Profile:
    """What was measured as a profile; on CUDA it extends the profile ``cuda``."""
    from edgetrain import __version__
    from edgetrain.profiles import Profile
    from edgetrain.targets.host import cpu_name

    machine = f"{cpu_name() or 'unknown CPU'} ({platform.machine()}, {calibration.threads} threads)"
    fields: dict[str, Any] = {"kind": device, "unified": False}
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties()
        machine = f"{properties.name}, {machine}"
        fields |= {"extends": "cuda", "unified": bool(properties.is_integrated)}
    origin = {"source": f"measured by edgetrain calibrate {__version__} on {machine}", "date": f"{date.today()}"}

    def number(value: float, unit: str, note: str) -> dict[str, Any]:
        digits = 1 if unit == "MiB" else 3
        return {"value": round(value / _UNIT_FACTORS.get(unit, 1), digits), "unit": unit, **origin, "note": note}

    def measured(value: Measured, unit: str, what: str) -> dict[str, Any]:
        factor = _UNIT_FACTORS[unit]
        spread = f"median of {value.runs}, quartiles {value.lower / factor:.4g} and {value.upper / factor:.4g} {unit}"
        return number(value.median, unit, f"{what}; {spread}")

    if device == "cuda":
        fields["compute_capability"] = number(
            float(f"{properties.major}.{properties.minor}"), "major.minor", "as the driver says"
        )
    fields["memory"] = number(calibration.total_bytes, "MiB", "what programs can address")
    if calibration.system_bytes:
        fields["system_reserved"] = number(calibration.system_bytes, "MiB", "what was taken when it was measured")
    overheads = calibration.overheads
    fields["framework"] = measured(overheads.framework_bytes, "MiB", "resident memory that import torch adds")
    if overheads.context_bytes is not None:
        fields["context"] = measured(overheads.context_bytes, "MiB", "device memory beyond that of tensors")
    fields["bandwidth"] = measured(calibration.copy, "GB/s", "copy, bytes read and written")
    fields["rates"], fields["convolution"], fields["elementwise"] = {}, {}, {}
    for precision, by_channels in calibration.convolution.items():
        best = max(by_channels, key=lambda channels: by_channels[channels].median)
        fields["rates"][precision] = measured(by_channels[best], "GFLOP/s", f"3x3 convolution of {best} channels")
        fields["convolution"][precision] = {
            str(channels): measured(rate, "GFLOP/s", "3x3 convolution, forward")
            for channels, rate in by_channels.items()
        }
        fields["elementwise"][precision] = measured(
            calibration.elementwise[precision], "GB/s", "addition, bytes read and written"
        )
    return Profile.model_validate({"name": name, "description": f"measured: {machine}", **fields})


def _show(calibration: Calibration) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("measured", "median", "quartiles", "unit", "runs"):
        table.add_column(header, justify="left" if header in ("measured", "unit") else "right")

    def add(what: str, value: Measured, unit: str) -> None:
        middle, lower, upper = (x / _UNIT_FACTORS[unit] for x in (value.median, value.lower, value.upper))
        table.add_row(what, f"{middle:.1f}", f"{lower:.1f} - {upper:.1f}", unit, f"{value.runs}")

    for precision, by_channels in calibration.convolution.items():
        for channels, rate in by_channels.items():
            add(f"convolution 3x3, {channels} channels, {precision}", rate, "GFLOP/s")
    for precision, moved in calibration.elementwise.items():
        add(f"elementwise addition, {precision}", moved, "GB/s")
    add("copy", calibration.copy, "GB/s")
    add("memory of PyTorch's libraries", calibration.overheads.framework_bytes, "MiB")
    if calibration.overheads.context_bytes is not None:
        add("CUDA context", calibration.overheads.context_bytes, "MiB")
    Console(highlight=False).print(table)


def _slug(text: str) -> str:
    """``text`` as the name of a profile: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "host"
