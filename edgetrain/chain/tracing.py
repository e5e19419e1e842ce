"""One module's ``forward`` as a list of operations, its submodules left closed.

The module runs once on a symbolic value (``torch.fx``); every function, method and submodule it calls is written
down. Nothing is computed, nothing stays attached to the model, and no random number is drawn. What such a list
cannot express is refused with its reason: control flow that depends on values or shapes, parts under ``no_grad``
or autocast, attributes written by ``forward``, Python's own random numbers.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from edgetrain.chain.vocabulary import FACTORIES, PYTHON

OpKind = Literal["call", "function", "method", "attribute"]


@dataclass(frozen=True)
class Ref:
    """The value with this index: 0 is the input (-1, -2... further ones), k the result of operation k."""

    index: int


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        index: of its result.
        target: path of the submodule or attribute, the function, or the method's name.
        args: with :class:`Ref` for values, as ``kwargs``.
    """

    index: int
    kind: OpKind
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the values it takes."""
        return refs_in((self.args, self.kwargs))


@dataclass(frozen=True)
class Trace:
    """What ``forward`` does.

    Attributes:
        ops: in the order of execution.
        output: what it returns, with :class:`Ref` for values.
    """

    ops: tuple[Op, ...]
    output: Any


class UntraceableError(Exception):
    """``forward`` is no list of operations; the message says why."""


def substitute(structure: Any, replace: Callable[[Any], Any]) -> Any:
    """``structure`` of tuples, lists, dicts and slices with ``replace`` applied to everything inside."""
    if isinstance(structure, tuple):
        parts = [substitute(part, replace) for part in structure]
        return type(structure)(*parts) if hasattr(structure, "_fields") else tuple(parts)
    if isinstance(structure, list):
        return [substitute(part, replace) for part in structure]
    if isinstance(structure, Mapping):
        return {key: substitute(part, replace) for key, part in structure.items()}
    if isinstance(structure, slice):
        return slice(*(substitute(part, replace) for part in (structure.start, structure.stop, structure.step)))
    return replace(structure)


def refs_in(structure: Any) -> tuple[int, ...]:
    """Indices of all :class:`Ref` in ``structure``."""
    found: list[int] = []
    substitute(structure, lambda part: found.append(part.index) if isinstance(part, Ref) else None)
    return tuple(found)


def trace(module: nn.Module, args: tuple[Any, ...] = (Ref(0),), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """The operations of ``module.forward(*args, **kwargs)``, where ``Ref(0)`` stands for the tensor it is given.

    ``Ref(-1)``, ``Ref(-2)``... stand for further tensors.

    Raises:
        UntraceableError: with the reason.
    """
    name, tracer = type(module).__name__, _Tracer(args, kwargs or {})
    with _left_alone(module) as changes, _RecordFactories(tracer), _proxies_are_tensors():
        try:
            graph = tracer.trace(module)
        except _RefusedError as refused:
            raise UntraceableError(f"{refused} in {name}.forward{_place(refused)}") from None
        except TraceError as error:
            looped = "cannot be iterated" in str(error)
            what = "a loop over a traced value" if looped else "data-dependent control flow"
            raise UntraceableError(f"{what} in {name}.forward{_place(error)}") from None
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise UntraceableError(f"{name}.forward cannot be traced{_place(error)}: {text}") from None
    if changes:
        raise UntraceableError(f"{name}.forward {changes[0]}")
    return _as_trace(graph)


class _RefusedError(Exception):
    pass


class _Proxy(torch.fx.Proxy):
    """A value; assignments that work in place are written down as such."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise _RefusedError(f"an assignment to .{name} of a tensor")
        super().__setattr__(name, value)

    def __bool__(self) -> bool:
        return _in_assertion(sys._getframe(1)) or self.tracer.to_bool(self)


def _define_in_place(name: str) -> None:
    function = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    _define_in_place(_name)


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self._call = args, kwargs
        self._state = _context()

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        root, inputs = self.root, {Ref(0): self.create_proxy("placeholder", "x", (), {})}

        def input_of(part: Any) -> Any:
            if isinstance(part, Ref) and part.index < 0 and part not in inputs:
                inputs[part] = self.create_proxy("placeholder", f"x{-part.index}", (), {})
            return inputs.get(part, part) if isinstance(part, Ref) else part

        args, kwargs = substitute(self._call, input_of)
        return (lambda: root.forward(*args, **kwargs)), []

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _context() != self._state:
            raise _RefusedError("a part without gradients or under autocast")
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, torch.fx.Proxy):
            return self.create_node("get_attr", self._path_of(a), (), {})
        return super().create_arg(a)

    def _path_of(self, tensor: Tensor) -> str:
        for path, module in self.root.named_modules():
            for members in (module._parameters, module._buffers, module.__dict__):
                for name, value in members.items():
                    if value is tensor:
                        return f"{path}.{name}" if path else name
        raise _RefusedError("a tensor that is no parameter, buffer or attribute")


