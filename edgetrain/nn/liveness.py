"""Results that a second pass need not compute, as no gradient depends on them.

Who runs a block a second time, under autograd, is not after its output: that has been known before, or is of no use any
more. What counts is what the gradients need, and towards the end of a block that is little. The gradient of a sum needs
none of its terms, that of batch norm its input alone, that of ReLU the signs of its output. So in

    y = relu(norm(conv(h)) + x)

the second pass computes ``conv(h)``; neither the normalisation nor the sum, nor the maximum if ``y`` has been kept, nor
the sum if it has not. Compilers call a value *live* at a point if something after it reads it, and drop code whose
results are dead. Here the first pass notes which operators were called on what (:func:`run`), liveness follows from the
last one back to the first (:class:`Course`), and in the second pass a dead result is a tensor without memory for its
elements, NaN throughout, with the history that autograd needs (:class:`Skipping`). A pass is watched in the first step
alone: what was called then is known by module and form of the input.

Whatever is not one of the operators known here reads its operands, and is run again. A module whose second pass calls
other functions, or an operator on other results or without autograd, or gives another result, is noticed:
:class:`OtherCallsError`. In modules with hooks, which may look at anything, all is live.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from edgetrain.nn.interception import unseen
from edgetrain.nn.normalisation import Statistics
from edgetrain.nn.resultless import Part, operator_of

Treatment = Literal["computed", "dead", "known"]
"""Of a call in the second pass: as in the first; without its result; its result is a part of the module's output."""


_Step = tuple[Any, int | None]
"""A function that a pass called, and the number of its result if it is known here."""


class OtherCallsError(Exception):
    """The second pass of a module is not the one that was prepared: run it again, computing everything."""


_Treated = tuple[tuple[Treatment, ...], dict[int, tuple[Part, ...]]]
"""The treatment of each call, and which parts of the output known results are."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call in a pass; results are numbered as the calls are.

    Attributes:
        operands: numbers of those that are results; None for all others.
        shapes: of the operands.
        given_result: whether a known result takes the place of all operands.
    """

    operands: tuple[int | None, ...]
    shapes: tuple[torch.Size, ...]
    needed: tuple[bool, ...]
    given_result: bool
    parts: tuple[Part, ...]
    keeps_result: bool
    in_place: bool
    is_product: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def without_values(self) -> Tensor:
        """A result without memory for its elements."""
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(frozen=True)
class Course:
    """What a pass of a module called, and what of it a second one has to compute.

    Attributes:
        steps: the functions, in order.
        calls: those that are known here.
        read: numbers of results that others read.
        output: number of what the module gave; None if it is none of these results.
    """

    steps: tuple[_Step, ...] = ()
    calls: tuple[_Call, ...] = ()
    read: frozenset[int] = frozenset()
    output: int | None = None

    @property
    def dead_products(self) -> tuple[bool, ...]:
        """For each product of the pass whether nobody needs its result if the module's output is known."""
        treatments = self._given_output[0]
        return tuple(t != "computed" for call, t in zip(self.calls, treatments, strict=True) if call.is_product)

    @property
    def gains_by_output(self) -> bool:
        """Whether less has to be computed if the module's output is known."""
        return self._given_output[0].count("computed") < self._given_input[0].count("computed")

    def skipping(
        self, output: Tensor | None, statistics: Callable[[], Statistics], pass_over: Callable[[], None]
    ) -> Skipping | None:
        """Runs the module a second time; None if there is nothing worth skipping.

        Args:
            output: of the first pass, if it is known.
            statistics: gives those of the next batch norm.
            pass_over: told of each product that is not computed.
        """
        if output is not None and self.output is not None and output.shape != self.calls[self.output].shape:
            output = None
        treatments, parts = self._given_input if output is None else self._given_output
        pairs = zip(self.calls, treatments, strict=True)
        if all(treatment == "computed" or call.keeps_result for call, treatment in pairs):
            return None  # an activation alone takes less time than to leave it out
        known: dict[int, Tensor] = {}
        if output is not None:
            for number, path in parts.items():
                known[number] = functools.reduce(lambda y, part: part.of(y), path, output.detach())
        return Skipping(self, treatments, known, statistics, pass_over)

    @functools.cached_property
    def _given_input(self) -> _Treated:
        return self._follow_back(output_known=False)

    @functools.cached_property
    def _given_output(self) -> _Treated:
        return self._follow_back(output_known=True)

    def _follow_back(self, *, output_known: bool) -> _Treated:
        """From the last call to the first: who reads a result is known before the call that gives it is reached."""
        live = set(self.read)
        overwriting = {call.operands[0]: number for number, call in enumerate(self.calls) if call.in_place}
        known: dict[int, tuple[Part, ...]] = {}
        if output_known and self.output is not None:
            known[self.output] = ()
        handed: dict[int, tuple[Part, ...]] = {}
        treatments: list[Treatment] = []
        for number in reversed(range(len(self.calls))):
            call, parts = self.calls[number], known.get(number)
            operands = [n for n in call.operands if n is not None]
            if call.in_place and (call.operands[0] is None or call.operands[0] in self.read):
                treatments.append("computed")  # somebody may see what it overwrites
                live.update(operands)
                continue
            if parts is not None and call.given_result and number not in self.read and number not in overwriting:
                handed[number] = parts
                treatments.append("known")
                continue
            needed = [n for n, is_needed in zip(call.operands, call.needed, strict=True) if is_needed]
            # what its gradient would need in the place of its result may be overwritten
            risky = call.keeps_result and any(n is None or n in self.read for n in needed)
            risky |= any(overwriting.get(n, number) != number for n in needed if n is not None)
            if number in live or risky:
                live.update(operands)
                treatments.append("computed")
                continue
            live.update(n for n in needed if n is not None)
            if parts is not None:
                pairs = zip(call.operands, call.parts, strict=False)
                known.update({n: (*parts, part) for n, part in pairs if n is not None})
            treatments.append("dead")
        return tuple(reversed(treatments)), handed


