"""Sampled networks: draws, gradients against plain autograd in float64, predicted against measured peaks, scaling."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ResNet
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import SampledNetwork
from edgetrain.errors import ModelError, UsageError
from edgetrain.memory import measure_costs, measure_peak, simulate
from edgetrain.memory.step import OPTIMIZERS
from edgetrain.models import cifar_resnet, hybrid, irevnet, resnet, revnet

BOUND = 1e-10
INPUT, BATCH = (3, 16, 16), 4


def networks() -> dict[str, Any]:
    return {
        "resnet32": lambda: cifar_resnet(32, width=8),
        "resnet": lambda: resnet(widths=(8, 16), blocks=(4, 5)),
        "revnet": lambda: revnet(widths=(8, 16), blocks=(4, 3)),
        "irevnet": lambda: irevnet(width=8, blocks=(3, 4), pooling=("channel",)),
        "hybrid": lambda: hybrid(width=8, blocks=(3, 4), pooling=("channel",)),
    }


def sampled(name: str, keep: Any = "1/2", **options: Any) -> SampledNetwork:
    torch.manual_seed(0)
    return SampledNetwork(networks()[name](), keep, input_shape=INPUT, **options)


def test_stages_of_a_cifar_resnet() -> None:
    """9 modules per stage; the first of the second and third halves the resolution and always runs."""
    net = SampledNetwork(edgetrain.create_model("resnet56"), "5/9", input_shape=(3, 32, 32))
    assert [(len(stage.names), stage.kept) for stage in net.stages] == [(9, 5), (8, 4), (8, 4)]
    assert net.stages[1].names == tuple(f"stage2.{i}" for i in range(1, 9))
    by_numbers = SampledNetwork(net.model, "3,8,1", input_shape=(3, 32, 32))
    assert [stage.kept for stage in by_numbers.stages] == [3, 8, 1]


def test_draws_are_exact_balanced_and_repeatable() -> None:
    net = sampled("resnet32", (3, 2, 1))
    draws = [net.draw(step) for step in range(600)]
    for draw in draws:
        assert [len(indices) for indices in draw] == [3, 2, 1]
        assert all(list(indices) == sorted(set(indices)) for indices in draw)
    # each module of a stage runs with the same chance K/N: 600 draws, six standard deviations
    for stage, (kept, count) in enumerate([(3, 5), (2, 4), (1, 4)]):
        seen = Counter(index for draw in draws for index in draw[stage])
        assert set(seen) == set(range(count))
        p = kept / count
        assert all(abs(seen[i] - 600 * p) < 6 * (600 * p * (1 - p)) ** 0.5 for i in range(count))
    again = sampled("resnet32", (3, 2, 1))
    assert [again.draw(step) for step in (311, 5)] == [draws[311], draws[5]]
    other = sampled("resnet32", (3, 2, 1), seed=1)
    assert [other.draw(step) for step in range(20)] != draws[:20]


def plain_step(model: nn.Module, net: SampledNetwork, x: Tensor) -> Tensor:
    """What the drawn modules compute, written with the model's own names and the skipped ones left out."""
    drawn = {stage.names[i] for stage, draw in zip(net.stages, net.current, strict=True) for i in draw}
    skipped = {name for stage in net.stages for name in stage.names} - drawn
    for path, module in model.named_children():
        inner = module.named_children() if path.startswith("stage") else [("", module)]
        for name, block in inner:
            x = x if f"{path}.{name}" in skipped else block(x)
    return x


@pytest.mark.parametrize("mode", ["keep_all", "recompute", "invert", "invert_layerwise"])
@pytest.mark.parametrize("name", networks())
def test_gradients_of_a_draw(name: str, mode: Any) -> None:
    net = sampled(name)
    net.double()
    model, plain = net.model, copy.deepcopy(net.model)
    plan = edgetrain.uniform_plan(net, mode, input_shape=INPUT, batch_size=BATCH)
    wrapped = edgetrain.wrap(net, plan)
    draws = set()
    for step in range(3):
        draws.add(net.draw(step))
        model.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
        x = torch.randn(BATCH, *INPUT, dtype=torch.double)
        labels = torch.arange(BATCH)
        F.cross_entropy(wrapped(x), labels).backward()
        F.cross_entropy(plain_step(plain, net, x), labels).backward()
        largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
        skipped = 0
        for (path, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), path
            if p.grad is None or q.grad is None:
                skipped += 1
                continue
            error = float((p.grad - q.grad).norm()) / max(float(q.grad.norm()), 1e-4 * largest)
            assert error < BOUND, f"{path}: {error:.1e}"
        assert skipped
        for (path, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=BOUND, atol=1e-12, msg=path)
    assert len(draws) > 1


