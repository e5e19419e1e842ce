"""Stored blocks that follow each other run in one graph."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import Mode, chain_of
from edgetrain.planner import Plan, schedule
from edgetrain.runtime import Backward, Forward, Free, Head, Instruction, Program, Recompute, Update


def program(count: int, *instructions: Instruction) -> Program:
    return Program(tuple(f"{i}" for i in range(count)), ((2, 3),) * (count + 1), instructions)


def saved(*blocks: int) -> list[Instruction]:
    return [Backward(i, "saved") for i in blocks]


def stored(*blocks: int) -> list[Instruction]:
    return [Forward(i, "all") for i in blocks]


def test_what_is_joined() -> None:
    assert program(3, *stored(0, 1, 2), Head(), *saved(2, 1, 0)).joins == {1: (), 2: ()}
    freeing = program(
        3, *stored(0), Free(0), *stored(1, 2), Head(), Free(3), *saved(2), Free(2), Free(1), *saved(1, 0), Free(0)
    )
    assert freeing.joins == {1: (), 2: (2, 1)}
    updating = program(2, *stored(0, 1), Head(), *saved(1), Update(1), *saved(0), Update(0))
    assert updating.joins == {}
    recomputing = program(
        4,
        *(Forward(0, "input"), Forward(1, "nothing"), *stored(2, 3), Head(), *saved(3, 2)),
        *(Recompute(0, 1, "all"), Free(0), *saved(1, 0)),
    )
    assert recomputing.joins == {1: (), 3: ()}
    apart = program(3, *stored(0, 1), Forward(2, "input"), Head(), Backward(2, "recompute"), Free(2), *saved(1, 0))
    assert apart.joins == {1: ()}
    one_of_two = program(2, Forward(0, "all"), Forward(1, "input"), Head(), Recompute(1, 1, "all"), *saved(1, 0))
    assert one_of_two.joins == {}


def first_recomputed(model: nn.Module) -> Plan:
    """The first block by itself, all others stored."""
    chain = chain_of(model)
    modes: list[Mode] = ["recompute", *["store"] * (len(chain.blocks) - 1)]
    program = schedule([block.name for block in chain.blocks], chain.shapes((3, 4)), modes)
    return Plan(tuple(modes), ("",) * len(modes), program)


def test_the_model_itself_runs_where_everything_is_stored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain = edgetrain.uniform_plan(model, "keep_all", input_shape=(4,), batch_size=3)
    assert plain.program.is_plain
    y = edgetrain.wrap(model, plain)(torch.randn(3, 4))
    assert y.grad_fn.name() == "AddmmBackward0"
    assert not first_recomputed(model).program.is_plain
    updating = edgetrain.uniform_plan(model, "keep_all", input_shape=(4,), batch_size=3, update_in_backward=True)
    assert not updating.program.is_plain


class Ignoring(nn.Module):
    """Its output does not depend on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(x.shape[0], 4)


class Detaching(nn.Module):
    """Its output needs no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


def gradients(net: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    net(x).square().sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*parameters, x)]
    for p in parameters:
        p.grad = None
    return found


def test_blocks_through_which_no_gradient_goes() -> None:
    torch.manual_seed(0)
    for between in (Ignoring(), Detaching(), nn.Identity(), nn.ReLU(inplace=True)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), between, nn.Linear(4, 4), nn.Identity()).double()
        x, parameters = torch.randn(3, 4, dtype=torch.float64), list(model.parameters())
        plan = first_recomputed(model)
        assert len(plan.program.joins) == len(plan.program.names) - 2
        expected = gradients(model, parameters, x)
        for found, wanted in zip(gradients(edgetrain.wrap(model, plan), parameters, x), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_an_abandoned_step_is_freed_at_once() -> None:
    class Probe(torch.autograd.Function):
        """Stands for a tensor that autograd saves."""

        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.probe = probe = Held()
            alive.append(weakref.ref(probe))
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
            return dy

    class Held:
        pass

    class Probing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Probe.apply(x)

    alive: list[weakref.ref[Held]] = []
    model = nn.Sequential(nn.Linear(4, 4), Probing(), nn.Linear(4, 4), Probing(), nn.Linear(4, 4))
    net = edgetrain.wrap(model, first_recomputed(model))
    gc.disable()
    try:
        y = net(torch.randn(3, 4))
        assert len(alive) >= 2
        assert all(probe() is not None for probe in alive[-2:])
        del y
        assert all(probe() is None for probe in alive)
    finally:
        gc.enable()
