"""A model's ``forward`` as one graph of layers of torch, functions and methods, without operations in place.

Every module is traced with its submodules closed (:mod:`edgetrain.chain.tracing`), and where one of these is no layer
of torch it is traced in turn and its operations take its place. What cannot be traced stays a single call, with the
reason. Layers keep their paths as names. Identities, dropout and assertions vanish.

Operations in place become ordinary ones, because folds take away operations between a tensor and the one that
overwrites it: what ``y.add_(x)`` wrote is a new value, and whoever reads ``y`` afterwards reads that one. It is
refused where another name may share the memory of ``y``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from edgetrain.chain.knowledge import closed
from edgetrain.chain.tracing import Op, Ref, UntraceableError, substitute, trace
from edgetrain.chain.vocabulary import FRESH, FRESH_LAYERS, IN_PLACE_OPERATORS, PYTHON
from edgetrain.export.folds.draft import describe, has_hooks, is_layer, name_of
from edgetrain.export.folds.report import Fold

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


class Inliner:
    """Writes the graph of ``root``, a model of one tensor, in evaluation mode.

    Attributes:
        root: whose modules the graph calls; a module around the given one if that must stay whole.
        graph: the operations.
        done: identities and dropout.
        skipped: the modules that stay whole, with the reason.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root, self.graph = root, torch.fx.Graph()
        self.done: list[Fold] = []
        self.skipped: list[Fold] = []
        self._newest: dict[torch.fx.Node, torch.fx.Node] = {}
        x = self.graph.placeholder("x")
        self.graph.output(substitute(self._call("", root, (x,), {}), self._now))

    def _call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if is_layer(module):
            args, kwargs = _positional(module, args, kwargs)
        if path and _is_identity(module):
            self.done.append(Fold("identity", path, f"{type(module).__name__} does nothing in evaluation mode"))
            return args[0]
        if not is_layer(module) or has_hooks(module):
            newest, counts = dict(self._newest), (len(self.done), len(self.skipped))
            in_place = [inner for inner in module.modules() if getattr(inner, "inplace", False) is True]
            try:
                return self._opened(path, module, args, kwargs)
            except UntraceableError as error:
                self._newest = newest
                del self.done[counts[0] :], self.skipped[counts[1] :]
                for inner in in_place:
                    inner.inplace = True  # type: ignore[assignment]
                self.skipped.append(Fold("structure", path or type(module).__name__, str(error)))
        if not path:
            self.root, path = nn.ModuleDict({"network": module}), "network"
        overwrites = getattr(module, "inplace", False) is True
        if overwrites:
            operand = args[0]
            self._check_alone(operand, path)
            module.inplace = False  # type: ignore[assignment]
        node = self.graph.call_module(path, *substitute((args, dict(kwargs)), self._now))
        if overwrites:
            self._newest[operand] = node
        return node

    def _opened(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if (reason := closed(module)) is not None:
            raise UntraceableError(reason)
        inputs: dict[torch.fx.Node, Ref] = {}

        def as_input(part: Any) -> Any:
            return inputs.setdefault(part, Ref(-len(inputs))) if isinstance(part, torch.fx.Node) else part

        traced = trace(module, substitute(args, as_input), substitute(dict(kwargs), as_input))
        values: dict[Ref, Any] = {ref: node for node, ref in inputs.items()}

        def value(part: Any) -> Any:
            return self._now(values[part]) if isinstance(part, Ref) else part

        for op in traced.ops:
            values[Ref(op.index)] = self._operation(path, module, op, substitute(op.args, value), op.kwargs, value)
        return substitute(traced.output, value)

    def _operation(
        self, path: str, module: nn.Module, op: Op, args: tuple[Any, ...], kwargs: Any, value: Callable[[Any], Any]
    ) -> Any:
        kwargs = substitute(dict(kwargs), value)
        if op.kind == "call":
            target = module.get_submodule(op.target)
            return self._call(f"{path}.{op.target}".lstrip("."), target, args, kwargs)
        if op.kind == "attribute":
            return self.graph.get_attr(f"{path}.{op.target}".lstrip("."))
        if op.target in (operator.getitem, getattr) and not isinstance(args[0], torch.fx.Node):
            return op.target(*args)  # an item of what a submodule returned as a tuple
        if describe_op(op) == "_assert":
            return None
        if describe_op(op).rstrip("_") in _DROPOUTS and _is_off(op, args, kwargs):
            return args[0]
        target, args, kwargs, overwritten = _in_new_memory(op, args, kwargs)
        if overwritten is not None:
            self._check_alone(overwritten, describe_op(op))
        create = self.graph.call_method if op.kind == "method" else self.graph.call_function
        node = create(target, args, kwargs)
        if overwritten is not None:
            self._newest[overwritten] = node
        return node

    def _now(self, part: Any) -> Any:
        while isinstance(part, torch.fx.Node) and part in self._newest:
            part = self._newest[part]
        return part

    def _check_alone(self, node: Any, what: str) -> None:
        """Raises UntraceableError where the memory of ``node`` may have another name."""
        if not isinstance(node, torch.fx.Node) or not self._fresh(node):
            raise UntraceableError(f"{what} writes in place into what may be a view")
        shared = [user for user in node.users if not self._fresh(user) and not _gives_no_tensor(user)]
        if shared:
            raise UntraceableError(f"{what} writes in place into a tensor that {describe(shared[0])} may share")

    def _fresh(self, node: torch.fx.Node) -> bool:
        """Whether ``node`` gives one tensor with memory of its own."""
        if node.op == "placeholder":
            return True
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            known = type(module).forward.__module__ in FRESH_LAYERS and not isinstance(module, nn.Identity)
            return known and not has_hooks(module)
        return name_of(node) in FRESH


def _gives_no_tensor(node: torch.fx.Node) -> bool:
    name = name_of(node)
    return (str(node.args[1]) if name == "getattr" else name) in PYTHON


def _is_off(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout function is called as in evaluation."""
    if not inspect.isfunction(op.target):
        return False
    bound = inspect.signature(op.target).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get("training") is False


def _positional(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a layer in the order of its ``forward``: the folds look for its input in the first place."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _is_identity(module: nn.Module) -> bool:
    return is_layer(module) and not has_hooks(module) and isinstance(module, (nn.Identity, _DropoutNd))


def describe_op(op: Op) -> str:
    """The name of its function or method."""
    return str(getattr(op.target, "__name__", op.target))


def _in_new_memory(
    op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """``(target, args, kwargs, overwritten)``: the operation out of place, and the argument it used to overwrite.

    Raises:
        UntraceableError: it has no form out of place.
    """
    name, target = describe_op(op), op.target
    if target in _OPERATORS:
        return _OPERATORS[target], args, kwargs, args[0]
    if name.endswith("_") and not name.endswith("__"):
        plain = name[:-1]
        owners = (Tensor,) if op.kind == "method" else (torch, F)
        found = next((getattr(owner, plain) for owner in owners if hasattr(owner, plain)), None)
        if found is None or plain not in FRESH:
            raise UntraceableError(f"{name} works in place and has no form that does not")
        return plain if op.kind == "method" else found, args, kwargs, args[0]
    if name in IN_PLACE_OPERATORS:
        raise UntraceableError(f"{name} writes into part of a tensor")
    return (target, *_not_in_place(op, args, kwargs))


def _not_in_place(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The same call with ``inplace=False``."""
    if op.kind != "function" or not inspect.isfunction(op.target):
        return args, kwargs, None
    parameters = inspect.signature(op.target).parameters
    if "inplace" not in parameters:
        return args, kwargs, None
    bound = inspect.signature(op.target).bind(*args, **kwargs)
    if not bound.arguments.get("inplace", False):
        return args, kwargs, None
    bound.arguments["inplace"] = False
    return bound.args, bound.kwargs, args[0]
