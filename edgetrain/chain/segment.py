"""A block that is a part of somebody's ``forward``: runs its operations on the model's own submodules.

Nothing is copied. Submodules, parameters and buffers appear under their paths in the model, and what a forward pass
reads or replaces is what the model holds at that moment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgetrain.chain.tracing import Op, Ref, substitute
from edgetrain.nn.replay import is_replaying

Note = tuple[str, int]
"""Names a Python value that an earlier block found (a size, a dtype): path of the module and index there."""


@dataclass(frozen=True)
class Run:
    """Operations of the ``forward`` of one module, input and output one tensor each.

    Attributes:
        owner: path of the module.
        ops: with indices 1, 2, ...; value 0 is the input.
        result: index of the output.
        reads: (note, index): Python values that an earlier block found, numbered after the operations.
        writes: (note, index): those that later ones need.
    """

    owner: str
    ops: tuple[Op, ...]
    result: int
    reads: tuple[tuple[Note, int], ...] = ()
    writes: tuple[tuple[Note, int], ...] = ()

    @functools.cached_property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """Per operation, the values that nothing needs after it."""
        last = {0: 1, **{op.index: op.index for op in self.ops}, **{index: 1 for _, index in self.reads}}
        for op in self.ops:
            last.update((index, op.index) for index in op.inputs)
        kept = {self.result, *(index for _, index in self.writes)}
        return tuple(tuple(i for i, end in last.items() if end == op.index and i not in kept) for op in self.ops)


@dataclass(frozen=True)
class Branch:
    """Runs that depend on ``training`` of the module ``owner``."""

    owner: str
    training: tuple[Run, ...]
    evaluation: tuple[Run, ...]


Step = Run | Branch


def join(owner: str, name: str) -> str:
    """Path of ``name`` in ``owner``."""
    return f"{owner}.{name}" if owner and name else owner or name


class Segment(nn.Module):
    """Steps one after the other.

    Args:
        model: whose parts they are.
        notes: shared by the blocks of a chain, which run in order.

    Attributes:
        saved: the notes that the last forward pass read.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Step], notes: dict[Note, Any]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.saved: dict[Note, Any] = {}
        self._notes = notes
        self._members: dict[str, nn.Module] = {}
        called, read = set[str](), set[str]()
        for step in self.steps:
            self._member(model, step.owner)
            for run in _runs(step):
                for op in run.ops:
                    path = join(run.owner, op.target) if isinstance(op.target, str) else ""
                    if op.kind == "call":
                        called.add(path)
                        self._member(model, path)
                    elif op.kind == "attribute":
                        read.add(path)
                        self._member(model, path.rpartition(".")[0])
        for path in called:
            if not any(other != path and path.startswith(f"{other}.") for other in called):
                _place(self, model, path, called)
        for path in read:
            owner, _, name = path.rpartition(".")
            if not any(owner == other or owner.startswith(f"{other}.") for other in called):
                _show(_place(self, model, owner, called), self._members[owner], name)

    def forward(self, x: Tensor) -> Tensor:
        """z[i+1] from z[i].

        Raises:
            RuntimeError: no block before it has run.
        """
        runs = [run for step in self.steps for run in self._chosen(step)]
        if not is_replaying():
            own = {note for run in runs for note, _ in run.writes}
            needed = [note for run in runs for note, _ in run.reads if note not in own]
            missing = [note for note in needed if note not in self._notes]
            if missing:
                raise RuntimeError("a block needs sizes that an earlier one finds: run the blocks of a chain in order")
            self.saved = {note: self._notes[note] for note in needed}
        notes = dict(self.saved)
        for run in runs:
            x = self._run(run, x, notes)
        return x

    def _chosen(self, step: Step) -> tuple[Run, ...]:
        if isinstance(step, Run):
            return (step,)
        return step.training if self._members[step.owner].training else step.evaluation

    def extra_repr(self) -> str:
        return f"{sum(len(run.ops) for step in self.steps for run in _runs(step))} operations"

    def _run(self, run: Run, x: Tensor, notes: dict[Note, Any]) -> Tensor:
        values: dict[int, Any] = {0: x, **{index: notes[note] for note, index in run.reads}}
        del x
        for op, done in zip(run.ops, run.ends, strict=True):
            values[op.index] = self._result_of(run, op, values)
            for index in done:
                del values[index]
        for note, index in run.writes:
            notes[note] = values[index]
            if not is_replaying():
                self._notes[note] = values[index]
        result: Tensor = values[run.result]
        return result

    def _result_of(self, run: Run, op: Op, values: dict[int, Any]) -> Any:
        if op.kind == "attribute":
            owner, _, name = join(run.owner, op.target).rpartition(".")
            return getattr(self._members[owner], name)
        args = substitute(op.args, lambda part: values[part.index] if isinstance(part, Ref) else part)
        kwargs = substitute(op.kwargs, lambda part: values[part.index] if isinstance(part, Ref) else part)
        if op.kind == "call":
            return self._members[join(run.owner, op.target)](*args, **kwargs)
        if op.kind == "method":
            return getattr(args[0], op.target)(*args[1:], **kwargs)
        return op.target(*args, **kwargs)

    def _member(self, model: nn.Module, path: str) -> None:
        self._members[path] = model.get_submodule(path)


class _Shared(MutableMapping[str, Any]):
    """Some of a module's parameters or buffers, seen from outside: reads and writes go to the module."""

    def __init__(self, source: dict[str, Any]) -> None:
        self.source = source
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.source[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.names:
            raise KeyError(name)
        self.source[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("a block's parameters belong to the model")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _runs(step: Step) -> tuple[Run, ...]:
    return (step,) if isinstance(step, Run) else step.training + step.evaluation


def _place(segment: nn.Module, model: nn.Module, path: str, called: set[str]) -> nn.Module:
    """The module at ``path``: the model's own if it is called, else an empty one that holds what is."""
    at, real, walked = segment, model, ""
    for name in path.split(".") if path else ():
        real, walked = real.get_submodule(name), join(walked, name)
        if name not in at._modules:
            at._modules[name] = real if walked in called else nn.Module()
        inner = at._modules[name]
        assert inner is not None
        at = inner
    return at


def _show(part: nn.Module, owner: nn.Module, name: str) -> None:
    """Makes ``owner``'s parameter or buffer visible in ``part``."""
    for members in ("_parameters", "_buffers"):
        source = getattr(owner, members)
        if name in source:
            if not isinstance(getattr(part, members), _Shared):
                setattr(part, members, _Shared(source))
            shared = getattr(part, members)
            if name not in shared.names:
                shared.names.append(name)
