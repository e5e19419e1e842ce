"""``wrap(model, plan)``: an ordinary module whose training step is a Program.

    net = edgetrain.wrap(model, plan)
    loss = criterion(net(x), y)
    loss.backward()
    optimizer.step()

One autograd function stands around the whole chain: its forward runs the program up to the head and hands out
the logits, its backward takes the gradient of whatever loss was made of them and runs the rest. Gradients of
the parameters are added to their ``.grad`` in place. Where every block is stored the model itself runs, its max pooling
as in any stored block (:mod:`edgetrain.nn.max_pool`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgetrain.chain import Block, Chain, SampledNetwork, chain_of
from edgetrain.errors import ModelError
from edgetrain.nn.attention import AttentionTap
from edgetrain.nn.layouts import with_channels_last
from edgetrain.nn.lean import lean_operators_in
from edgetrain.runtime.executor import Execution
from edgetrain.runtime.program import Program, Update


class Planned(Protocol):
    """Whatever carries a Program: a Plan."""

    @property
    def program(self) -> Program: ...


OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Wrapped(nn.Module):
    """A model that trains as its plan says; without gradients it is the model itself.

    Attributes:
        model: the module given to :func:`wrap`; its parameters and buffers are shared, not copied.
        plan: what is executed.
        optimizers: by its module, that of each block with parameters where the plan updates in the backward pass, else
            empty.
    """

    def __init__(self, model: nn.Module, plan: Planned, *, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self._chain = chain_of(model)
        _check(self._chain, plan.program)
        self.optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
        if _updates(plan.program):
            if optimizer is None:
                raise ModelError(
                    found="a plan that updates each block in the backward pass and no optimizer",
                    expected="a function that makes an optimizer for the parameters of one block",
                    action="pass optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)",
                )
            owned = set[nn.Parameter]()
            sampled = self.model.members() if isinstance(self.model, SampledNetwork) else []
            for module in dict.fromkeys([*(block.module for block in self._chain.blocks), *sampled]):
                # the gradient of a parameter of several blocks is complete after the first one's backward pass
                parameters = [p for p in module.parameters() if p.requires_grad and p not in owned]
                owned.update(parameters)
                if parameters:
                    self.optimizers[module] = optimizer(parameters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x`` (n, c, h, w)."""
        if not torch.is_grad_enabled():
            return self.model(x)
        expected = self.plan.program.shapes[0][1:]
        if tuple(x.shape[1:]) != expected:
            raise ModelError(
                found=f"a batch of samples {tuple(x.shape[1:])}",
                expected=f"samples {expected}, for which the plan was made",
                action="make a plan for this input, or resize the images",
            )
        if torch.is_autocast_enabled(x.device.type):
            raise ModelError(
                found="a planned step under autocast",
                expected="one precision throughout: an inverse must undo what the forward pass rounded",
                action="leave torch.autocast, or convert the model and its input",
            )
        if self.plan.program.is_plain:
            with lean_operators_in(self.model):
                y: Tensor = self.model(with_channels_last(x) if self.plan.program.channels_last else x)
            return y
        # the anchor makes the result require a gradient although no parameter passes through the function
        anchor = torch.empty(0, requires_grad=True)
        taps = self._taps()
        if not taps:
            logits: Tensor = _Step.apply(x, anchor, self)
            return logits
        logits, *terms = _Step.apply(x, anchor, self)
        for tap, term in zip(taps, terms, strict=True):
            tap.term = term
        return logits

    def _taps(self) -> list[AttentionTap]:
        """Those of the chain that have a target for the next step."""
        modules = [block.module for block in self._chain.blocks]
        return [module for module in modules if isinstance(module, AttentionTap) and module.target is not None]

    def follow(self, plan: Planned) -> None:
        """From the next step on executes ``plan``, with the same optimizers.

        Raises:
            ModelError: it is for another model, or its updates are in another place.
        """
        _check(self._chain, plan.program)
        if _updates(plan.program) != _updates(self.plan.program):
            raise ModelError(
                found="a plan that updates in the backward pass after one that does not, or the other way round",
                expected="the same: the optimizers are made for one of them",
                action="wrap the model again",
            )
        self.plan = plan

    def blocks(self) -> tuple[Block, ...]:
        """The blocks that a step runs now."""
        blocks = self._chain.blocks
        return self.model.in_places(blocks) if isinstance(self.model, SampledNetwork) else blocks

    def _update(self, block: Block) -> None:
        optimizer = self.optimizers.get(block.module)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def wrap(model: nn.Module, plan: Planned, *, optimizer: OptimizerFactory | None = None) -> Wrapped:
    """A module that computes what ``model`` computes and whose training step is ``plan.program``.

    Args:
        model: the module that the plan was made for.
        plan: of :func:`edgetrain.uniform_plan`.
        optimizer: makes the optimizer of one block's parameters; needed, and used, only where the plan updates in
            the backward pass.

    Raises:
        ModelError: the plan is for another model.
    """
    return Wrapped(model, plan, optimizer=optimizer)


class _Step(torch.autograd.Function):
    """The chain as one function: logits and, where attention is tapped, the terms of the loss (scalars)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, wrapped: Wrapped) -> Tensor | tuple[Tensor, ...]:
        blocks = wrapped.blocks()
        ctx.execution = Execution(wrapped.plan.program, blocks, update=lambda i: wrapped._update(blocks[i]))
        ctx.taps = wrapped._taps()
        y: Tensor = ctx.execution.forward(x)
        if not ctx.taps:
            return y.view_as(y)
        return y.view_as(y), *(_term_of(tap) for tap in ctx.taps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *scales: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.execution is None:
            raise RuntimeError("backward was called twice on one step of a wrapped model: run the forward pass again")
        execution: Execution
        execution, ctx.execution = ctx.execution, None
        for tap, scale in zip(ctx.taps, scales, strict=True):
            tap.scale = scale
        try:
            return execution.backward(dy), None, None
        finally:
            for tap in ctx.taps:
                tap.scale = None


def _term_of(tap: AttentionTap) -> Tensor:
    assert tap.term is not None
    term, tap.term = tap.term.detach(), None
    return term


def _updates(program: Program) -> bool:
    return any(isinstance(step, Update) for step in program.instructions)


def _check(chain: Chain, program: Program) -> None:
    names = tuple(block.name for block in chain.blocks)
    if names != program.names:
        differing = next(
            (pair for pair in zip(names, program.names, strict=False) if pair[0] != pair[1]),
            (f"{len(names)} blocks", f"{len(program.names)} blocks"),
        )
        raise ModelError(
            found=f"a model whose chain has {differing[0]!r} where the plan has {differing[1]!r}",
            expected="the model that the plan was made for",
            action="make a new plan for this model",
        )
