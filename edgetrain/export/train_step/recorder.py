"""Records what a step does on tensors without data as nodes of an ONNX graph.

The step runs as it is - the executor of a Program, autograd's engine, the layers' own backward passes - and a dispatch
mode sees every operator below autograd. Each is written down by the rule of its name, in the order in which it ran;
what it changes in place is followed by :mod:`edgetrain.export.train_step.storages`. An operator without a rule is taken
apart as torch itself describes it by others; one that stays is refused by its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from edgetrain.chain.fakes import FakeTensor
from edgetrain.errors import ExportError
from edgetrain.export.train_step.graph import Graph, Value
from edgetrain.export.train_step.storages import Place, Storage, UnknownPlaceError

Rule = Callable[..., Any]
"""(recorder, results, *arguments, **keywords) -> a value per result, None for one that nobody needs."""

RULES: dict[str, Rule] = {}
"""By the name of the operator, without the underscore of the form that works in place."""

_DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.bool: np.bool_,
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of the operators ``names``."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Recorder(TorchDispatchMode):
    """Records operators into ``graph`` while it is active.

    Attributes:
        where: what the step is doing, for errors.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.where = ""
        self._storages: dict[int, Storage] = {}
        self._owners: list[torch.UntypedStorage] = []  # so that no address is used twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, errors and the names of nodes say ``what``."""
        before, self.where = self.where, what
        try:
            with self.graph.scope(what.replace(" ", "_")):
                yield
        finally:
            self.where = before

    def bind(self, tensor: Tensor, value: Value) -> None:
        """``tensor`` holds ``value`` from now on."""
        self._write(tensor, value)

    def value(self, tensor: Tensor, *, repeated: bool = True) -> Value:
        """What ``tensor`` holds.

        Args:
            repeated: as in :meth:`Storage.read`.
        """
        if not isinstance(tensor, FakeTensor) and not self._is_known(tensor):
            return self.graph.constant(_array(tensor))
        return self._storage(tensor).read(_place(tensor), repeated=repeated)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))  # a question, not an operator of the step
        kwargs = kwargs or {}
        name = func._opname.rstrip("_") if not func._opname.startswith("_") else func._opname
        function = RULES.get(name)
        if function is None and func in decomposition_table and not self._is_view(func):
            with self:
                result = decomposition_table[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        given, mutable = _tensors((args, kwargs)), func._schema.is_mutable
        if given and not mutable and not any(isinstance(t, FakeTensor) or self._is_known(t) for t in given):
            with _disable_current_modes():
                return func(*args, **kwargs)  # constants of the program
        before = {t.untyped_storage()._cdata for t in given}
        result = func(*args, **kwargs)
        outs = _tensors(result)
        if not mutable and outs and all(t.untyped_storage()._cdata in before for t in outs) and name not in WRITING:
            return result  # views
        if not any(isinstance(t, FakeTensor) for t in (*outs, *given)):
            return result  # numbers of the program
        if function is None:
            raise self._refused(func, "no rule says how to write it with standard ONNX operators")
        try:
            self._record(func, function, result, args, kwargs)
        except (UnknownPlaceError, NotImplementedError) as error:
            raise self._refused(func, str(error)) from error
        return result

    def _record(self, func: Any, function: Rule, result: Any, args: Any, kwargs: Any) -> None:
        written = [kwargs.pop(a.name) for a in func._schema.arguments if a.is_out and a.name in kwargs]
        outs = written or (list(result) if isinstance(result, (tuple, list)) else [result])
        values = function(self, outs[0] if len(outs) == 1 else outs, *args, **kwargs)
        values = list(values) if isinstance(values, (tuple, list)) else [values]
        for out, value in zip(outs, values, strict=True):
            if out is not None and value is not None:
                self._write(out, value)

    def _write(self, tensor: Tensor, value: Value) -> None:
        graph = self.graph
        value = graph.cast(value, dtype_of(tensor))
        place = _place(tensor)
        if value.size != tensor.numel():
            value = graph.expand(value, place.shape)
        self._storage(tensor).write(place, graph.reshape(value, place.shape))

    def known(self, tensor: Tensor) -> Value | None:
        """What ``tensor`` holds; None where nobody has written it."""
        return self.value(tensor) if self._is_known(tensor) else None

    def fill(self, tensor: Tensor, number: float | None) -> None:
        """All of the memory of ``tensor`` holds ``number``, or nothing yet."""
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        self._owners.append(storage)
        self._storages[storage._cdata] = Storage(self.graph, size, dtype_of(tensor), fill=number)

    def number(self, value: Any, dtype: Any) -> Value:
        """``value``, a number or a tensor, as an operand of type ``dtype`` that repeats by itself."""
        if isinstance(value, Tensor):
            return self.graph.cast(self.value(value, repeated=False), dtype)
        return self.graph.constant(value, dtype)

    def _storage(self, tensor: Tensor) -> Storage:
        if not self._is_known(tensor):
            if not isinstance(tensor, FakeTensor):
                raise UnknownPlaceError("a tensor with data is written to")
            self.fill(tensor, None)
        return self._storages[tensor.untyped_storage()._cdata]

    def _is_known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    @staticmethod
    def _is_view(func: Any) -> bool:
        return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns)

    def _refused(self, func: Any, reason: str) -> ExportError:
        return ExportError(
            found=f"{func} in {self.where or 'the step'}: {reason}",
            expected="a step whose operators have counterparts among the standard operators of ONNX",
            action="replace the layer that calls it, or train with edgetrain train",
        )


WRITING = frozenset({"native_batch_norm"})
"""Operators that change an argument and do not say so."""


def dtype_of(tensor: Tensor) -> Any:
    """The numpy type of the elements of ``tensor``.

    Raises:
        ExportError: the graph is not written for it.
    """
    if tensor.dtype not in _DTYPES:
        raise ExportError(
            found=f"a step with tensors of {tensor.dtype}",
            expected="one of " + ", ".join(str(dtype) for dtype in _DTYPES),
            action="export the step of a plan in float32",
        )
    return np.dtype(_DTYPES[tensor.dtype])


def _array(tensor: Tensor) -> Any:
    with _disable_current_modes():  # which would give memory without data
        return tensor.detach().cpu().numpy().copy()


def _place(tensor: Tensor) -> Place:
    return Place(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    return []


def axes_of(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dimensions counted from the front; None or none are all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(rank))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return sorted(d % rank for d in dims)
