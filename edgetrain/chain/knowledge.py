"""What is known of a module before anything runs: its data flow, what it returns, whether it works in place.

Each module is traced in training and in evaluation mode, once for all modules that are built alike.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from edgetrain.chain.flow import Flow, Kind, is_layer
from edgetrain.chain.tracing import Ref, UntraceableError, trace
from edgetrain.chain.vocabulary import FRESH_LAYERS
from edgetrain.nn import Invertible


class Knowledge:
    """Answers about modules, remembered."""

    def __init__(self) -> None:
        self._flows: dict[Any, tuple[Flow, Flow] | str] = {}
        self._signatures: dict[int, Any] = {}
        self._layers: dict[int, int] = {}

    def flows_of(
        self, module: nn.Module, args: tuple[Any, ...] = (Ref(0),), kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Flow, Flow] | str:
        """Flow in training and in evaluation, one object where they agree; or why there is none."""
        key = (self._signature(module), repr((args, kwargs or {})))
        if key not in self._flows:
            try:
                self._flows[key] = self._traced(module, args, kwargs or {})
            except UntraceableError as error:
                self._flows[key] = str(error)
        return self._flows[key]

    def _traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Flow, Flow]:
        with _training(module, own=True, inner=True):
            training = trace(module, args, kwargs)
        with _training(module, own=False, inner=False):
            evaluation = trace(module, args, kwargs)
        nature = _Submodules(self, module)
        flow = Flow(training, nature)
        if training == evaluation:
            return flow, flow
        with _training(module, own=False, inner=True):
            if trace(module, args, kwargs) != evaluation:
                raise UntraceableError(f"{type(module).__name__}.forward depends on the mode of its submodules")
        return flow, Flow(evaluation, nature)

    def _signature(self, module: nn.Module) -> Any:
        found = self._signatures.get(id(module))
        if found is None:
            found = self._signatures[id(module)] = signature(module)
        return found

    def overwrites(self, module: nn.Module) -> bool:
        """Whether a call of ``module`` writes into its argument, as far as is known."""
        if getattr(module, "inplace", False):
            return True
        if is_layer(module) or isinstance(module, Invertible):
            return False
        flows = self.flows_of(module)
        if isinstance(flows, str):
            return any(getattr(m, "inplace", False) for m in module.modules()) and not self.layers_in(module)
        return any(flow.overwrites_input for flow in flows)

    def may_alias(self, module: nn.Module) -> bool:
        """Whether the output of ``module`` may share memory with its input."""
        if isinstance(module, nn.Identity):
            return True
        # torch gives a layer with a parametrised weight a class of its own; its forward stays
        fresh = is_layer(module) and type(module).forward.__module__ in FRESH_LAYERS
        if fresh or isinstance(module, Invertible):
            return bool(getattr(module, "inplace", False))
        if is_layer(module):
            return True
        flows = self.flows_of(module)
        return isinstance(flows, str) or any(flow.returns_alias for flow in flows)

    def kind(self, module: nn.Module) -> Kind:
        """What a call of ``module`` returns."""
        if isinstance(module, Invertible):
            return "tensor"
        if is_layer(module):
            several = isinstance(module, nn.RNNBase | nn.MultiheadAttention | nn.AdaptiveLogSoftmaxWithLoss)
            return "tuple" if several or getattr(module, "return_indices", False) else "tensor"
        flows = self.flows_of(module)
        if not isinstance(flows, str):
            return "unknown" if any(flow.output is None for flow in flows) else "tensor"
        try:
            declared = typing.get_type_hints(module.forward).get("return")
        except (NameError, TypeError, AttributeError):
            declared = None
        return "tensor" if declared is torch.Tensor else "unknown"

    def worth_opening(self, module: nn.Module) -> bool:
        """Whether there may be several blocks inside."""
        inside = any(isinstance(m, Invertible) for m in module.modules() if m is not module)
        return not isinstance(module, Invertible) and (inside or self.layers_in(module) > 1)

    def layers_in(self, module: nn.Module) -> int:
        """How many modules inside own a weight matrix or a kernel."""
        count = self._layers.get(id(module))
        if count is None:
            own = any(p is not None and p.dim() > 1 for p in module._parameters.values())
            count = int(own) + sum(self.layers_in(child) for child in module.children())
            self._layers[id(module)] = count
        return count


class _Submodules:
    """What the flow of a module asks about its submodules."""

    def __init__(self, known: Knowledge, module: nn.Module) -> None:
        self._known, self._module = known, module

    def kind(self, path: str) -> Kind:
        return self._known.kind(self._module.get_submodule(path))

    def takes_tensor(self, path: str) -> bool:
        return is_layer(self._module.get_submodule(path))

    def may_alias(self, path: str) -> bool:
        return self._known.may_alias(self._module.get_submodule(path))

    def overwrites(self, path: str) -> bool:
        return self._known.overwrites(self._module.get_submodule(path))


def closed(module: nn.Module) -> str | None:
    """Why a module must not be replaced by its operations."""
    name = type(module).__name__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind, None) for kind in hooks):
        return f"{name} has hooks, which run when it is called as a whole"
    if is_layer(module):
        return f"{name} is a module of torch"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{name} is compiled"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{name} has a __call__ of its own"
    return None


@contextlib.contextmanager
def _training(module: nn.Module, *, own: bool, inner: bool) -> Iterator[None]:
    """Sets the mode of a module and of those inside without calling their ``train``."""
    before = [(m, m.__dict__.get("training", True)) for m in module.modules()]
    for m, _ in before:
        m.__dict__["training"] = own if m is module else inner
    try:
        yield
    finally:
        for m, mode in before:
            m.__dict__["training"] = mode


_INTERNAL = frozenset(nn.Module().__dict__)


def _record(module: nn.Module) -> set[str]:
    """What the last pass left for its repetition says nothing of what the next one does."""
    return {"saved"} if isinstance(module, Invertible) else set()


def signature(module: nn.Module) -> Any:
    """A value that is equal for modules whose ``forward`` does the same, whatever their weights."""
    seen: dict[int, int] = {}
    try:
        return tuple(
            (
                path,
                type_before_parametrizations(m),  # what makes the weight is a module inside
                closed(m),
                tuple((k, _frozen(v)) for k, v in m.__dict__.items() if k not in _INTERNAL | _record(m)),
                tuple(
                    (k, None if v is None else (seen.setdefault(id(v), len(seen)), v.dim()))
                    for members in (m._parameters, m._buffers)
                    for k, v in members.items()
                ),
                tuple((k, v is None) for k, v in m._modules.items()),
            )
            for path, m in module.named_modules()
        )
    except TypeError:
        return id(module)


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return (type(value), *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(part)) for key, part in value.items())
    if isinstance(value, nn.Module | torch.Tensor):
        return id(value)
    hash(value)
    return type(value), value
