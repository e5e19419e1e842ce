"""Weight decay leaves alone what modules declare: the scales of Dirac weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.nn import DiracConv2d, dirac_projection_
from edgetrain.train import Recipe, Trainer, planned, undecayed_parameters


def network() -> nn.Sequential:
    torch.manual_seed(0)
    last = dirac_projection_(nn.Conv2d(4, 6, 3, padding=1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(DiracConv2d(1, 4, 3, padding=1), DiracConv2d(4, 4, 3, padding=1), last, head)


def scales(model: nn.Module) -> set[str]:
    """By name, which is what the declaration must agree with here."""
    return {name for name, _ in model.named_parameters() if name.endswith((".a", ".b"))}


def test_declared_parameters() -> None:
    model = network()
    declared = undecayed_parameters(model)
    assert {name for name, p in model.named_parameters() if p in declared} == scales(model)
    assert len(declared) == 5
    assert undecayed_parameters(edgetrain.create_model("resnet20")) == frozenset()


def decayed(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_groups() -> None:
    model = network()
    undecayed = undecayed_parameters(model)
    found = decayed(Recipe(weight_decay=0.5).optimizer(model.parameters(), undecayed=undecayed), model)
    assert found == {name: 0.0 if name in scales(model) else 0.5 for name, _ in model.named_parameters()}
    given = [{"params": module.parameters(), "momentum": 0.1 * i} for i, module in enumerate(model)]
    optimizer = Recipe(weight_decay=0.5).optimizer(given, undecayed=undecayed)
    assert decayed(optimizer, model) == found
    assert [g["momentum"] for g in optimizer.param_groups] == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3])
    assert len(Recipe().optimizer(model.parameters()).param_groups) == 1


def test_a_plan_is_made_with_the_optimiser_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[nn.Module, dict[str, float]]] = []

    def planner(model: nn.Module, **options: Any) -> None:
        made.append((model, decayed(options["optimizer"](model.parameters()), model)))
        raise StopIteration

    monkeypatch.setattr(planned, "Planner", planner)
    with pytest.raises(StopIteration):
        planned.planned(
            network, input_shape=(1, 6, 6), recipe=Recipe(batch_size=4), budget_bytes=None, runs=lambda *_, **__: True
        )
    ((model, found),) = made
    assert {name for name, decay in found.items() if decay == 0.0} == scales(model) != set()


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_scales_without_a_gradient_stay(tmp_path: Path, update_in_backward: bool) -> None:
    """An optimiser step at zero gradient moves what decays, by rate * decay, and nothing else."""
    model = network()
    plan = edgetrain.uniform_plan(
        model, "recompute", input_shape=(1, 6, 6), batch_size=4, update_in_backward=update_in_backward
    )
    trainer = Trainer(model, plan, run_dir=tmp_path, recipe=Recipe(weight_decay=0.5, momentum=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in trainer._optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in scales(model):
            assert torch.equal(parameter, before[name])
        else:
            # Nesterov's first step: the gradient plus the momentum of it
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5 * 1.5))


def test_a_dirac_network_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = edgetrain.create_model("diracnet-10-1", 2, in_channels=1, width=4)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 1, 8, 8) + labels.view(-1, 1, 1, 1)
    plan = edgetrain.uniform_plan(model, "recompute", input_shape=(1, 8, 8), batch_size=16)
    recipe = Recipe(epochs=4, batch_size=16, peak_rate=0.05)
    history = Trainer(model, plan, run_dir=tmp_path, recipe=recipe).fit(
        list(zip(images.split(16), labels.split(16), strict=True))
    )
    assert history[-1].accuracy > 0.9
