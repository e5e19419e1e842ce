"""One pass over training data that can begin in its middle.

A :class:`Loader` begins there without decoding what came before. Of anything else the batches before are made and
dropped, which also brings the generators of a DataLoader to where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from edgetrain.train.data import Loader
from edgetrain.train.random_state import RandomState, generators_of

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """Whatever gives batches ``(images (n, c, h, w), labels (n,))``: a Loader or a torch DataLoader."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


class Pass:
    """The batches of one epoch from ``first`` on.

    Args:
        start: random states at the start of the epoch; restored before a pass that begins in its middle.
        now: those when ``first`` batches were done; restored then. Equal to ``start`` where none is: a DataLoader draws
            from the generators when a pass of it begins.

    Attributes:
        done: batches of the epoch that were handed out or left out.
        indices: of the images of the last batch in their source, (n,); None where the batches do not tell.
    """

    def __init__(self, batches: Batches, *, first: int, start: RandomState, now: RandomState | None) -> None:
        self.done = first
        self.indices: Tensor | None = None
        self._source = batches
        self._loader = batches if isinstance(batches, Loader) else None
        if now is not None:
            start.restore(*generators_of(batches))
        if self._loader is not None:
            self._batches = self._loader.iterate(first)
        else:
            self._batches = iter(batches)
            for _ in range(first):
                next(self._batches, None)
        if now is not None and not (first == 0 and now.equals(start)):
            now.restore()

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.done = self.done + 1 if self._loader is None else self._loader.done
        self.indices = getattr(self._source, "indices", None)
        return batch
