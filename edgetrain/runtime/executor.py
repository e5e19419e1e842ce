"""Runs a Program: a plain loop with one small function per instruction.

An :class:`Execution` is one training step in progress. Tensors that only the step knows are worked on in place;
whatever somebody else can see (the batch, the logits handed out, the gradient handed in, what autograd saved for
a stored block) is copied before it would be overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from edgetrain.chain import Block
from edgetrain.errors import ModelError
from edgetrain.nn.invertible import Invertible, Rerun
from edgetrain.nn.selective import Products
from edgetrain.runtime.offload import Offloaded, offload
from edgetrain.runtime.program import (
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


@dataclass
class _Graph:
    """What autograd keeps of one stored block.

    Attributes:
        like: a tensor without memory, of the shape and kind of the input; None where no gradient is asked for.
        caught: gets the gradient with respect to the input.
    """

    like: Tensor | None
    caught: list[Tensor] = field(default_factory=list)
    edge: GradientEdge | None = None
    storages: set[int] = field(default_factory=set)


class _Entry(torch.autograd.Function):
    """Where the graph of a block begins: catches the gradient of the input.

    A leaf would do the same, but holds the input until the backward pass, whether anything in the block saved it or
    not.

    Args:
        anchor: requires a gradient, so that the output does.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return x.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None]:
        ctx.caught.append(dx)
        return None, None, None


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
        self._records: dict[int, Record] = {}
        self._products: dict[int, Products] = {}
        self._offloaded: dict[int, Offloaded] = {}
        self._foreign: set[int] = set()
        self._input_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        """z[L] of the batch ``x`` (n, ...): everything up to the head."""
        self._input_gradient = x.requires_grad
        self._z[0] = x.detach()
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
            case Recompute(first, last, keep):
                for block in range(first, last + 1):
                    if keep == "all":
                        self._store(block, again=True)
                    else:
                        self._forward_again(block, keep)
            case Backward(block, "saved"):
                self._backward_saved(block)
            case Backward(block, "selective"):
                self._backward_again(block, self._products.pop(block).taking())
            case Backward(block, "recompute"):
                self._backward_again(block, contextlib.nullcontext())
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
            case Free(index):
                self._z.pop(index, None)

    def _store(self, i: int, *, again: bool) -> None:
        block, x = self._blocks[i], self._z[i].detach()
        differentiable = (i > 0 or self._input_gradient) and x.is_floating_point()
        graph = _Graph(x.new_empty(1).expand(x.shape) if differentiable else None)
        # what autograd saves matters only to a block that would overwrite this one's output
        watched = i + 1 < len(self._blocks) and isinstance(self._blocks[i + 1].module, Invertible)
        with torch.enable_grad(), _watching(graph.storages) if watched else contextlib.nullcontext():
            if differentiable:
                x = _Entry.apply(torch.empty(0, requires_grad=True), x, graph.caught)
            with self._records[i].again() if again else contextlib.nullcontext():
                y = block.module(x)
        graph.edge = get_gradient_edge(y) if y.requires_grad else None
        self._graphs[i] = graph
        self._z[i + 1] = y.detach()

    def _forward(self, i: int, keep: Keep) -> None:
        module = self._blocks[i].module
        record = self._records[i] = Record(module)
        if isinstance(module, Invertible) and keep == "nothing":
            self._z[i + 1] = record.first_in_place(self._own(self._z, i))
            return
        x = self._z.pop(i) if keep == "nothing" else self._z[i]
        version = x._version
        self._z[i + 1] = record.first(x, within=self._keeping(i, keep))
        if keep != "nothing" and x._version != version:
            raise ModelError(
                found=f"block {self._blocks[i].name or type(module).__name__}, which overwrites its input",
                expected="a block that leaves alone what it will be recomputed from",
                action='let its first operation work out of place, or give the block the mode "store"',
            )

    def _forward_again(self, i: int, keep: Keep) -> None:
        module = self._blocks[i].module
        with torch.no_grad(), self._records[i].again():
            if isinstance(module, Invertible) and keep == "nothing":
                self._z[i + 1] = module.forward_(self._own(self._z, i), replay=True)
                return
            x = self._z.pop(i) if keep == "nothing" else self._z[i]
            with self._keeping(i, keep):
                self._z[i + 1] = module(x)

    def _keeping(self, i: int, keep: Keep) -> contextlib.AbstractContextManager[object]:
        if keep != "products":
            return contextlib.nullcontext()
        self._products[i] = Products()
        return self._products[i].keeping()

    def _backward_saved(self, i: int) -> None:
        graph, dy = self._graphs.pop(i), self._g.pop(i + 1)
        if graph.edge is not None:
            torch.autograd.backward([graph.edge], [dy])
        del dy
        if graph.caught:
            self._g[i] = graph.caught.pop()
        elif graph.like is not None:
            self._g[i] = torch.zeros_like(graph.like, memory_format=torch.contiguous_format)

    def _backward_again(self, i: int, within: contextlib.AbstractContextManager[object]) -> None:
        """Runs block i once more from z[i], under autograd and inside ``within``, and goes back."""
        with self._records[i].again(), within:
            module, input_gradient = self._blocks[i].module, i > 0 or self._input_gradient
            rerun = Rerun(module, self._z[i], replay=None, input_gradient=input_gradient)
        gradient = rerun.backward(self._g.pop(i + 1))
        if gradient is not None:
            self._g[i] = gradient

    def _backward_invert(self, i: int, *, layerwise: bool) -> None:
        module = self._blocks[i].module
        if not isinstance(module, Invertible):
            raise RuntimeError(f"block {self._blocks[i].name} has no inverse")
        y, dy = self._own(self._z, i + 1), self._own(self._g, i + 1)
        with self._records[i].again():
            if layerwise:
                self._z[i], self._g[i] = module.backward_from_output(y, dy)
            else:
                self._z[i], self._g[i] = module.backward_holding(y, dy)

    def _own(self, tensors: dict[int, Tensor], i: int) -> Tensor:
        """``tensors[i]``, taken out, contiguous and safe to overwrite: copied if anybody else can see it."""
        tensor = tensors.pop(i)
        seen = _storage(tensor)
        others = {_storage(other) for other in (*self._z.values(), *self._g.values())}
        saved = any(seen in graph.storages for graph in self._graphs.values())
        kept = saved or any(seen in products.storages for products in self._products.values())
        if kept or seen in self._foreign or seen in others or not tensor.is_contiguous():
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor


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


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
