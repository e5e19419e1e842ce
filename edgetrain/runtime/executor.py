"""Runs a Program: a plain loop with one small function per instruction.

Stored blocks that follow each other (``Program.joins``) run in one graph of autograd's, as in the plain network: a
graph per block would cost more than a small block's arithmetic.

An :class:`Execution` is one training step in progress. Tensors that only the step knows are worked on in place;
whatever somebody else can see (the batch, the logits handed out, the gradient handed in, what autograd saved for
a stored block) is copied before it would be overwritten.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from edgetrain.chain import Block
from edgetrain.errors import ModelError
from edgetrain.nn import liveness
from edgetrain.nn.entry import entered
from edgetrain.nn.invertible import Invertible, Rerun, keeps_layout
from edgetrain.nn.layouts import memory_format, with_channels_last
from edgetrain.nn.lean import lean_operators_in
from edgetrain.nn.liveness import OtherCallsError
from edgetrain.nn.selective import Products
from edgetrain.runtime.offload import Offloaded, offload
from edgetrain.runtime.program import (
    DROPPING,
    SELECTIVE,
    Backward,
    Fetch,
    Forward,
    Free,
    Head,
    Instruction,
    Keep,
    Offload,
    Program,
    Recompute,
    Update,
)
from edgetrain.runtime.record import Record

Updater = Callable[[int], None]


@dataclass(slots=True)
class _Run:
    """Stored blocks that follow each other in one graph of autograd's.

    Attributes:
        like: shape, type and device of the input of the first block; None where no gradient is asked for.
        gradient: with respect to the output until the graph takes it, then with respect to the input.
    """

    like: tuple[torch.Size, torch.dtype, torch.device] | None
    gradient: Tensor | None = None

    def take_gradient(self) -> Tensor | None:
        """Hands it over, so that it goes as soon as it has been used."""
        gradient, self.gradient = self.gradient, None
        return gradient


@dataclass(slots=True)
class _Graph:
    """A stored block in its run.

    Attributes:
        first: of the run's blocks; ``last`` likewise.
        edge: where the last block's output comes from; None where nothing in it needs a gradient.
        storages: what autograd saved, where that is watched.
    """

    run: _Run
    first: bool
    last: bool = True
    edge: GradientEdge | None = None
    storages: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Output:
    """What an invertible block keeps in the place of its products.

    Attributes:
        y: its output.
    """

    y: Tensor

    @property
    def storages(self) -> set[int]:
        """Of the output."""
        return {_storage(self.y)}


class _Exit(torch.autograd.Function):
    """Where a graph ends: hands in the gradient of the output.

    A gradient given to ``torch.autograd.backward`` is held until the whole graph is done.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, run: _Run) -> Tensor:
        ctx.run = run
        return y.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.run.take_gradient(), None


def _freeing(z: dict[int, Tensor], indices: tuple[int, ...], _: Tensor) -> None:
    """Between two blocks of a run: what the program frees there."""
    for index in indices:
        z.pop(index, None)