def step_peak(net: SampledNetwork, wrapped: nn.Module, batch: Tensor, step: int) -> int:
    """Measured peak of one steady step besides what is there when it begins."""
    optimizer = OPTIMIZERS["sgd"](net.parameter_groups())
    labels = torch.zeros(BATCH, dtype=torch.long)
    for parameter in net.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def clear() -> None:
        optimizer.zero_grad(set_to_none=True)
        net.draw(step)

    def run() -> None:
        F.cross_entropy(wrapped(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    clear()
    run()  # kernels and lazily made constants
    return measure_peak(run, setup=clear).allocator_peak_bytes


@pytest.mark.parametrize("name", ["resnet32", "revnet"])
@pytest.mark.parametrize("mode", ["keep_all", "recompute", "invert"])
def test_predicted_peak_is_measured_at_every_draw(name: str, mode: Any) -> None:
    net = sampled(name)
    batch = torch.randn(BATCH, *INPUT)
    plan = edgetrain.uniform_plan(net, mode, input_shape=INPUT, batch_size=BATCH)
    costs = measure_costs(net, input_shape=INPUT, batch_size=BATCH)
    resident = costs.weight_bytes + costs.optimizer_bytes + batch.nbytes
    assert costs.weight_bytes == sum(t.nbytes for t in [*net.model.parameters(), *net.model.buffers()])
    assert costs.optimizer_bytes == sum(p.nbytes for p in net.model.parameters())
    predicted = simulate(plan.program, costs).peak_bytes
    wrapped = edgetrain.wrap(net, plan)
    steps = (0, 1, 2, 3)
    assert len({net.draw(step) for step in steps}) == len(steps)
    assert {step_peak(net, wrapped, batch, step) + resident for step in steps} == {predicted}
    full_plan = edgetrain.uniform_plan(net.model, mode, input_shape=INPUT, batch_size=BATCH)
    full = simulate(full_plan.program, measure_costs(net.model, input_shape=INPUT, batch_size=BATCH))
    assert predicted < full.peak_bytes


def test_planned_and_updated_in_the_backward_pass() -> None:
    """A plan of a draw that updates block by block trains as one optimiser of all parameters does."""
    net, twin = sampled("resnet32"), sampled("resnet32")
    net.double()
    twin.double()
    options: dict[str, Any] = {"input_shape": INPUT, "batch_size": BATCH}

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    plan = edgetrain.uniform_plan(net, "recompute", update_in_backward=True, **options)
    a = edgetrain.wrap(net, plan, optimizer=sgd)
    b = edgetrain.wrap(twin, edgetrain.uniform_plan(twin, "keep_all", **options))
    optimizer = sgd(twin.model.parameters())
    for step in range(4):
        x = torch.randn(BATCH, *INPUT, dtype=torch.double)
        for each, wrapped in ((net, a), (twin, b)):
            each.draw(step)
            F.cross_entropy(wrapped(x), torch.arange(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(net.model.named_parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


def test_planner_takes_a_sampled_network() -> None:
    net = sampled("resnet32")
    full = edgetrain.plan(net.model, input_shape=INPUT, batch_size=BATCH, device="rpi5-4gb")
    plan = edgetrain.plan(net, input_shape=INPUT, batch_size=BATCH, device="rpi5-4gb")
    assert plan.peak_bytes < full.peak_bytes
    net.draw(7)
    assert plan == edgetrain.plan(net, input_shape=INPUT, batch_size=BATCH, device="rpi5-4gb")


def randomised(net: SampledNetwork) -> None:
    """Weights and statistics of no module are those of another, or the ones that a fresh layer has."""
    with torch.no_grad():
        for tensor in [*net.model.parameters(), *net.model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)


def branch_of_cifar(block: Any, x: Tensor) -> Tensor:
    return block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x)))))


def test_scaled_residual_branches() -> None:
    net = sampled("resnet32", (2, 1, 3)).double().eval()
    randomised(net)
    before = copy.deepcopy(net.model.state_dict())
    x = torch.rand(2, 8, 16, 16, dtype=torch.double)
    block: Any = net.model.get_submodule("stage1.3")
    expected = F.relu(x + 2 / 5 * branch_of_cifar(block, x))
    with net.whole() as model:
        torch.testing.assert_close(model.get_submodule("stage1.3")(x), expected, rtol=1e-12, atol=1e-12)
        always, sampled_one = (model.get_submodule(f"stage2.{i}.norm2").weight for i in (0, 1))
        assert torch.equal(always, before["stage2.0.norm2.weight"])
        torch.testing.assert_close(sampled_one, before["stage2.1.norm2.weight"] / 4)
    assert all(torch.equal(value, before[name]) for name, value in net.model.state_dict().items())


