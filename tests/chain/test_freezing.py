"""Frozen leading blocks: nothing of them changes, nothing is stored for them, and what a step takes is predicted."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import edgetrain
from edgetrain.chain import SampledNetwork, chain_of
from edgetrain.cli.main import run
from edgetrain.errors import ModelError, UsageError
from edgetrain.memory import measure_costs, predicted_times
from edgetrain.memory.measure import measure_peak
from edgetrain.memory.rates import OperatorRates
from edgetrain.planner import Plan, Planner

RATES = OperatorRates({64: 5e10}, 1e10, 6e9, 5e-6, 0.0, "round numbers")
SHAPE, BATCH = (3, 32, 32), 12
FROZEN = 6
"""Blocks of :func:`network`: those at the full resolution and the pooling that ends it."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.Dropout(0.5), nn.MaxPool2d(2)]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def planner(model: nn.Module) -> Planner:
    times = predicted_times(measure_costs(model, input_shape=SHAPE, batch_size=BATCH), RATES)
    return Planner(model, input_shape=SHAPE, batch_size=BATCH, times=times)


def plan_at(model: nn.Module, place: float) -> Plan:
    """``place``: of the budget between the leanest plan, 0, and keeping everything, 1."""
    found = planner(model)
    least, most = found.least().peak_bytes, found.plan().peak_bytes
    return found.plan(round(least + place * (most - least)))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_trains_the_rest_as_autograd_does_and_changes_nothing_below(place: float) -> None:
    model = edgetrain.freeze(network(), FROZEN)
    plan = plan_at(model, place)
    plain, planned = copy.deepcopy(model).double().train(), copy.deepcopy(model).double()
    before = {name: value.clone() for name, value in planned.state_dict().items()}
    x, labels = torch.randn(BATCH, *SHAPE, dtype=torch.double), torch.randint(0, 10, (BATCH,))
    F.cross_entropy(plain(x), labels).backward()
    F.cross_entropy(edgetrain.wrap(planned, plan).train()(x), labels).backward()
    for (name, own), other in zip(planned.named_parameters(), plain.parameters(), strict=True):
        if int(name.partition(".")[0]) < FROZEN:
            assert own.grad is None
            continue
        assert own.grad is not None
        assert other.grad is not None
        assert (own.grad - other.grad).abs().max() <= 1e-10 * other.grad.abs().max().clamp_min(1e-6), name
    changed = {name for name, value in planned.state_dict().items() if not torch.equal(value, before[name])}
    norms = [i for i, layer in enumerate(planned) if isinstance(layer, nn.BatchNorm2d) and i >= FROZEN]
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{i}.{kind}" for i in norms for kind in kinds}


def test_stores_nothing_of_frozen_blocks() -> None:
    """No tensor at their resolution is saved; without freezing, many are."""

    def sides(model: nn.Module) -> set[int]:
        seen = set[int]()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 4 and tensor.shape[0] == BATCH:
                seen.add(tensor.shape[-1])
            return tensor

        net = edgetrain.wrap(model, plan_at(model, 1.0))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.randn(BATCH, *SHAPE))
        return seen

    assert 32 in sides(network())
    assert sides(edgetrain.freeze(network(), FROZEN)) == {16}


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_the_predicted_peak_is_the_measured_one(place: float) -> None:
    model = edgetrain.freeze(network(), FROZEN)
    plan = plan_at(model, place)
    net = edgetrain.wrap(model, plan).train()
    x, labels = torch.randn(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.long)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, fused=True)

    def step() -> None:
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = measure_peak(step, setup=step).allocator_peak_bytes
    state = sum(p.nbytes for p in trained)
    resident = state + x.nbytes + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert 0.995 <= plan.peak_bytes / (measured + resident) <= 1.01  # what is asked of every prediction
    assert measured < planner(network()).least().peak_bytes - resident


def test_stays_in_evaluation_mode_in_copies_and_files() -> None:
    model = edgetrain.freeze(network(), FROZEN)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()
        modes = [layer.training for layer in other]
        assert modes == [False] * FROZEN + [True] * (len(other) - FROZEN)


def test_parameters_that_somebody_else_froze_count_as_well() -> None:
    model = network()
    for layer in model[:4]:
        layer.requires_grad_(False)
    blocks = chain_of(model).blocks
    assert blocks[0].name == "0..6"
    assert len(blocks) == len(chain_of(network()).blocks) - 6


def test_a_plan_for_frozen_blocks_is_refused_by_a_model_without() -> None:
    plan = plan_at(edgetrain.freeze(network(), FROZEN), 1.0)
    with pytest.raises(ModelError, match=r"0\.\.6"):
        edgetrain.wrap(network(), plan)


@pytest.mark.parametrize("blocks", [-1, 18, 100])
def test_something_must_be_left_to_train(blocks: int) -> None:
    model = network()
    with pytest.raises(UsageError, match="frozen blocks"):
        edgetrain.freeze(model, blocks)
    assert all(p.requires_grad for p in model.parameters())


def test_trains_from_the_command_line(tmp_path: Path) -> None:
    options = [
        "--model",
        "resnet20",
        "--limit-train",
        "64",
        "--limit-test",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "16",
    ]
    assert run(["train", "--data", "digits", *options, "--freeze", "5", "--quiet", "--out", str(tmp_path)]) == 0
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert ".." in plan.program.names[0]
    state = load_file(tmp_path / "checkpoints" / "last.safetensors")
    steps = [int(value) for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert set(steps) == {0, 4}


def test_weights_that_a_later_block_has_too_are_trained() -> None:
    twice = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), twice, nn.ReLU(), twice, nn.Linear(4, 2))
    edgetrain.freeze(model, 2)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in twice.parameters())


def test_recalibration_of_a_sampled_network_leaves_frozen_batch_norm_alone() -> None:
    model = edgetrain.create_model("resnet32", width=4, num_classes=3)
    edgetrain.freeze(model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    sampled = SampledNetwork(model, "1/2", input_shape=(3, 16, 16))
    sampled.recalibrate([torch.randn(4, 3, 16, 16) + 1])
    moved = {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}
    assert moved == {name for name in before if not name.startswith(("stem.", "stage1.0."))}
