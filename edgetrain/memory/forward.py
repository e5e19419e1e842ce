"""The memory of a forward pass without gradients: a teacher's, before the step of its student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetrain.chain.fakes import fake_mode
from edgetrain.errors import EdgetrainError
from edgetrain.memory.operators import DeviceKind
from edgetrain.memory.step import classify_resident, explained, fake_model
from edgetrain.memory.timeline import timeline
from edgetrain.memory.trace import Recorder
from edgetrain.nn.slices import abridged_slices


@dataclass(frozen=True)
class Guest:
    """What shares the device's memory with a training step.

    Attributes:
        standing_bytes: there during the whole step.
        before_bytes: on top of that at most before the step begins, when only the weights, the optimiser's state and
            the batch are there.
    """

    standing_bytes: int = 0
    before_bytes: int = 0


@dataclass(frozen=True)
class ForwardMemory:
    """A forward pass.

    Attributes:
        weight_bytes: parameters and buffers.
        peak_bytes: the most at once above weights and batch, the outputs among it.
        output_bytes: what is left.
    """

    weight_bytes: int
    peak_bytes: int
    output_bytes: int


def forward_memory(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    *,
    input_shape: tuple[int, ...],
    batch_size: int,
    device: DeviceKind = "cpu",
) -> ForwardMemory:
    """What ``run(model, batch)`` takes, found under fake tensors with ``model`` in evaluation mode.

    Args:
        model: left alone.
        run: gives a tensor, or a dataclass or tuple of tensors.
        input_shape: of one sample, (c, h, w).

    Raises:
        ModelError: it cannot run without data; names the module.
    """
    mode, recorder = fake_mode(), Recorder()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    fake = fake_model(model, mode, dtype).eval()
    with torch.random.fork_rng(devices=[]), mode, abridged_slices(device), recorder.naming(fake):
        try:
            batch = torch.empty(batch_size, *input_shape, dtype=dtype)
            classify_resident(recorder, fake, None, batch)
            with recorder, torch.no_grad():
                outputs = _tensors(run(fake, batch))
        except EdgetrainError:
            raise
        except Exception as error:
            raise explained(error, recorder, fake) from error
    found = timeline(recorder.finish(), device)
    weights = sum(t.numel() * t.element_size() for t in {id(t): t for t in _state(model)}.values())
    left = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in outputs}
    return ForwardMemory(weights, found.peak_bytes - found.resident_bytes, sum(left.values()))


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, item.name) for item in dataclasses.fields(value)]
    return [tensor for item in value for tensor in _tensors(item)]
