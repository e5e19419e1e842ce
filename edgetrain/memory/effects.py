"""What an instruction of a Program does to memory: a few numbers that a simulation adds up.

An instruction works on tensors that others may hold too: z[i], z[i+1], g[i+1]. Whether their memory is freed when it
lets go of them depends on the plan; everything else it allocates and frees is its own affair and always the same. So an
:class:`Effect` is a few numbers: bytes up to the moment at which it lets go of a shared tensor, and from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgetrain.memory.work import Work
from edgetrain.nn.layouts import are_channels_last, channels_last_strides
from edgetrain.runtime.program import Keep

Operand = Literal["x", "y", "dy", "dx"]
"""Tensors of block i that others see: z[i], z[i+1], g[i+1] and g[i]."""

Layout = tuple[int, ...] | None
"""Strides of a tensor; None: contiguous."""

Key = tuple[str, Layout, Layout]
"""An instruction as a block sees it, with the layouts of z[i] and g[i+1] where they matter.

- ``forward all``, ``forward products``, ``forward all_products``, ``forward products_only``, ``forward input``,
  ``forward nothing``
- ``recompute all after input``: after any first pass that leaves a record, one that keeps nothing included
- ``backward saved after forward all``, ``backward saved after recompute all after input``
- ``backward selective after forward products``, ``backward selective after recompute products after input``; likewise
  ``selective_all`` after ``all_products``
- ``backward invert_selective after forward products_only``, likewise after ``recompute products_only after input``
- ``backward recompute after input``, ``backward invert``, ``backward invert_layerwise``; an inversion takes z[i+1] and
  g[i+1] in one layout
- ``update``
"""


def owned_layout(shape: tuple[int, ...], layout: Layout, *, keeps: bool) -> Layout:
    """In which layout an invertible block takes a tensor of ``shape``.

    Args:
        keeps: whether it :attr:`keeps_layout <edgetrain.nn.invertible.Invertible.keeps_layout>`.
    """
    if layout is None or not keeps:
        return None
    return channels_last_strides(shape) if len(shape) == 4 and are_channels_last(shape, layout) else None


def key_of(name: str, *, after: str = "", x: Layout = None, dy: Layout = None) -> Key:
    """The key of an instruction."""
    return f"{name} after {after}" if after else name, x, dy


def first_pass(keep: Keep) -> str:
    """What a first pass leaves for later ones, by name: one that keeps all leaves no record, the others the same."""
    return "all" if keep == "all" else "input"


@dataclass(frozen=True, slots=True)
class Made:
    """What an instruction has made so far by what it serves as, less what it has freed of earlier ones' making.

    Attributes:
        kept: bytes that are still there when the instruction ends, gradients left out.
        gradients: of parameters and activations.
        hidden: bytes that are gone when it ends.
        inner: what the operator that runs takes for itself.
    """

    kept: int = 0
    gradients: int = 0
    hidden: int = 0
    inner: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an instruction.

    Attributes:
        peak_bytes: most bytes in it, above those at its start.
        net_bytes: at its end, above those at its start.
        releases: what the instruction lets go of then; None at the end of the instruction.
        at_peak: what the instruction has made by then, earlier parts included; ``at_end`` likewise at its end.
    """

    peak_bytes: int
    net_bytes: int
    releases: Operand | None
    at_peak: Made = Made()
    at_end: Made = Made()


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that an instruction gives.

    Attributes:
        nbytes: of its storage, part of the net bytes unless it is in the memory of an operand.
        inside: the operand in whose memory it is.
    """

    name: Operand
    nbytes: int
    layout: Layout
    inside: Operand | None


@dataclass(frozen=True, slots=True)
class Effect:
    """What one instruction does to memory, and what it computes.

    Attributes:
        kept: operands and outputs that the block goes on holding: what autograd saved, or a product's result.
        noted: those that the executor knows to be held, and will not overwrite.
        work: of its operators, from which its seconds follow.
    """

    parts: tuple[Part, ...]
    outputs: tuple[Output, ...]
    kept: tuple[Operand, ...]
    noted: tuple[Operand, ...]
    work: tuple[Work, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Most bytes above those at its start, if nothing that it lets go of is freed."""
        level = peak = 0
        for part in self.parts:
            peak = max(peak, level + part.peak_bytes)
            level += part.net_bytes
        return peak

    @property
    def net_bytes(self) -> int:
        """Bytes that it leaves, its outputs among them, if nothing that it lets go of is freed."""
        return sum(part.net_bytes for part in self.parts)