@dataclass(slots=True)
class _Seen:
    """Passes of a module over one form of input.

    Attributes:
        course: the one that was watched; None: the next one is.
        failures: second passes that were others.
    """

    course: Course | None = None
    failures: int = 0


_seen: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _Seen]] = WeakKeyDictionary()
_MOST_FORMS, _MOST_FAILURES = 8, 2


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Course]:
    """The output of ``module`` for ``x``, without autograd, and its course: of this pass, or of one of an earlier step.

    Whether an earlier one is still what the module does, a second pass finds out.
    """
    forms = _seen.setdefault(module, {})
    form = x.shape, x.dtype, x.device, module.training
    seen = forms.get(form)
    if seen is None:
        if len(forms) >= _MOST_FORMS:
            del forms[next(iter(forms))]
        seen = forms[form] = _Seen()
    if seen.course is not None:
        return module(x), seen.course
    if any(_has_hooks(layer) for layer in module.modules()):
        course = Course()
        y: Tensor = module(x)
    else:
        watching = _Watching()
        with watching:
            y = module(x)
        course = watching.course_to(y)
    seen.course = course
    return y, course


def _has_hooks(layer: nn.Module) -> bool:
    forward, backward = layer._forward_pre_hooks or layer._forward_hooks, layer._backward_pre_hooks
    return bool(forward or backward or layer._backward_hooks)


def took_another(module: nn.Module, course: Course) -> None:
    """The second pass of ``module`` was not ``course``: the next one is watched, or nothing more is skipped."""
    for seen in _seen.get(module, {}).values():
        if seen.course is course:
            seen.failures += 1
            seen.course = None if seen.failures < _MOST_FAILURES else Course()


