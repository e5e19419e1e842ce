"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one file that proves itself.

| name in the file | what |
|---|---|
| ``model.*`` | state dict: weights, and buffers such as running statistics |
| ``buffer.*`` | buffers that the state dict leaves out |
| ``optimizer.PARAMETER.KEY`` | state of the optimiser, such as ``momentum_buffer``; what is no tensor is in the JSON |
| ``plan`` | the plan of the steps that follow, its JSON as bytes |
| ``random.start.*``, ``random.now.*`` | :class:`RandomState` at the start of the epoch, and now |

The JSON holds the position, the records of the epochs done, and when memory was short. The schedule follows from the
step, and so does what a network with sampled modules draws. ``last.safetensors`` is the newest,
``previous.safetensors`` the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from edgetrain.errors import ModelError, StorageError
from edgetrain.planner import Plan
from edgetrain.train.random_state import RandomState
from edgetrain.train.records import EpochRecord, MemoryEvent, Position
from edgetrain.train.tensor_file import TensorFile, write_tensor_file

LAST, PREVIOUS, DAMAGED = "last.safetensors", "previous.safetensors", "damaged.safetensors"
_LOG = logging.getLogger(__name__)
_MODEL, _BUFFER, _OPTIMIZER, _START, _NOW = "model.", "buffer.", "optimizer.", "random.start.", "random.now."
_PLAN = "plan"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        position: between two steps.
        history: a record per epoch done.
        start: random states at the start of the epoch of ``position``.
        now: those there.
        plan: of the steps that follow; None: the file is of an older version.
        events: when memory was short.
    """

    position: Position
    history: tuple[EpochRecord, ...]
    start: RandomState
    now: RandomState
    plan: Plan | None = None
    events: tuple[MemoryEvent, ...] = ()


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = (), *, progress: Progress
) -> None:
    """Writes ``model``, ``optimizers`` and ``progress`` to ``path``; what was there becomes the previous checkpoint.

    Args:
        optimizers: each of some of the parameters of ``model``.

    Raises:
        StorageError: see :func:`edgetrain.files.write_atomically`.
    """
    tensors = {_MODEL + name: _plain(value) for name, value in model.state_dict().items()}
    tensors |= {_BUFFER + name: _plain(value) for name, value in _other_buffers(model)}
    scalars: dict[str, Any] = {}
    for parameter, state in ((p, s) for optimizer in optimizers for p, s in optimizer.state.items()):
        name = _name_of(parameter, model)
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}.{key}"] = _plain(value)
            else:
                scalars[f"{name}.{key}"] = value
    for prefix, random in ((_START, progress.start), (_NOW, progress.now)):
        tensors |= {prefix + name: value for name, value in random.tensors.items()}
    if progress.plan is not None:
        tensors[_PLAN] = torch.frombuffer(bytearray(progress.plan.to_json().encode()), dtype=torch.uint8)
    state = {
        "position": asdict(progress.position),
        "history": [asdict(record) for record in progress.history],
        "events": [asdict(event) for event in progress.events],
        "optimizer": scalars,
    }
    write_tensor_file(path, tensors, state, previous=path.with_name(PREVIOUS))


def load_checkpoint(file: TensorFile, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Progress:
    """Puts what ``file`` holds into ``model`` and ``optimizers``; random states are given, not restored.

    Raises:
        StorageError: the checkpoint is of another model.
    """
    try:
        position = TypeAdapter(Position).validate_python(file.state["position"])
        history = TypeAdapter(tuple[EpochRecord, ...]).validate_python(file.state["history"])
        events = TypeAdapter(tuple[MemoryEvent, ...]).validate_python(file.state.get("events", ()))
        scalars: dict[str, Any] = dict(file.state["optimizer"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise _of_another_model(file, "no position of a run in it") from error
    _load_tensors(file, model)
    for optimizer in optimizers:
        _load_optimizer(file, model, optimizer, scalars)
    start, now = (RandomState({name: file.tensor(p + name) for name in file.names(p)}) for p in (_START, _NOW))
    return Progress(position, history, start, now, plan_in(file), events)


def plan_in(file: TensorFile) -> Plan | None:
    """The plan by which the run in ``file`` goes on; None: a version wrote it that kept the plan outside.

    Raises:
        StorageError: it cannot be read.
    """
    if _PLAN not in file:
        return None
    try:
        return Plan.from_json(file.tensor(_PLAN).numpy().tobytes().decode())
    except (ModelError, UnicodeDecodeError) as error:
        raise _of_another_model(file, "no plan of this version in it") from error


def load_weights(path: Path, model: nn.Module) -> dict[str, int]:
    """Puts the weights and buffers of ``path`` into ``model``; gives ``{"epoch": ..., "step": ...}``, those done.

    Raises:
        StorageError: the file is missing, damaged, or of another model.
    """
    position = load_checkpoint(TensorFile(path), model).position
    return {"epoch": position.epoch, "step": position.step}


def newest_checkpoint(folder: Path, *, warn: bool = True) -> TensorFile:
    """The last checkpoint in ``folder``, or the one before where the last is damaged, by default with a warning.

    Raises:
        StorageError: neither can be read.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        return TensorFile(last)
    except StorageError as error:
        if not previous.exists():
            raise
        found = TensorFile(previous)
        if warn:
            done = found.state.get("position", {}).get("step")
            _LOG.warning("%s; the one before it is used, of step %s", error.found, done)
        return found


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _other_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    known = model.state_dict().keys()
    return ((name, value) for name, value in model.named_buffers() if name not in known)


def _name_of(parameter: Tensor, model: nn.Module) -> str:
    return next(name for name, own in model.named_parameters() if own is parameter)


@torch.no_grad()
def _load_tensors(file: TensorFile, model: nn.Module) -> None:
    """Copies one tensor after the other into its place, after all have been compared."""
    places = {_MODEL + name: value for name, value in model.state_dict().items()}
    places |= {_BUFFER + name: value for name, value in _other_buffers(model)}
    stored = {prefix + name for prefix in (_MODEL, _BUFFER) for name in file.names(prefix)}
    if stored != places.keys():
        raise _of_another_model(file, f"{min(stored ^ places.keys())} is in one of them only")
    for name, place in places.items():
        if file.shape(name) != tuple(place.shape) or file.dtype(name) != place.dtype:
            raise _of_another_model(
                file, f"{name} is {file.shape(name)} {file.dtype(name)}, not {tuple(place.shape)} {place.dtype}"
            )
    for name, place in places.items():
        file.copy_to(name, place)


@torch.no_grad()
def _load_optimizer(
    file: TensorFile, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameters):
        prefix = f"{_name_of(parameter, model)}."
        state = {key[len(prefix) :]: value for key, value in scalars.items() if _is_key(key, prefix)}
        for key in file.names(_OPTIMIZER):
            if _is_key(key, prefix):
                value = file.tensor(_OPTIMIZER + key)
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # with its strides
                state[key[len(prefix) :]] = value
        if state:
            states[index] = state
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_key(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and "." not in name[len(prefix) :]


def _of_another_model(file: TensorFile, reason: str) -> StorageError:
    return StorageError(
        found=f"{file.path} cannot be loaded: {reason}",
        expected="a checkpoint of this model",
        action="name the checkpoint of a run of the same --model and --pooling",
    )
