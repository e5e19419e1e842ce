"""Keeping an activation where it takes less of the device's memory: the host's, a file, or on the device in bfloat16.

The first two give back what they were given. bfloat16 has 8 significant bits and float32's exponents, so it rounds:
by at most 2^-8 of each value, its unit roundoff (:data:`edgetrain.chain.noise.BFLOAT16_NSR` for the power).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from edgetrain.errors import ModelError
from edgetrain.nn.layouts import laid_out_as
from edgetrain.runtime.program import Place


@dataclass
class Offloaded:
    """A tensor that is elsewhere.

    Attributes:
        shape: of the tensor, as ``dtype`` and ``device``.
        copy: in host memory, or rounded on the device; or None.
        file: an unnamed temporary file with its bytes, or None.
        strides: with which its bytes are read.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    copy: Tensor | None = None
    file: IO[bytes] | None = None
    strides: tuple[int, ...] = ()

    def fetch(self) -> Tensor:
        """The tensor, back on its device and in its type."""
        if self.file is None:
            assert self.copy is not None
            return self.copy.to(self.device, self.dtype)
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        self.file.seek(0)
        self.file.readinto(_bytes_of(tensor))  # type: ignore[attr-defined]
        self.file.close()
        return tensor.to(self.device)


def offload(tensor: Tensor, place: Place) -> Offloaded:
    """Moves ``tensor`` to host memory, to a file in the temporary folder, or to bfloat16 where it is.

    The caller drops its own reference.

    Raises:
        ModelError: bfloat16 would not be shorter, or ``tensor`` holds no floating point numbers.
    """
    if place == "bfloat16" and not can_be_rounded(tensor.dtype):
        raise ModelError(
            found=f"an activation in {tensor.dtype} that the program keeps in bfloat16",
            expected="one in float32 or float64",
            action="make the plan again at the precision it is run with",
        )
    if place != "disk":
        copy = tensor.to("cpu", copy=True) if place == "host" else tensor.to(torch.bfloat16)
        return Offloaded(tensor.shape, tensor.dtype, tensor.device, copy=copy)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives until it is fetched
    dense = laid_out_as(tensor.detach().to("cpu"), tensor)
    file.write(_bytes_of(dense).data)
    return Offloaded(tensor.shape, tensor.dtype, tensor.device, file=file, strides=dense.stride())


def can_be_rounded(dtype: torch.dtype) -> bool:
    """Whether bfloat16 takes fewer bytes and has the range."""
    return dtype in (torch.float32, torch.float64)


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Of a tensor without holes, as they are in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
