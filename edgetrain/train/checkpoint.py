"""Checkpoints that are whole or absent: safetensors, written aside, synced, then renamed.

``model.*`` holds the state dict, ``momentum.<parameter>`` the optimiser's buffers; epoch, step and a format
version stand in the metadata. Nothing is pickled.

Written here and read by the safetensors library: its writer makes two copies of the whole state, and inside a
memory cap it ends the process where it gets no memory. The format is eight bytes with the length of a JSON header,
the header (dtype, shape and place of every tensor), then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically

FORMAT_VERSION = "1"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = (), *, epoch: int, step: int
) -> None:
    """Writes weights, buffers and momentum of ``model`` to ``path``.

    Args:
        optimizers: that have the momentum, each of some of the parameters.

    Raises:
        StorageError: see :func:`write_atomically`.
    """
    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    for name, parameter in model.named_parameters():
        buffer = states.get(parameter, {}).get("momentum_buffer")
        if isinstance(buffer, Tensor):
            tensors[f"momentum.{name}"] = buffer.detach().cpu().contiguous()
    metadata = {"format": FORMAT_VERSION, "epoch": str(epoch), "step": str(step)}
    write_atomically(path, _serialise(tensors, metadata))


def _serialise(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor, without copying any."""
    header: dict[str, object] = {"__metadata__": metadata}
    place = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def load_weights(path: Path, model: nn.Module) -> dict[str, int]:
    """Puts the weights and buffers of ``path`` into ``model``; gives ``{"epoch": ..., "step": ...}``.

    Raises:
        StorageError: the file is missing, damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            prefix = "model."
            state = {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        model.load_state_dict(state)
        return {"epoch": int(metadata["epoch"]), "step": int(metadata["step"])}
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise StorageError(
            found=f"{path} cannot be loaded: {str(error).splitlines()[0]}",
            expected="a checkpoint of this model",
            action="name the checkpoint of a run of the same --model and --pooling",
        ) from error