class _RecordFactories(TorchFunctionMode):
    """Writes down what makes a tensor from nothing (``torch.arange``), which is otherwise computed while tracing."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FACTORIES and not _has_proxy((args, kwargs)):
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


def _has_proxy(structure: Any) -> bool:
    found: list[bool] = []
    substitute(structure, lambda part: found.append(isinstance(part, torch.fx.Proxy)))
    return any(found)


def _context() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


@contextlib.contextmanager
def _proxies_are_tensors() -> Iterator[None]:
    """Inside, ``isinstance(value, torch.Tensor)`` is true for traced values, as it is when the model runs."""
    plain = builtins.isinstance

    def isinstance_(instance: Any, classes: Any) -> bool:
        if type(instance) is not _Proxy:
            return plain(instance, classes)
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", __name__)):
            return plain(instance, classes)
        as_tensor = Tensor in (classes if plain(classes, tuple) else (classes,)) and not _is_python(instance.node)
        return as_tensor or plain(instance, classes)

    builtins.isinstance = isinstance_
    try:
        yield
    finally:
        builtins.isinstance = plain


def _is_python(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a Python value: a size, or computed from sizes alone."""
    if node.op == "call_method":
        return node.target in PYTHON
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in PYTHON
    sources = node.all_input_nodes
    return bool(sources) and all(_is_python(source) for source in sources)


@contextlib.contextmanager
def _left_alone(module: nn.Module) -> Iterator[list[str]]:
    """Undoes what a traced ``forward`` did to the module and to the random states; lists what it undid."""
    changes: list[str] = []
    before = [
        (m, len(m.__dict__), {k: (v, _contents(v)) for k, v in m.__dict__.items() if k not in _HOOKS})
        for m in module.modules()
    ]
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield changes
    finally:
        for owner, count, attributes in before:
            if len(owner.__dict__) != count:
                for key in [key for key in owner.__dict__ if key not in attributes and key not in _HOOKS]:
                    changes.append(f"writes the attribute {key}")
                    del owner.__dict__[key]
            for key, (value, contents) in attributes.items():
                if owner.__dict__.get(key, changes) is not value:
                    changes.append(f"writes the attribute {key}")
                    owner.__dict__[key] = value
                if contents is not None and not _same(_contents(value), contents):
                    changes.append(f"writes into the attribute {key}")
                    _refill(value, contents)
        if random.getstate() != python:
            changes.append(PYTHON_RANDOM)
            random.setstate(python)
        if not all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True)):
            changes.append(PYTHON_RANDOM)
            np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


_HOOKS = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}
PYTHON_RANDOM = "draws random numbers outside torch, which a second run would not repeat"


def _contents(value: Any) -> list[Any] | None:
    if not isinstance(value, dict | list | set):
        return None
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def _same(a: list[Any] | None, b: list[Any]) -> bool:
    return a is not None and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _refill(value: Any, contents: list[Any]) -> None:
    value.clear()
    if isinstance(value, dict):
        half = len(contents) // 2
        value.update(zip(contents[:half], contents[half:], strict=True))
    elif isinstance(value, set):
        value.update(contents)
    else:
        value.extend(contents)


def _in_assertion(frame: Any) -> bool:
    """Whether ``frame`` is about to raise AssertionError if the value it has asked for is false."""
    following = [i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE"]
    at = next((i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti), None)
    jumps = [*([at] if at is not None else []), *following[:2]]
    for position, instruction in enumerate(jumps):
        if "JUMP" in instruction.opname and "IF_TRUE" in instruction.opname:
            then = following[position] if position < len(following) else None
            return then is not None and ("ASSERT" in then.opname or then.argval is AssertionError)
    return False


def _place(error: BaseException) -> str:
    """`` (file:line)`` of the innermost frame that belongs neither to torch nor to this file."""
    here, found, step = PurePath(__file__), None, error.__traceback__
    while step is not None:
        file = PurePath(step.tb_frame.f_code.co_filename)
        if "torch" not in file.parts and file != here and "<" not in file.name:
            found = f" ({file.name}:{step.tb_lineno})"
        step = step.tb_next
    return found or ""


_KINDS: dict[str, OpKind] = {
    "call_module": "call",
    "call_function": "function",
    "call_method": "method",
    "get_attr": "attribute",
}


def _as_trace(graph: torch.fx.Graph) -> Trace:
    numbers: dict[torch.fx.Node, int] = {}
    ops: list[Op] = []

    def refs(structure: Any) -> Any:
        return substitute(structure, lambda part: Ref(numbers[part]) if isinstance(part, torch.fx.Node) else part)

    for node in graph.nodes:
        if node.op == "placeholder":
            numbers[node] = -int(str(node.target)[1:] or 0)
        elif node.op == "output":
            return Trace(tuple(ops), refs(node.args[0]))
        else:
            numbers[node] = len(ops) + 1
            ops.append(Op(len(ops) + 1, _KINDS[node.op], node.target, refs(node.args), refs(node.kwargs)))
    raise AssertionError("a graph ends with its output")
