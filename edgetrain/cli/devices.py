"""``edgetrain devices``: what is known about devices, from where, and what this host is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain.errors import EdgetrainError, UsageError

if TYPE_CHECKING:
    from edgetrain.profiles import Profile


def devices(
    name: Annotated[str | None, typer.Argument(help="A profile, or the path of one: shows every field.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Show what this host is instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the device profiles, show one with the source of every number, or probe this host."""
    if probe:
        if name is not None:
            raise UsageError(
                found=f"devices {name} --probe",
                expected="a profile to show, or this host",
                action="leave out one of the two",
            )
        from edgetrain.targets.host import probe_host

        host = probe_host()
        if as_json:
            typer.echo(json.dumps(asdict(host)))
            return
        from edgetrain.cli.device_tables import print_host

        print_host(host)
    elif name is not None:
        from edgetrain.profiles import load_profile

        profile = load_profile(name)
        if as_json:
            fields = profile.model_dump(mode="json", exclude_none=True)
            typer.echo(json.dumps({**fields, "derived": derived_values(profile)}))
            return
        from edgetrain.cli.device_tables import print_profile

        print_profile(profile)
    else:
        built_in, own = _load_all()
        if as_json:
            rows = [{**_summary(profile), "user": profile in own} for profile in [*built_in, *own]]
            typer.echo(json.dumps({"profiles": rows}))
            return
        from edgetrain.cli.device_tables import print_profiles

        print_profiles(built_in, own)


def derived_values(profile: Profile) -> dict[str, Any]:
    """The figures that a profile gives in bytes, bytes per second and operations per second; None where unknown."""
    from edgetrain.profiles.profile import PRECISIONS

    return {
        "memory_bytes": profile.memory_bytes,
        "available_bytes": profile.available_bytes,
        "unknown_overheads": list(profile.unknown_overheads),
        "default_budget_bytes": profile.default_budget_bytes,
        "context_bytes": profile.context_bytes,
        "framework_bytes": profile.framework_bytes,
        "cublas_workspace_bytes": profile.cublas_workspace_bytes,
        "bandwidth_bytes_per_second": profile.bandwidth_bytes_per_second,
        "rates_flops": {precision: profile.rate_flops(precision) for precision in PRECISIONS},
        "compute_capability": profile.compute_capability_pair,
        "onnx_opset": profile.onnx_opset,
    }


def _load_all() -> tuple[list[Profile], list[Profile]]:
    """Built-in profiles and the user's own; one of the latter that is wrong is named on stderr and left out."""
    from edgetrain.profiles import load_profile, profile_names, user_profile_names

    own = []
    user_names = user_profile_names()
    for name in user_names:
        try:
            own.append(load_profile(name))
        except EdgetrainError as error:
            typer.echo(f"edgetrain: left out: {error.found}", err=True)
    return [load_profile(name) for name in profile_names() if name not in user_names], own


def _summary(profile: Profile) -> dict[str, Any]:
    said = ("name", "description", "kind", "unified", "training", "training_reason")
    return {**{field: getattr(profile, field) for field in said}, **derived_values(profile)}