@pytest.mark.parametrize("name", ["revnet", "hybrid"])
def test_scaled_reversible_branches(name: str) -> None:
    net = sampled(name, (1, 1)).double().eval()
    randomised(net)
    block: Any = net.model.get_submodule("stage1.1")
    scale = net.stages[0].scale
    x1, x2 = torch.randn(2, 2, 4, 16, 16, dtype=torch.double)
    y1 = x1 + scale * block.f(x2)
    y2 = x2 + scale * block.g(y1)
    with net.whole(), torch.no_grad():
        y = block.forward_(torch.cat([x1, x2], 1))
        torch.testing.assert_close(y, torch.cat([y1, y2], 1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block.inverse(y), torch.cat([x1, x2], 1), rtol=1e-9, atol=1e-9)


def test_recalibrated_statistics_are_means_over_batches_of_the_scaled_network() -> None:
    net = sampled("resnet32").double()
    randomised(net)
    batches = [torch.randn(5, *INPUT, dtype=torch.double) for _ in range(3)]
    moments: dict[str, list[tuple[Tensor, Tensor]]] = {}
    twin = copy.deepcopy(net)

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            moments.setdefault(name, []).append((x.mean((0, 2, 3)), x.var((0, 2, 3))))

        return hook

    norms = {n: m for n, m in twin.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_hook(note(name))
    with twin.whole() as model, torch.no_grad():
        model.train()
        for batch in batches:
            model(batch)
    training = [m.training for m in net.model.modules()]
    net.finish(batches)
    assert [m.training for m in net.model.modules()] == training
    for name, seen in moments.items():
        norm = net.model.get_submodule(name)
        assert norm.momentum == norms[name].momentum
        for k, running in enumerate((norm.running_mean, norm.running_var)):
            torch.testing.assert_close(running, torch.stack([pair[k] for pair in seen]).mean(0), rtol=1e-9, atol=1e-12)
    with pytest.raises(UsageError, match="no batch"):
        net.recalibrate([])


class Pair(nn.Module):
    """A residual module that does not say where its branch ends."""

    def __init__(self, *, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.last(F.relu(self.conv(x)))


def of_pairs(gain: float) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Pair(gain=gain) for _ in range(3)), nn.Flatten())


def test_modules_that_the_user_names() -> None:
    with pytest.raises(ModelError, match="no two equal residual modules"):
        SampledNetwork(of_pairs(1.0), "1/3", input_shape=INPUT)
    net = SampledNetwork(of_pairs(1.0), "1/3", input_shape=INPUT, branch_ends={Pair: ("last",)})
    assert net.stages[0].names == ("1", "2", "3")
    for ends, gain, reason in ((("conv",), 1.0, "not the identity"), (("last",), 2.0, "not the identity")):
        with pytest.raises(ModelError, match=reason):
            SampledNetwork(of_pairs(gain), "1/3", input_shape=INPUT, branch_ends={Pair: ends})
    with pytest.raises(ModelError, match="no layer missing"):
        SampledNetwork(of_pairs(1.0), "1/3", input_shape=INPUT, branch_ends={Pair: ("missing",)})


def test_a_network_that_is_no_sequence() -> None:
    from networks import Residual

    torch.manual_seed(0)
    model = ResNet().double()
    net = SampledNetwork(model, "1/2", input_shape=(3, 8, 8), branch_ends={Residual: ("norm2",)})
    assert net.stages[0].names == ("blocks.0", "blocks.1")
    plan = edgetrain.uniform_plan(net, "recompute", input_shape=(3, 8, 8), batch_size=2)
    wrapped = edgetrain.wrap(net, plan)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    run = set()
    for step in range(8):
        ((index,),) = net.draw(step)
        run.add(index)
        model.zero_grad(set_to_none=True)
        wrapped(x).sum().backward()
        touched = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
        assert touched == [index == 0, index == 1]
    assert run == {0, 1}


@pytest.mark.parametrize("keep", ["0", "2", "x", "1/0", "1,2", "9,1,1", "0,1,1", float("nan"), (1, 2)])
def test_refused_numbers(keep: Any) -> None:
    with pytest.raises(UsageError, match="modules to sample"):
        sampled("resnet32", keep)


def test_models_after_a_pass_and_copies() -> None:
    net = sampled("revnet")
    net(torch.randn(2, *INPUT))
    assert sampled("revnet").stages == SampledNetwork(net.model, "1/2", input_shape=INPUT).stages
    twin = copy.deepcopy(net)
    for step in range(3):
        net.draw(step)
        twin.draw(step)
        for a, b in itertools.zip_longest(net.drawn.modules(), twin.drawn.modules()):
            assert type(a) is type(b)
            assert a is not b
    assert {id(m) for m in twin.members()} <= {id(m) for m in twin.model.modules()}