class Execution:
    """One training step of ``program`` over ``blocks``.

    Args:
        update: called for ``update i``.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], *, update: Updater | None = None) -> None:
        self._program, self._blocks, self._update = program, blocks, update
        self._head = program.instructions.index(Head())
        self._z: dict[int, Tensor] = {}
        self._g: dict[int, Tensor] = {}
        self._graphs: dict[int, _Graph] = {}
        self._joining: tuple[Tensor, _Run] | None = None
        self._records: dict[int, Record] = {}
        self._products: dict[int, Products | _Output] = {}
        self._offloaded: dict[int, Offloaded] = {}
        self._foreign: set[int] = set()
        self._input_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        """z[L] of the batch ``x`` (n, ...): everything up to the head."""
        self._input_gradient = x.requires_grad
        self._z[0] = with_channels_last(x.detach()) if self._program.channels_last else x.detach()
        self._foreign.add(_storage(x))
        for position in range(self._head):
            self._run(self._program.instructions[position])
        y = self._z[len(self._blocks)]
        self._foreign.add(_storage(y))
        return y

    def backward(self, dy: Tensor) -> Tensor | None:
        """Gradient with respect to the batch if it was asked for; everything after the head.

        Args:
            dy: gradient with respect to z[L].
        """
        self._g[len(self._blocks)] = dy.detach()
        self._foreign.add(_storage(dy))
        for step in self._program.instructions[self._head + 1 :]:
            self._run(step)
        return self._g.get(0) if self._input_gradient else None

    def _run(self, step: Instruction) -> None:
        match step:
            case Forward(block, "all"):
                self._store(block, again=False)
            case Forward(block, keep):
                self._forward(block, keep)
            case Free(index):
                self._z.pop(index, None)
            case Recompute(first, last, keep):
                for block in range(first, last + 1):
                    if keep == "all":
                        self._store(block, again=True)
                    else:
                        self._forward_again(block, keep)
            case Backward(block, "saved"):
                self._backward_saved(block)
            case Backward(block, "selective" | "selective_all"):
                self._backward_selective(block)
            case Backward(block, "recompute"):
                self._backward_again(block)
            case Backward(block, how):
                self._backward_invert(block, layerwise=how == "invert_layerwise")
            case Offload(index, place):
                self._offloaded[index] = offload(self._z.pop(index), place)
            case Fetch(index):
                self._z[index] = self._offloaded.pop(index).fetch()
            case Update(block):
                if self._update is None:
                    raise RuntimeError("the program updates in the backward pass: wrap() needs an optimizer")
                self._update(block)

    def _store(self, i: int, *, again: bool) -> None:
        block = self._blocks[i]
        before, self._joining = self._joining, None
        x = self._z[i].detach() if before is None else before[0]
        run = _Run(_like(x) if i > 0 or self._input_gradient else None) if before is None else before[1]
        graph = self._graphs[i] = _Graph(run, first=before is None)
        before = None
        with torch.enable_grad(), _watching(graph.storages) if self._is_watched(i) else contextlib.nullcontext():
            if graph.first and run.like is not None:
                x = entered(x, run)
            with self._records[i].again() if again else lean_operators_in(block.module):
                y = block.module(x)
        del x
        self._z[i + 1] = y.detach()
        if not y.requires_grad:
            return
        if i + 1 in self._program.joins:
            if freed := self._program.joins[i + 1]:
                y.register_hook(functools.partial(_freeing, self._z, freed))
            graph.last, self._joining = False, (y, run)
            return
        with torch.enable_grad():
            graph.edge = get_gradient_edge(_Exit.apply(y, run))

    def _is_watched(self, i: int) -> bool:
        """Whether what autograd saves of block i matters: to a block that would overwrite this one's output."""
        return i + 1 < len(self._blocks) and isinstance(self._blocks[i + 1].module, Invertible)

    def _forward(self, i: int, keep: Keep) -> None:
        module = self._blocks[i].module
        record = self._records[i] = Record(module)
        if isinstance(module, Invertible) and keep in DROPPING:
            self._z[i + 1] = record.first_in_place(self._own_input(i), products=keep == "products_only")
            return
        if isinstance(module, Invertible) and keep == "products":
            self._keep_output(i, record.first_in_place(_copy_for(module, self._z[i]), products=False))
            return
        x = self._z.pop(i) if keep == "nothing" else self._z[i]
        version = x._version
        self._z[i + 1] = record.first(x, within=self._keeping(i, keep))
        self._choose(i, keep)
        if keep != "nothing" and x._version != version:
            raise ModelError(
                found=f"block {self._blocks[i].name or type(module).__name__}, which overwrites its input",
                expected="a block that leaves alone what it will be recomputed from",
                action='let its first operation work out of place, or give the block the mode "store"',
            )

    def _forward_again(self, i: int, keep: Keep) -> None:
        module = self._blocks[i].module
        with torch.no_grad(), self._records[i].again():
            if isinstance(module, Invertible) and keep in DROPPING:
                run = module.forward_ if keep == "nothing" else module.forward_keeping_products_
                self._z[i + 1] = run(self._own_input(i), replay=True)
                return
            if isinstance(module, Invertible) and keep == "products":
                self._keep_output(i, module.forward_(_copy_for(module, self._z[i]), replay=True))
                return
            x = self._z.pop(i) if keep == "nothing" else self._z[i]
            with self._keeping(i, keep):
                self._z[i + 1] = module(x)
            self._choose(i, keep)

    def _keep_output(self, i: int, y: Tensor) -> None:
        self._z[i + 1], self._products[i] = y, _Output(y)

    def _keeping(self, i: int, keep: Keep) -> contextlib.AbstractContextManager[object]:
        if keep not in SELECTIVE.values():
            return contextlib.nullcontext()
        products = self._products[i] = Products()
        return products.keeping()

    def _choose(self, i: int, keep: Keep) -> None:
        """Which of the products' results stay, now that all of the block has run."""
        if keep not in SELECTIVE.values():
            return
        products, course = self._products[i], self._records[i].course
        assert isinstance(products, Products)
        output = self._z[i + 1] if course.gains_by_output else None
        products.choose(cheap=keep == "all_products", dead=course.dead_products, output=output)

    def _backward_saved(self, i: int) -> None:
        """The backward pass of a whole run when its last block's turn comes."""
        graph = self._graphs.pop(i)
        run = graph.run
        if graph.last:
            run.gradient = self._g.pop(i + 1)
            if graph.edge is None:
                run.gradient = None
            else:
                torch.autograd.backward([graph.edge], [run.gradient.new_empty(0)])
        if not graph.first:
            return
        gradient = run.take_gradient()
        if gradient is not None:
            self._g[i] = gradient
        elif run.like is not None:
            shape, dtype, device = run.like
            self._g[i] = torch.zeros(shape, dtype=dtype, device=device)

    def _backward_selective(self, i: int) -> None:
        output, module = self._products[i], self._blocks[i].module
        if isinstance(output, Products):
            del output
            self._backward_again(i)
            return
        del self._products[i]
        assert isinstance(module, Invertible)
        dy = self._own(self._g, i + 1, memory_format(output.y))
        with self._records[i].again():
            self._g[i] = module.backward_between(self._z[i], output.y, dy)

    def _backward_again(self, i: int) -> None:
        """Runs what is live of block i once more from z[i], under autograd, and goes back."""
        rerun: Rerun | None
        try:
            rerun = self._rerun(i, self._products.pop(i, None), skip=True)
        except OtherCallsError:
            rerun = None  # what the failed pass holds goes with the error
            liveness.took_another(self._blocks[i].module, self._records[i].course)
        if rerun is None:
            rerun = self._rerun(i, None, skip=False)
        gradient = rerun.backward(self._g.pop(i + 1))
        if gradient is not None:
            self._g[i] = gradient

    def _rerun(self, i: int, products: Products | _Output | None, *, skip: bool) -> Rerun:
        module, record, input_gradient = self._blocks[i].module, self._records[i], i > 0 or self._input_gradient
        assert not isinstance(products, _Output)
        skipping = record.skipping(products) if skip else None
        with record.again(), contextlib.nullcontext() if products is None else products.taking():
            return Rerun(module, self._z[i], replay=None, input_gradient=input_gradient, skipping=skipping)

    def _backward_invert(self, i: int, *, layerwise: bool) -> None:
        module = self._blocks[i].module
        if not isinstance(module, Invertible):
            raise RuntimeError(f"block {self._blocks[i].name} has no inverse")
        layout = _layout_for(module, self._z[i + 1])
        y, dy = self._own(self._z, i + 1, layout), self._own(self._g, i + 1, layout)
        with self._records[i].again():
            if layerwise:
                self._z[i], self._g[i] = module.backward_from_output(y, dy)
            else:
                self._z[i], self._g[i] = module.backward_holding(y, dy)

    def _own_input(self, i: int) -> Tensor:
        """z[i], taken out for block i to run in its memory."""
        return self._own(self._z, i, _layout_for(self._blocks[i].module, self._z[i]))

    def _own(self, tensors: dict[int, Tensor], i: int, layout: torch.memory_format) -> Tensor:
        """``tensors[i]``, taken out, in ``layout`` and safe to overwrite: copied if anybody else can see it."""
        tensor = tensors.pop(i)
        seen = _storage(tensor)
        others = {_storage(other) for other in (*self._z.values(), *self._g.values())}
        saved = any(seen in graph.storages for graph in self._graphs.values())
        kept = saved or any(seen in products.storages for products in self._products.values())
        if kept or seen in self._foreign or seen in others or not tensor.is_contiguous(memory_format=layout):
            return tensor.clone(memory_format=layout)
        return tensor


def _layout_for(module: nn.Module, x: Tensor) -> torch.memory_format:
    """How an invertible ``module`` takes x (n, ...)."""
    return memory_format(x) if keeps_layout(module) else torch.contiguous_format


def _copy_for(module: nn.Module, x: Tensor) -> Tensor:
    return x.clone(memory_format=_layout_for(module, x))


def _watching(storages: set[int]) -> saved_tensors_hooks:
    """Notes the storages that autograd saves inside, and checks their versions as autograd would."""

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        storages.add(_storage(tensor))
        return tensor.detach(), tensor._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "a tensor that a stored block needs for its gradient was changed by an in-place operation "
                "inside that block"
            )
        return tensor

    return saved_tensors_hooks(pack, unpack)


def _like(x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    return (x.shape, x.dtype, x.device) if x.is_floating_point() else None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
