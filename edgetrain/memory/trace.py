"""Every allocation of a training step, found under fake tensors: no memory is used and nothing is computed.

The step runs as it is - the module's own Python, autograd's engine, the executor of a Program, the optimiser - on
tensors that have a shape and a storage of so many bytes, but no data (``torch._subclasses.fake_tensor``). A dispatch
mode sees every operator below autograd: a storage that was not there before is an allocation, and a weak reference
tells when the last owner lets go of it. What an operator allocates for itself and frees before it returns cannot be
seen from outside; :mod:`edgetrain.memory.operators` knows it.

A trace holds operators in order, each with what was freed before it, and expands into allocation events for a device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from edgetrain.nn.slices import slice_weight

Phase = Literal["setup", "forward", "backward", "optimizer"]
Kind = Literal["weights", "gradients", "optimizer", "batch", "activations", "temporaries"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "batch", "activations", "temporaries")

MARK = "edgetrain.mark"
"""Operator of a call that does nothing, see :meth:`Recorder.mark`."""
RANDOM_STATE = "torch.get_rng_state"


@dataclass(frozen=True)
class TensorMeta:
    """Shape, strides and element type of an operator's argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, each counted once."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether it is laid out row by row without holes."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True

    @property
    def is_channels_last(self) -> bool:
        """Whether it has four dimensions and its channels are next to each other, without holes."""
        if len(self.shape) != 4:
            return False
        n, c, h, w = range(4)
        order = (n, h, w, c)
        return TensorMeta(
            tuple(self.shape[k] for k in order), tuple(self.strides[k] for k in order), self.dtype
        ).is_contiguous


@dataclass
class Block:
    """A storage that lived during the step.

    Attributes:
        nbytes: of the storage.
        module: path of the module whose operator made it; "" outside of any.
        phase: in which it was made.
        kind: what it serves as.
    """

    nbytes: int
    module: str
    phase: Phase
    kind: Kind = "temporaries"


@dataclass(frozen=True)
class Call:
    """One operator.

    Attributes:
        operator: its name in torch, such as ``aten.convolution.default``.
        arguments: with :class:`TensorMeta` for every tensor.
        freed: blocks that went before it ran.
        made: blocks that it left.
        module: path of the module, that of the forward operator for a backward one.
        written: tensors that it computed, new ones and arguments that it changed; a view has none.
        weight: how many times it runs where it is traced once (:func:`edgetrain.nn.slices.slice_weight`).
    """

    operator: str
    arguments: tuple[Any, ...]
    freed: tuple[int, ...]
    made: tuple[int, ...]
    module: str
    phase: Phase
    written: tuple[TensorMeta, ...] = ()
    weight: int = 1


@dataclass
class StepTrace:
    """The operators of one training step.

    Attributes:
        calls: in order.
        blocks: of all calls, by number, those that were there before the step included.
        resident: blocks that were there when the step began: weights, batch, state of the optimiser.
        freed_last: blocks that went after the last call.
        draws_by_layout: whether random numbers were drawn for tensors with more than one dimension besides the batch's.
    """

    calls: list[Call] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    freed_last: tuple[int, ...] = ()
    draws_by_layout: bool = False


