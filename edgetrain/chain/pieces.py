"""Pieces between two cuts, how they are gathered into blocks, and how blocks are called.

Every block has a convolution, a linear layer or an attention of its own; what has none joins the layer before it,
or the one after it where it only changes the shape. An invertible layer is always a block by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from edgetrain.chain.segment import Branch, Run, Step


@dataclass(frozen=True)
class Piece:
    """What lies between two cuts.

    Attributes:
        owner: path of the module whose ``forward`` it is part of.
        steps: how to run it.
        called: paths of the submodules, or names of functions, that it calls.
        layers: how many of its layers have a weight matrix or a kernel.
        module: path of the one submodule that it calls with nothing but its input.
        invertible: whether that one is invertible.
        overwrites: whether it writes into its input's memory.
        fresh: whether its output shares no memory with its input.
        shape_only: whether it gives a view of its input.
        uncut: why there is no cut inside; None where there is nothing to cut.
    """

    owner: str
    steps: tuple[Step, ...]
    called: tuple[str, ...]
    layers: int
    module: str | None = None
    invertible: bool = False
    overwrites: bool = False
    fresh: bool = True
    shape_only: bool = False
    uncut: str | None = None


def gather(pieces: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    """Pieces in groups, each of which shall be a block."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups and piece.overwrites:
            _glue(groups)
            groups[-1].append(piece)
        elif groups and _joins(groups[-1], piece):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [tuple(group) for group in groups]


def _glue(groups: list[list[Piece]]) -> None:
    """Merges groups from the end until the last one begins no later than the memory it ends with."""
    while len(groups) > 1 and not any(piece.fresh for piece in groups[-1]):
        last = groups.pop()
        groups[-1].extend(last)


def _joins(group: list[Piece], piece: Piece) -> bool:
    if piece.invertible or any(other.invertible for other in group):
        return False
    if not any(other.layers for other in group):
        return True
    if piece.layers or piece.shape_only:
        return False
    return all(other.layers < 2 for other in group) and piece.owner == group[-1].owner


def branch(path: str, training: Sequence[Piece], evaluation: Sequence[Piece]) -> Piece:
    """The piece of the module at ``path`` that is ``training`` in training mode and ``evaluation`` otherwise."""
    both, modes = [*training, *evaluation], (training, evaluation)
    runs = [
        tuple(step for piece in part for step in piece.steps if isinstance(step, Run))
        for part in (training, evaluation)
    ]
    layers = max(sum(piece.layers for piece in part) for part in modes)
    return Piece(
        owner=path,
        steps=(Branch(path, runs[0], runs[1]),),
        called=tuple(name for piece in training or evaluation for name in piece.called),
        layers=layers,
        overwrites=any(piece.overwrites for piece in both),
        fresh=all(any(piece.fresh for piece in part) for part in modes),
        uncut="its operations differ between training and evaluation" if layers > 1 else None,
    )


def name_of(model: nn.Module, group: Sequence[Piece]) -> str:
    """A readable path: that of a submodule, or ``first..last`` of those with parameters."""
    if len(group) == 1 and group[0].module is not None:
        return group[0].module
    called = list(dict.fromkeys(path for piece in group for path in piece.called))
    modules = dict(model.named_modules())
    trained = [path for path in called if path in modules and any(True for _ in modules[path].parameters())]
    names = trained or called
    if not names or names[0] == names[-1]:
        return names[0] if names else group[0].owner
    first, last = names[0].split("."), names[-1].split(".")
    shared = 0
    while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
        shared += 1
    return f"{names[0]}..{'.'.join(last[shared:])}"
