"""Programs as values, and every instruction of them executed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetrain
from edgetrain.chain import chain_of
from edgetrain.errors import ModelError
from edgetrain.planner import Plan
from edgetrain.planner.uniform import UniformMode
from edgetrain.runtime import (
    Backward,
    Fetch,
    Forward,
    Free,
    Head,
    Instruction,
    Offload,
    Program,
    Recompute,
)

SHAPE = (2, 3, 8, 8)


def five_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Conv2d(8, 8, 3, padding=1),
        edgetrain.nn.CouplingLayer(8),
        nn.Sequential(nn.Flatten(), nn.Linear(512, 10)),
    ).double()


def whole(modules: nn.Sequential) -> nn.Sequential:
    """The same network with its inner containers closed: five blocks, whatever is inside them."""

    class Closed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    return nn.Sequential(*[Closed(m) if type(m) is nn.Sequential else m for m in modules])


PROGRAMS: dict[str, list[Instruction]] = {
    "nested checkpoints": [
        Forward(0, "input"),
        Forward(1, "nothing"),
        Forward(2, "nothing"),
        Forward(3, "nothing"),
        Forward(4, "all"),
        Head(),
        Backward(4, "saved"),
        Recompute(0, 2, "nothing"),
        Recompute(3, 3, "all"),
        Backward(3, "saved"),
        Recompute(0, 1, "input"),
        Backward(2, "recompute"),
        Backward(1, "recompute"),
        Backward(0, "recompute"),
    ],
    "offloaded to the host": [
        Forward(0, "all"),
        Forward(1, "input"),
        Offload(1, "host"),
        Forward(2, "all"),
        Forward(3, "nothing"),
        Forward(4, "all"),
        Head(),
        Backward(4, "saved"),
        Backward(3, "invert_layerwise"),
        Backward(2, "saved"),
        Fetch(1),
        Backward(1, "recompute"),
        Free(1),
        Backward(0, "saved"),
    ],
    "offloaded to disk": [
        Forward(0, "all"),
        Forward(1, "input"),
        Offload(1, "disk"),
        Forward(2, "input"),
        Offload(2, "disk"),
        Forward(3, "nothing"),
        Forward(4, "all"),
        Head(),
        Backward(4, "saved"),
        Backward(3, "invert"),
        Fetch(2),
        Backward(2, "recompute"),
        Fetch(1),
        Backward(1, "recompute"),
        Backward(0, "saved"),
    ],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_instructions_give_the_gradients_of_plain_autograd(name: str) -> None:
    model = whole(five_blocks())
    plain = copy.deepcopy(model)
    chain = chain_of(model)
    # a segment's inputs are worth keeping only if the first recomputation leaves z[0] in place
    instructions = [step for step in PROGRAMS[name]]
    if name == "nested checkpoints":
        instructions[7] = Recompute(0, 0, "input")
        instructions.insert(8, Recompute(1, 2, "nothing"))
    program = Program(tuple(b.name for b in chain.blocks), chain.shapes(SHAPE), tuple(instructions))
    net = edgetrain.wrap(model, Plan(("store",) * 5, ("",) * 5, program))
    x, labels = torch.randn(SHAPE, dtype=torch.double), torch.tensor([1, 2])
    F.cross_entropy(net(x), labels).backward()
    F.cross_entropy(plain(x), labels).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    for b, c in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12)


def test_update_in_backward_takes_the_step_of_the_optimizer_and_frees_gradients() -> None:
    model = five_blocks()
    plain = copy.deepcopy(model)
    sgd: Callable[..., torch.optim.Optimizer] = lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)  # noqa: E731
    plan = edgetrain.uniform_plan(
        model, "invert_layerwise", input_shape=SHAPE[1:], batch_size=SHAPE[0], update_in_backward=True
    )
    net, reference = edgetrain.wrap(model, plan, optimizer=sgd), sgd(plain.parameters())
    for _ in range(3):
        x, labels = torch.randn(SHAPE, dtype=torch.double), torch.tensor([1, 2])
        F.cross_entropy(net(x), labels).backward()
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(plain(x), labels).backward()
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    with pytest.raises(ModelError, match="pass optimizer"):
        edgetrain.wrap(model, plan)


@pytest.mark.parametrize(
    "mode", ["keep_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise"]
)
def test_json_and_back_without_loss(
    mode: UniformMode,
) -> None:
    model = edgetrain.create_model("hybrid18", width=8)
    plan = edgetrain.uniform_plan(model, mode, input_shape=(3, 16, 16), batch_size=4, update_in_backward=True)
    assert Program.from_json(plan.program.to_json()) == plan.program
    assert Plan.from_json(plan.to_json()) == plan
    assert len(plan.program.table().splitlines()) == len(plan.program.instructions) + 1


@pytest.mark.parametrize(
    "text", ["", "{}", '{"version": 99}', '{"version": 1, "names": [], "shapes": [], "instructions": [{"op": "rm"}]}']
)
def test_a_damaged_program_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="make the plan again"):
        Program.from_json(text)
    with pytest.raises(ModelError, match="make the plan again"):
        Plan.from_json(text)


def test_a_plan_for_another_model_or_input_is_refused() -> None:
    model = edgetrain.create_model("hybrid18", width=8)
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=(3, 16, 16), batch_size=4)
    with pytest.raises(ModelError, match=r"'stage1\.0'.*plan has|plan has"):
        edgetrain.wrap(edgetrain.create_model("layerwise18", width=8), plan)
    with pytest.raises(ModelError, match=r"\(3, 32, 32\)"):
        edgetrain.wrap(model, plan)(torch.randn(4, 3, 32, 32))


def test_shapes_that_do_not_fit_are_found_before_anything_runs() -> None:
    model = edgetrain.create_model("hybrid18")
    with pytest.raises(ModelError, match="divisible by 2"):
        edgetrain.uniform_plan(model, "keep_all", input_shape=(3, 20, 20), batch_size=4)
    with pytest.raises(ModelError, match="stem"):
        edgetrain.uniform_plan(model, "keep_all", input_shape=(4, 32, 32), batch_size=4)


def test_what_outlives_the_forward_pass() -> None:
    """Only inputs of recomputed blocks and outputs of inverted blocks that nobody gives back."""
    model = edgetrain.create_model("revnet18", widths=(8, 16, 32, 32))
    plan = edgetrain.uniform_plan(model, "invert", input_shape=(3, 16, 16), batch_size=4)
    alive = set()
    for step in plan.program.instructions:
        if isinstance(step, Head):
            break
        if isinstance(step, Forward):
            alive.add(step.block + 1)
            if step.keep == "nothing":
                alive.discard(step.block)
        if isinstance(step, Free):
            alive.discard(step.index)
    names = ["", *plan.program.names]
    assert {names[i] for i in alive} == {"stage1.1", "stage2.1", "stage3.1", "norm", "head"}
