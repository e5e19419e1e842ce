"""From a model to pieces between cuts.

A module is traced with its submodules closed; where a piece is one submodule, that one is traced in turn. A module
that holds no more than a few single layers in a row stays whole: the tensors between them are the widest. Where
training and evaluation differ, the block asks for the mode when it runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from edgetrain.chain.flow import Flow
from edgetrain.chain.knowledge import Knowledge, closed
from edgetrain.chain.pieces import Piece, branch, gather
from edgetrain.chain.segment import Run, join
from edgetrain.chain.tracing import Op, Ref, Trace, substitute
from edgetrain.chain.vocabulary import FUNCTIONAL_LAYERS
from edgetrain.nn import Invertible

SMALL_UNIT = 4
"""A module with at most as many single layers in a row is not cut inside."""


class Cutter:
    """Cuts parts of ``model``; remembers what it has traced.

    Args:
        model: whose paths are used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = Knowledge()

    def groups(self, path: str) -> list[tuple[Piece, ...]]:
        """The pieces of the module at ``path``, those of a block together."""
        module = self._model.get_submodule(path)
        if (reason := closed(module)) is not None or not self._known.worth_opening(module):
            return [(self._whole(path, module, reason),)]
        return gather(self._pieces(path, module, (Ref(0),), {}, root=path == ""))

    def _pieces(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, root: bool
    ) -> list[Piece]:
        flows = self._known.flows_of(module, args, kwargs)
        if isinstance(flows, str):
            return [self._whole(path, module, flows)]
        training, evaluation = flows
        if training.output is None or evaluation.output is None:
            return [self._whole(path, module, f"{type(module).__name__} returns no single tensor")]
        pieces: list[Piece] = []
        if training is evaluation:
            for piece in self._split(path, module, training, python_values=True):
                pieces.extend(self._opened(piece))
        else:
            alike = _outline(training.trace) == _outline(evaluation.trace)
            parts = [self._split(path, module, flow, python_values=alike) for flow in flows]
            keys = [[repr(piece.steps) for piece in part] for part in parts]
            for tag, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
                if tag == "equal":
                    for piece in parts[0][a:b]:
                        pieces.extend(self._opened(piece))
                else:
                    pieces.append(branch(path, parts[0][a:b], parts[1][c:d]))
        if not root and not isinstance(module, nn.Sequential) and self._is_unit(pieces):
            return [self._whole(path, module, next((piece.uncut for piece in pieces if piece.uncut), None))]
        return pieces

    def _split(self, path: str, module: nn.Module, flow: Flow, *, python_values: bool) -> list[Piece]:
        assert flow.output is not None
        ends = [*flow.cuts(python_values=python_values), (len(flow.trace.ops), flow.output)]
        pieces, start, given = [], 0, 0
        for end, result in ends:
            if end > start and any(not flow.constant[k] for k in range(start + 1, end + 1)):
                pieces.append(self._piece(path, module, flow, (start, given), (end, result)))
                start, given = end, result
        return pieces

    def _piece(
        self, path: str, module: nn.Module, flow: Flow, before: tuple[int, int], after: tuple[int, int]
    ) -> Piece:
        (start, given), (end, result) = before, after
        run = _lower(path, flow, before, after)
        acting = [flow.trace.ops[k - 1] for k in range(start + 1, end + 1) if not flow.constant[k]]
        calls = [op for op in acting if op.kind == "call"]
        layers = sum(self._known.layers_in(module.get_submodule(op.target)) for op in calls)
        layers += sum(_label(op) in FUNCTIONAL_LAYERS for op in acting if op.kind == "function")
        only = acting[0] if len(acting) == len(run.ops) == len(calls) == 1 else None
        plain = only is not None and only.args == (Ref(given),) and not only.kwargs
        target = module.get_submodule(only.target) if only is not None and plain else None
        fresh = not flow.shares_before(result, start + 1)
        return Piece(
            owner=path,
            steps=(run,),
            called=tuple(join(path, op.target) for op in calls) or tuple(join(path, _label(op)) for op in acting[-1:]),
            layers=layers,
            module=join(path, only.target) if only is not None and plain else None,
            invertible=isinstance(target, Invertible) and closed(target) is None,
            overwrites=flow.overwrites_before(start + 1, end),
            fresh=fresh,
            shape_only=not fresh and not layers and not any(_label(op).startswith("dropout") for op in acting),
            uncut=_alive(module, flow, start, end) if layers > 1 and len(acting) > 1 else None,
        )

    def _opened(self, piece: Piece) -> list[Piece]:
        (run,) = piece.steps
        assert isinstance(run, Run)
        if len(run.ops) != 1 or run.ops[0].kind != "call" or run.ops[0].inputs != (0,):
            return [piece]
        call = run.ops[0]
        path = join(piece.owner, call.target)
        module = self._model.get_submodule(path)
        if isinstance(module, Invertible) or not self._known.worth_opening(module):
            return [piece]
        if (reason := closed(module)) is not None:
            return [replace(piece, uncut=reason)]
        inner = self._pieces(path, module, call.args, call.kwargs, root=False)
        return [replace(piece, uncut=inner[0].uncut)] if len(inner) == 1 and inner[0].module == path else inner

    def _whole(self, path: str, module: nn.Module, reason: str | None) -> Piece:
        owner, _, name = path.rpartition(".")
        return Piece(
            owner=owner,
            steps=(Run(owner, (Op(1, "call", name, (Ref(0),), {}),), 1),),
            called=(path,),
            layers=self._known.layers_in(module),
            module=path,
            invertible=isinstance(module, Invertible),
            overwrites=self._known.overwrites(module),
            fresh=not self._known.may_alias(module),
            uncut=reason,
        )

    def _is_unit(self, pieces: Sequence[Piece]) -> bool:
        if any(piece.invertible for piece in pieces):
            return False
        return sum(piece.layers > 1 for piece in pieces) < 2 and len(gather(pieces)) <= SMALL_UNIT


