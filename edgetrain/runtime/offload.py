"""Moving a kept activation out of the device's memory: to the host's, or to a file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from edgetrain.runtime.program import Place


@dataclass
class Offloaded:
    """A tensor that is elsewhere.

    Attributes:
        shape: of the tensor, as ``dtype`` and ``device``.
        host: its copy in host memory, or None.
        file: an unnamed temporary file with its bytes, or None.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    host: Tensor | None = None
    file: IO[bytes] | None = None

    def fetch(self) -> Tensor:
        """The tensor, back on its device."""
        if self.file is None:
            assert self.host is not None
            return self.host.to(self.device)
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.file.seek(0)
        self.file.readinto(_bytes_of(tensor))  # type: ignore[attr-defined]
        self.file.close()
        return tensor.to(self.device)


def offload(tensor: Tensor, place: Place) -> Offloaded:
    """Moves ``tensor`` to host memory or to a file in the temporary folder; the caller drops its own reference."""
    if place == "host":
        return Offloaded(tensor.shape, tensor.dtype, tensor.device, host=tensor.to("cpu", copy=True))
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives until it is fetched
    file.write(_bytes_of(tensor.detach().to("cpu").contiguous()).data)
    return Offloaded(tensor.shape, tensor.dtype, tensor.device, file=file)


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.reshape(-1).view(torch.uint8).numpy()
