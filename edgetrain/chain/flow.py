"""Where a traced module can be cut: liveness, aliases and in-place operations.

After operation k there may be a cut if exactly one tensor computed so far is needed later, counting neither
parameters, buffers and what is computed from them alone, nor Python values (sizes, dtypes), which travel beside the
chain. What follows the cut must not overwrite, by itself or through a view, what was given before it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal, Protocol

from torch import nn

from edgetrain.chain.tracing import Op, Ref, Trace, refs_in
from edgetrain.chain.vocabulary import FRESH, IN_PLACE_OPERATORS, MIXED, PYTHON, RANDOM, TUPLES

Kind = Literal["tensor", "tuple", "python", "unknown"]
"""What a value is: one tensor, several, none, or not known."""


class Nature(Protocol):
    """What is known of a submodule's call."""

    def kind(self, path: str) -> Kind: ...

    def takes_tensor(self, path: str) -> bool: ...

    def may_alias(self, path: str) -> bool: ...

    def overwrites(self, path: str) -> bool: ...


class Flow:
    """The data flow of ``trace``.

    Args:
        nature: of the submodules it calls.

    Attributes:
        constant: per value, whether it comes from parameters and buffers alone.
        kinds: per value.
        overwrites_input: whether memory of the input is written.
        returns_alias: whether the output may share memory with the input.
    """

    def __init__(self, trace: Trace, nature: Nature) -> None:
        self.trace, self._nature = trace, nature
        count = len(trace.ops) + 1
        self.constant = [False] * count
        self.kinds: list[Kind] = ["tensor"] * count
        self._roots: list[frozenset[int]] = [frozenset((0,))] * count
        self._written: list[tuple[int, frozenset[int]]] = []
        for op in trace.ops:
            self._enter(op)
        written = frozenset[int]().union(*(roots for _, roots in self._written))
        if any(self.constant[root] for root in written):
            # a constant that is overwritten has another value later: only the reference to it may move
            self.constant = [False, *(op.kind == "attribute" for op in trace.ops)]
        self._resolve_unknown()
        self.overwrites_input = 0 in written
        outputs = refs_in(trace.output)
        self.returns_alias = any(0 in self._roots[index] for index in outputs)
        self.last_use = [0] * count
        for op in trace.ops:
            for index in op.inputs:
                self.last_use[index] = op.index
        for index in outputs:
            self.last_use[index] = count

    @property
    def output(self) -> int | None:
        """Index of the tensor it returns; None where it returns anything else."""
        output = self.trace.output
        if isinstance(output, Ref) and self.kinds[output.index] == "tensor":
            return output.index
        return None

    def live(self, k: int) -> list[int]:
        """Values of any kind but constant that exist after operation ``k`` and are used later."""
        return [i for i in range(k + 1) if self.last_use[i] > k and not self.constant[i]]

    def cuts(self, *, python_values: bool) -> list[tuple[int, int]]:
        """``(k, i)``: a cut after operation k, where value i is the one tensor alive; first to last, the ends excepted.

        Args:
            python_values: whether sizes and the like may be needed on both sides.
        """
        found = []
        for k in range(len(self.trace.ops)):
            live = self.live(k)
            tensors = [i for i in live if self.kinds[i] != "python"]
            if len(tensors) == 1 and self.kinds[tensors[0]] == "tensor" and (python_values or len(live) == 1):
                found.append((k, tensors[0]))
        return found

    def overwrites_before(self, first: int, last: int) -> bool:
        """Whether operations ``first`` to ``last`` write into memory that an earlier one, or the caller, gave."""
        return any(first <= k <= last and self._given_before(roots, first) for k, roots in self._written)

    def shares_before(self, index: int, first: int) -> bool:
        """Whether value ``index`` may share memory with one that existed before operation ``first``."""
        return self._given_before(self._roots[index], first)

    def _given_before(self, roots: frozenset[int], first: int) -> bool:
        return any(r < first and not (r > 0 and self.trace.ops[r - 1].kind == "attribute") for r in roots)

    def _enter(self, op: Op) -> None:
        k, inputs = op.index, op.inputs
        self.constant[k] = op.kind == "attribute" or (
            all(self.constant[i] for i in inputs) and op.kind != "call" and _name(op) not in RANDOM
        )
        self.kinds[k] = self._kind(op)
        tensors = [i for i in inputs if self.kinds[i] != "python"]
        target = self._overwritten(op)
        if target is not None and self.kinds[target] != "python":
            self._written.append((k, self._roots[target]))
            self._roots[k] = self._roots[target]
            if k > 0 and self.constant[k]:
                self.constant[k] = False
        elif self.kinds[k] == "python":
            self._roots[k] = frozenset()
        elif tensors and self._may_alias(op):
            self._roots[k] = frozenset[int]().union(*(self._roots[i] for i in tensors))
        else:
            self._roots[k] = frozenset((k,))

    def _kind(self, op: Op) -> Kind:
        if op.kind == "attribute":
            return "tensor"
        if op.kind == "call":
            return self._nature.kind(op.target)
        name, kinds = _name(op), [self.kinds[i] for i in op.inputs]
        first = self.kinds[op.inputs[0]] if op.inputs else "unknown"
        if name == "getattr":
            return "python" if op.args[1] in PYTHON or first == "python" else "tensor"
        if name in PYTHON:
            return "python"
        if name == "getitem":
            return "tensor" if first == "tuple" else first
        if name in TUPLES or name.endswith("_with_indices") or op.kwargs.get("return_indices"):
            return "tuple"
        if name in ("max", "min", "var_mean", "std_mean", "__call__"):
            return "unknown"
        if op.kind == "function" and not _of_torch(op.target):
            return "python" if kinds and all(kind == "python" for kind in kinds) else "unknown"
        if (getattr(op.target, "__module__", None) or "") in ("_operator", "math") and "tensor" not in kinds:
            return "python" if all(kind == "python" for kind in kinds) else "unknown"
        return "tensor"

    def _may_alias(self, op: Op) -> bool:
        return self._nature.may_alias(op.target) if op.kind == "call" else _name(op) not in FRESH

    def _overwritten(self, op: Op) -> int | None:
        first = op.args[0].index if op.args and isinstance(op.args[0], Ref) else None
        if op.kind == "attribute":
            return None
        if op.kind == "call":
            inputs = op.inputs
            return inputs[0] if inputs and self._nature.overwrites(op.target) else None
        out = op.kwargs.get("out")
        if isinstance(out, Ref):
            return out.index
        name = _name(op)
        in_place = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE_OPERATORS
        return first if in_place or (op.kind == "function" and _asks_in_place(op)) else None

    def _resolve_unknown(self) -> None:
        """What a layer or a torch function takes is a tensor."""
        for op in self.trace.ops:
            first = op.args[0] if op.args else None
            if isinstance(first, Ref) and self.kinds[first.index] == "unknown":
                takes_one = op.kind != "call" and _name(op) in FRESH - MIXED and _of_torch(op.target)
                if (op.kind == "call" and self._nature.takes_tensor(op.target)) or takes_one:
                    self.kinds[first.index] = "tensor"


def _name(op: Op) -> str:
    return op.target if isinstance(op.target, str) else getattr(op.target, "__name__", "")


def _of_torch(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, str) or module.split(".")[0] in ("torch", "_operator", "math", "builtins", "")


@functools.lru_cache(maxsize=512)
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _asks_in_place(op: Op) -> bool:
    if op.kwargs.get("inplace"):
        return True
    signature = _signature(op.target)
    if signature is None or "inplace" not in signature.parameters:
        return False
    position = list(signature.parameters).index("inplace")
    return len(op.args) > position and bool(op.args[position])


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own modules, a container of calls excepted."""
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)