def _lower(path: str, flow: Flow, before: tuple[int, int], after: tuple[int, int]) -> Run:
    """The operations between two cuts, with what they need of parameters, as a program of its own."""
    (start, given), (end, result) = before, after
    chosen = {k for k in range(start + 1, end + 1) if not flow.constant[k]}
    waiting = [*chosen, result]
    while waiting:
        k = waiting.pop()
        if k > 0 and k not in chosen and flow.constant[k]:
            chosen.add(k)
        if k > 0 and k in chosen:
            waiting.extend(i for i in flow.trace.ops[k - 1].inputs if flow.constant[i] and i not in chosen)
    order = sorted(chosen)
    numbers = {given: 0, **{k: n for n, k in enumerate(order, 1)}}
    read = sorted({i for k in order for i in flow.trace.ops[k - 1].inputs} - set(numbers))
    numbers.update((k, n) for n, k in enumerate(read, len(order) + 1))

    def renumber(structure: Any) -> Any:
        return substitute(structure, lambda part: Ref(numbers[part.index]) if isinstance(part, Ref) else part)

    ops = [flow.trace.ops[k - 1] for k in order]
    written = [k for k in order if flow.kinds[k] == "python" and not flow.constant[k] and flow.last_use[k] > end]
    return Run(
        path,
        tuple(Op(numbers[op.index], op.kind, op.target, renumber(op.args), renumber(op.kwargs)) for op in ops),
        numbers[result],
        tuple(((path, k), numbers[k]) for k in read),
        tuple(((path, k), numbers[k]) for k in written),
    )


def _alive(module: nn.Module, flow: Flow, start: int, end: int) -> str:
    counts = [len([i for i in flow.live(k) if flow.kinds[i] != "python"]) for k in range(start + 1, end)]
    calls = [op.target for op in flow.trace.ops[start:end] if op.kind == "call"]
    between = f"between {calls[0]} and {calls[-1]}" if len(calls) > 1 else "at once"
    low, high = min(counts, default=0), max(counts, default=0)
    what = f"{high} tensors are" if low == high else f"{low} to {high} tensors are"
    if low == high == 1:
        what = "a value that may be no tensor is"
    return f"{type(module).__name__}: {what} alive {between}"


def _outline(trace: Trace) -> list[Any]:
    """Which operations there are; two traces with the same number their values alike."""
    return [(op.kind, op.target, op.inputs) for op in trace.ops]


def _label(op: Op) -> str:
    name = op.target if isinstance(op.target, str) else getattr(op.target, "__name__", "function")
    return name.rpartition(".")[2] if op.kind == "call" else name
