"""Which TensorRT builds an engine: ``tensorrt`` on the device itself, or ``tensorrt_rtx`` for a chip that is named.

Both have the same Python interface but for parts that one version has and another lacks; those are asked for by name
where they are used, so no version number decides. ``tensorrt`` builds for the GPU it runs on and needs that GPU.
``tensorrt_rtx`` lists the compute capabilities it builds for (``ComputeCapability``) and needs no GPU to build.
Neither may deserialise an engine without a CUDA device: releases differ between returning nothing and ending the
process, so :func:`cuda_capability` is asked first, everywhere.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType

from edgetrain.errors import ExportError, MissingExtraError, UsageError

Capability = tuple[int, int]
NAMES = ("tensorrt", "tensorrt_rtx")
"""Import names, the one that is preferred where both can build first."""


@dataclass(frozen=True)
class Builder:
    """An installed TensorRT.

    Attributes:
        name: its import name, one of :data:`NAMES`.
        version: as it says itself.
        module: the imported package.
    """

    name: str
    version: str
    module: ModuleType

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Compute capabilities that it builds for without such a GPU; empty: only for the GPU it runs on."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        digits = (re.fullmatch(r"SM(\d+)(\d)", name) for name in members)
        return tuple(sorted((int(match[1]), int(match[2])) for match in digits if match is not None))

    def refusal(self, capability: Capability, *, refit: bool) -> str | None:
        """Why it cannot build for ``capability`` on this machine; None where it can.

        Args:
            refit: the engine is to take new weights; building such a one runs on the GPU, whatever the builder.
        """
        here = cuda_capability()
        if capability in self.capabilities and refit and here is None:
            return f"{self.name} {self.version} builds an engine that takes new weights only beside a CUDA device"
        if capability in self.capabilities:
            return None
        if not self.capabilities and here == capability:
            return None
        if self.capabilities:
            known = ", ".join(capability_text(known) for known in self.capabilities)
            return f"{self.name} {self.version} builds for compute capability {known}"
        where = "has no CUDA device" if here is None else f"has compute capability {capability_text(here)}"
        return f"{self.name} {self.version} builds for the GPU it runs on, and this machine {where}"


def installed_builders(name: str | None = None) -> list[Builder]:
    """All that are installed, in the order of :data:`NAMES`, or the one called ``name`` alone.

    Raises:
        UsageError: no builder has that name.
    """
    if name is not None and name not in NAMES:
        raise UsageError(found=f"builder {name!r}", expected=" or ".join(NAMES), action="pass one of these, or none")
    found = map(installed_builder, NAMES if name is None else (name,))
    return [builder for builder in found if builder is not None]


def installed_builder(name: str) -> Builder | None:
    """The builder of that import name; None where it is not installed."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return Builder(name, str(module.__version__), module)


def choose_builder(capability: Capability, *, name: str | None = None, refit: bool = False, command: str) -> Builder:
    """The builder that makes an engine for ``capability`` here.

    Args:
        name: take this one; None: the first of :data:`NAMES` that can.
        refit: the engine is to take new weights.
        command: what a person runs on the device where none can.

    Raises:
        UsageError: ``name`` is no builder.
        MissingExtraError: no builder is installed.
        ExportError: none of the installed ones can; the message holds ``command``.
    """
    wanted = NAMES if name is None else (name,)
    builders = installed_builders(name)
    if not builders:
        raise MissingExtraError(
            found=f"{' and '.join(wanted)} {'are' if len(wanted) > 1 else 'is'} not installed",
            expected="a TensorRT that builds engines",
            action=f"run pip install 'edgetrain[tensorrt]' to build here, or on the device:\n{command}",
        )
    refusals = [builder.refusal(capability, refit=refit) for builder in builders]
    for builder, refusal in zip(builders, refusals, strict=True):
        if refusal is None:
            return builder
    raise ExportError(
        found=f"no engine for compute capability {capability_text(capability)} can be built here",
        expected="a builder for it; " + "; ".join(str(refusal) for refusal in refusals),
        action=f"build it on the device:\n{command}",
    )


def cuda_capability() -> Capability | None:
    """Compute capability of the CUDA device that PyTorch would use; None where there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def capability_text(capability: Capability) -> str:
    """As NVIDIA writes it: ``8.7``."""
    return f"{capability[0]}.{capability[1]}"