class Recorder(TorchDispatchMode):
    """Records the operators inside it, which must run on fake tensors.

    Attributes:
        trace: what was recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace = StepTrace()
        self.phase: Phase = "setup"
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._freed: list[int] = []
        self._modules: list[str] = []
        self._by_sequence: dict[int, str] = {}
        self._scalars = False
        self._get_state = torch.get_rng_state

    def classify(self, tensor: Tensor, kind: Kind, module: str = "") -> None:
        """Says what ``tensor`` serves as; one that no operator made was there when the step began."""
        number = self._meet(tensor, module)
        if number is not None:
            self.trace.resident.append(number)
        self.trace.blocks[self.number_of(tensor)].kind = kind

    def number_of(self, tensor: Tensor) -> int:
        """The block of ``tensor``, which an operator has made or :meth:`classify` was told of."""
        return self._known[tensor.untyped_storage()._cdata][0]

    def mark(self) -> int:
        """Number of a call that stands for this moment: all that went before is freed in it or before it."""
        freed, self._freed = tuple(self._freed), []
        self.trace.calls.append(Call(MARK, (), freed, (), "", self.phase))
        return len(self.trace.calls) - 1

    def finish(self) -> StepTrace:
        """The trace; what was freed after the last operator is in it."""
        self.trace.freed_last = tuple(self._freed)
        self._freed = []
        return self.trace

    @contextlib.contextmanager
    def in_phase(self, phase: Phase, *, scalars: bool = False) -> Iterator[None]:
        """Operators inside belong to ``phase``.

        Args:
            scalars: answer a request for the value of a tensor with 1 (a step counter of an optimiser); without it
                such a request fails, because the path of the program would depend on data.
        """
        before, self.phase = self.phase, phase
        if phase == "backward":
            for number, _ in self._known.values():
                if self.trace.blocks[number].phase == "forward":
                    self.trace.blocks[number].kind = "activations"
        answered, self._scalars = self._scalars, scalars
        try:
            yield
        finally:
            self.phase, self._scalars = before, answered

    @contextlib.contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Operators inside are attributed to the submodules of ``model`` by their paths."""
        names = {module: name for name, module in model.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            self._modules.append(names.get(module, self._modules[-1] if self._modules else ""))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            self._modules.pop()

        # a forward that raises leaves its path here, which names it; it ends the trace anyway
        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __enter__(self) -> Recorder:
        """Records until ``__exit__``; the state of the random numbers, a tensor that no operator makes, as well."""
        get_state = torch.get_rng_state

        def get_and_note() -> Tensor:
            state = get_state()
            made: list[int] = []
            freed, self._freed = tuple(self._freed), []
            self._note(state, self.current_module, made)
            self.trace.calls.append(Call(RANDOM_STATE, (), freed, tuple(made), self.current_module, self.phase))
            return state

        torch.get_rng_state, self._get_state = get_and_note, get_state
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.get_rng_state = self._get_state
        super().__exit__(*exception)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; it would cost a detour at every operator

    @property
    def current_module(self) -> str:
        """Path of the module that is running, or whose gradient is being computed."""
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        return "" if node is None else self._by_sequence.get(node._sequence_nr(), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)  # a question, not an operator of the step; autograd asks at every turn
        if self._scalars and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        kwargs = kwargs or {}
        module = self.current_module
        if self._modules:
            # the first operator after a node was made is the node's own
            self._by_sequence.setdefault(_get_sequence_nr() - 1, module)
        arguments = _metas((*args, *kwargs.values()))
        freed, self._freed = tuple(self._freed), []
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            _for_each_tensor(result, self._note_random)
        made: list[int] = []
        _for_each_tensor(result, lambda tensor: self._note(tensor, module, made))
        written = _written(func, args, kwargs, result) if not func.is_view and (made or func._schema.is_mutable) else ()
        self.trace.calls.append(
            Call(str(func), arguments, freed, tuple(made), module, self.phase, written, slice_weight())
        )
        return result

    def _note_random(self, tensor: Tensor) -> None:
        self.trace.draws_by_layout |= tensor.dim() > 2 and sum(extent > 1 for extent in tensor.shape[1:]) > 1

    def _note(self, tensor: Tensor, module: str, made: list[int]) -> None:
        block = self._meet(tensor, module)
        if block is not None:
            made.append(block)

    def _meet(self, tensor: Tensor, module: str) -> int | None:
        """The number of a new block for the storage of ``tensor``; None if it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[1]() is not None:
            return None
        number = len(self.trace.blocks)
        self.trace.blocks.append(Block(storage.nbytes(), module, self.phase))

        def gone(_: Any, key: int = key, number: int = number) -> None:
            self._freed.append(number)
            if key in self._known and self._known[key][0] == number:
                del self._known[key]

        self._known[key] = number, weakref.ref(storage, gone)
        return number


def _for_each_tensor(value: Any, visit: Callable[[Tensor], None]) -> None:
    if isinstance(value, Tensor):
        visit(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _for_each_tensor(item, visit)


def _metas(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorMeta(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_metas(item) for item in value)
    return value


def _written(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[TensorMeta, ...]:
    """What ``func`` returns; what it changes where it returns nothing."""
    found: list[TensorMeta] = []
    if func._schema.returns:
        _for_each_tensor(result, lambda tensor: found.append(_metas(tensor)))
        return tuple(found)
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            _for_each_tensor(value, lambda tensor: found.append(_metas(tensor)))
    return tuple(found)