class _Watching(TorchFunctionMode):
    """Notes the calls of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[_Step] = []
        self._calls: list[_Call] = []
        self._read: set[int] = set()
        self._numbers: Any = WeakIdKeyDictionary()

    def course_to(self, y: Tensor) -> Course:
        """All of it, ``y`` being the module's output."""
        return Course(tuple(self._steps), tuple(self._calls), frozenset(self._read), self._numbers.get(y))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        with unseen():
            operator = operator_of(func, args, kwargs)
            if operator is None:
                self._read.update(n for t in _tensors((args, kwargs)) if (n := self._numbers.get(t)) is not None)
            else:
                operands = tuple(self._numbers.get(operand) for operand in operator.operands)
                shapes = operator.shapes
        result = func(*args, **kwargs)
        self._steps.append((func, None if operator is None else len(self._calls)))
        if operator is None:
            return result
        with unseen():
            self._numbers[result] = len(self._calls)
            self._calls.append(
                _Call(
                    operands,
                    shapes,
                    operator.needed,
                    operator.with_result is not None,
                    operator.parts,
                    operator.keeps_result,
                    operator.in_place,
                    operator.is_product,
                    result.shape,
                    result.dtype,
                    result.device,
                )
            )
        return result


class Skipping(TorchFunctionMode):
    """A second pass of a module, under autograd, that computes what is live."""

    def __init__(
        self,
        course: Course,
        treatments: Sequence[Treatment],
        known: dict[int, Tensor],
        statistics: Callable[[], Statistics],
        pass_over: Callable[[], None],
    ) -> None:
        super().__init__()
        self._course, self._treatments, self._known = course, treatments, known
        self._statistics, self._pass_over = statistics, pass_over
        self._next = self._nodes = 0
        self._skipped = False
        self._given: Any = WeakIdKeyDictionary()  # numbers of results that were not computed

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The output of ``module`` for ``x``, of use for its history alone.

        Raises:
            OtherCallsError: the pass is not the one that was watched.
        """
        with self:
            y: Tensor = module(x)
        self._look_for_others()
        output = self._course.output
        if self._next != len(self._course.steps) or self._given.get(y) != self._uncomputed(output):
            raise OtherCallsError("another end")
        return y

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        steps = self._course.steps
        step: _Step = steps[self._next] if self._next < len(steps) else ("nothing", None)
        (expected, number), self._next = step, self._next + 1
        if expected != func:  # a property's getter is another object each time
            raise OtherCallsError(f"{func} in the place of {expected}")
        if not self._skipped and self._uncomputed(number) is None:  # so far all results have values
            return func(*args, **kwargs)
        self._look_for_others()
        result = self._called(func, args, kwargs, number)
        self._nodes = _count_nodes()
        return result

    def _uncomputed(self, number: int | None) -> int | None:
        """``number``, if this result is not computed."""
        return None if number is None or self._treatments[number] == "computed" else number

    def _look_for_others(self) -> None:
        """A function of autograd's that is no operator is not seen here: it may have saved what has no values."""
        if self._skipped and _count_nodes() != self._nodes:
            raise OtherCallsError("a function that is no operator of torch's")

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int | None) -> Any:
        if number is None:
            if any(t in self._given for t in _tensors((args, kwargs))):
                raise OtherCallsError(f"{func} of a result that was not computed")
            return func(*args, **kwargs)
        with unseen():
            operator = operator_of(func, args, kwargs)
            call, treatment = self._course.calls[number], self._treatments[number]
            uncomputed = tuple(self._uncomputed(n) for n in call.operands)
            if operator is None or tuple(self._given.get(t) for t in operator.operands) != uncomputed:
                raise OtherCallsError(f"{func} of other tensors")
            if operator.shapes != call.shapes:
                raise OtherCallsError(f"{func} of other shapes")
        if treatment == "computed":
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            raise OtherCallsError(f"{func} without autograd")
        with unseen():
            if treatment == "known":
                assert operator.with_result is not None
                result = operator.with_result(self._known[number])
            else:
                result = operator.without_result(call.without_values(), self._statistics)
        if call.is_product:
            self._pass_over()
        self._given[result], self._skipped = number, True
        return result


def _count_nodes() -> int:
    """Of autograd's graphs, that this thread has made so far."""
    count: int = torch._C._autograd._get_sequence_nr()
    return count


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_leaf", "is_nested", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_mkldnn", "grad_fn")),
    *(
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.nelement,
        Tensor.__len__,
        Tensor.is_floating_point,
        Tensor.ndimension,
    ),
}
"""Looks at a tensor that read none of its elements."""
