"""Optimisers of bitsandbytes, which hold their state in 8 bit: a quarter of the state's bytes.

A state of n >= 4096 elements is held as n codes of one byte and a float32 scale for every 256 of them (Dettmers et al.
2022, "8-bit Optimizers via Block-wise Quantization"); a smaller one stays in float32. A table says what the codes mean,
256 floats. The library is optional: ``pip install 'edgetrain[eightbit]'``.

On CUDA its kernels update in place. On a CPU they are a sequence of torch operators on whole tensors
(``bitsandbytes/backends/cpu/ops.py`` of 0.50, the first release that has them): a parameter's state is decoded, updated
and encoded again, so that a step takes up to five times the largest parameter for a moment.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from edgetrain.errors import MissingExtraError
from edgetrain.memory.trace import Call

_BLOCK = 256
_FLOAT_BYTES = 4
_COPIES = {
    "adam": (5, 4, 3),
    "lamb": (5, 4, 3),
    "momentum": (2, 2, 1),
    "lars": (2, 2, 1),
    "lion": (5, 3, 3),
    "rmsprop": (3, 2, 3),
    "adagrad": (3, 2, 3),
    "ademamix": (9, 9, 4),
}
"""Copies of a parameter in float32, by kernel: most at once before codes are written, while they are, with a float32
state. Weights in another type are one more."""


def _optimizer(name: str, kind: str, **options: Any) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        with _disable_current_modes():  # the tables are computed, also where parameters have no data
            # its import warns of a kernel for 4 bit inference that it cannot fetch
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
            try:
                from bitsandbytes import optim
            except ImportError as error:
                raise MissingExtraError(
                    found="the package bitsandbytes is not installed",
                    expected=f"it for the optimiser {name}",
                    action="run pip install 'edgetrain[eightbit]'",
                ) from error
            made = getattr(optim, kind)(parameters, **options)
        _tables.update({key: table for key, table in made.name2qmap.items() if key not in _tables})
        made.name2qmap = dict(_tables)
        return cast(torch.optim.Optimizer, made)

    return make


_tables: dict[str, Tensor] = {}
"""Of all optimisers: a plan that updates in the backward pass has one per block, and each would hold its own."""

EIGHT_BIT = {
    "sgd-8bit": _optimizer("sgd-8bit", "SGD8bit", lr=0.1, momentum=0.9),
    "adamw-8bit": _optimizer("adamw-8bit", "AdamW8bit"),
    "lion-8bit": _optimizer("lion-8bit", "Lion8bit"),
}
"""Optimisers by name; to call one raises MissingExtraError where the library is missing."""


def update_temporaries(call: Call) -> list[int]:
    """Bytes that an update of one parameter takes on a CPU and frees before it returns.

    An update that is not known counts as the one that takes most.
    """
    if ".optimizer_update_" not in call.operator:
        return []
    kernel, _, parameter, *_ = call.arguments
    elements = math.prod(parameter.shape)
    converted = parameter.dtype != torch.float32
    computing, encoding, unquantised = (
        (copies + converted) * elements * _FLOAT_BYTES for copies in _COPIES.get(kernel, _COPIES["ademamix"])
    )
    if "_8bit" not in call.operator:
        return [unquantised]
    codes = elements + -(-elements // _BLOCK) * _FLOAT_BYTES
    return [max(computing, encoding + codes)]
