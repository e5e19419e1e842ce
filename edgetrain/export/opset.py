"""Which ONNX opset a device reads, with the reason.

A device that runs TensorRT reads what the parser of its last TensorRT reads, which its profile says
(``software.onnx_opset``: 13 for JetPack 4, 17 for TensorRT 8.5, 24 for TensorRT 10.15). The graph writer of torch that
reaches down to 13 ends at 20, so newer devices get 20. Where a profile names no TensorRT, ONNX Runtime reads the graph:
it takes every opset of the last years, and 17 keeps the file readable for most other tools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.errors import ExportError

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

WRITER_OPSETS = range(7, 21)
"""What ``torch.onnx.export(dynamo=False)`` writes (torch 2.13, ``torch/onnx/_internal/torchscript_exporter``)."""
LOWEST = 13
"""Below it a quantised weight cannot have a scale per channel (ONNX, QuantizeLinear-13)."""
DEFAULT = 17


@dataclass(frozen=True)
class Opset:
    """A version of ONNX's operators and why it was chosen."""

    version: int
    reason: str


def choose_opset(profile: Profile | None) -> Opset:
    """The newest opset that both the device of ``profile`` and the graph writer know.

    Raises:
        ExportError: the device's parser is older than opset 13.
    """
    if profile is None:
        return Opset(DEFAULT, "no device named: ONNX Runtime")
    limit = profile.onnx_opset
    if limit is None:
        return Opset(DEFAULT, f"{profile.name} names no TensorRT: ONNX Runtime")
    parser = "its parser" if profile.software.tensorrt is None else f"TensorRT {profile.software.tensorrt.value}"
    if limit < LOWEST:
        raise ExportError(
            found=f"{parser} of {profile.name} reads opsets up to {limit}",
            expected=f"{LOWEST} or more",
            action="correct software.onnx_opset in the profile, or install a newer TensorRT on the device",
        )
    newest = WRITER_OPSETS.stop - 1
    if limit > newest:
        return Opset(newest, f"{parser} of {profile.name} reads up to {limit}; the graph writer ends at {newest}")
    return Opset(limit, f"{parser} of {profile.name} reads up to {limit}")
