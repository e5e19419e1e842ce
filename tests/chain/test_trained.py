"""What is trained: gradients are those of autograd, what is frozen is left alone and stores nothing."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import edgetrain
from edgetrain.chain import parts_of
from edgetrain.chain.head import find_head, replace_head
from edgetrain.chain.trained import fix_batch_norm, train_only
from edgetrain.errors import ModelError, UsageError
from edgetrain.planner import UniformMode
from edgetrain.planner.samples import mixing_layer

SHAPE, BATCH, HEAD = (3, 16, 16), 10, "head.linear"
CHOICES = ("all", "last:3", "last:1", "head", "bias-norm")
MODES: dict[str, tuple[UniformMode, ...]] = {
    "hybrid18": ("keep_all", "invert", "invert_layerwise"),
    "resnet20": ("keep_all", "recompute"),
}


def network(name: str = "hybrid18") -> nn.Module:
    """With scales, and with running statistics that are about those of its activations, as after training."""
    torch.manual_seed(0)
    model = edgetrain.create_model(name, num_classes=5, width=8).train()
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
    model(torch.randn(BATCH, *SHAPE))
    for norm in norms:
        norm.momentum = 0.1
    return model


def chosen(name: str, choice: str, *, fixed: bool) -> nn.Module:
    model = train_only(network(name), choice, head=HEAD)
    return fix_batch_norm(model) if fixed else model


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, *SHAPE, dtype=torch.double), torch.randint(0, 5, (BATCH,))


def assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None) == (not own.requires_grad), name
        if own.grad is not None and other.grad is not None:
            assert (own.grad - other.grad).abs().max() <= 1e-10 * other.grad.abs().max().clamp_min(1e-6), name


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", list(MODES))
def test_gradients_are_those_of_autograd_in_every_mode(name: str, choice: str, fixed: bool) -> None:
    plain = chosen(name, choice, fixed=fixed).double().train()
    before = {key: value.clone() for key, value in plain.named_buffers()}
    x, labels = data()
    F.cross_entropy(plain(x), labels).backward()
    for mode in MODES[name]:
        model = chosen(name, choice, fixed=fixed)
        plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=BATCH)
        model = model.double()
        F.cross_entropy(edgetrain.wrap(model, plan).train()(x), labels).backward()
        assert_same_gradients(model, plain)
        after = dict(model.named_buffers())
        moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert not moved if fixed else moved == {k for k, v in plain.named_buffers() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("choice", ["all", "bias-norm"])
def test_parts_of_a_batch_give_its_gradient_where_batch_norm_is_fixed(choice: str) -> None:
    whole, split = (chosen("hybrid18", choice, fixed=True).double() for _ in range(2))
    x, labels = data()
    F.cross_entropy(whole.train()(x), labels).backward()
    split.train()
    for part in range(0, BATCH, 2):
        loss = F.cross_entropy(split(x[part : part + 2]), labels[part : part + 2])
        (loss * 2 / BATCH).backward()
    assert_same_gradients(split, whole)
    assert mixing_layer(split) is None
    assert mixing_layer(chosen("hybrid18", choice, fixed=False)) is not None


def test_fixed_batch_norm_lets_the_planner_split_a_batch() -> None:
    model = chosen("resnet20", "all", fixed=True)
    planner = edgetrain.planner.Planner(model, input_shape=(3, 64, 64), batch_size=16, device="gtx750")
    assert planner.needed()[1] > 1


@pytest.mark.parametrize(("choice", "sides"), [("all", {16, 8, 4}), ("last:3", {4}), ("head", set())])
def test_stores_nothing_of_what_is_frozen(choice: str, sides: set[int]) -> None:
    seen = set[int]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[0] == BATCH:
            seen.add(tensor.shape[-1])
        return tensor

    model = chosen("resnet20", choice, fixed=False)
    net = edgetrain.wrap(model, edgetrain.uniform_plan(model, "keep_all", input_shape=SHAPE, batch_size=BATCH)).train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        net(data()[0].float())
    assert seen == sides


@pytest.mark.parametrize("choice", ["last:0", "last:100", "last:", "last:-1", "blocks:3", ""])
def test_what_is_no_choice(choice: str) -> None:
    with pytest.raises(UsageError, match="--train"):
        train_only(network("resnet20"), choice, head=HEAD)


def test_the_last_blocks_are_counted_from_the_head() -> None:
    model = chosen("resnet20", "last:1", fixed=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "head.linear.weight",
        "head.linear.bias",
    }
    everything = chosen("resnet20", f"last:{len(parts_of(model))}", fixed=False)
    assert all(p.requires_grad for p in everything.parameters())


class Gated(nn.Module):
    """A head registered before the gate that runs before it, and an auxiliary output that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 7)
        self.stem = nn.Conv2d(3, 4, 3)
        self.gate = nn.Linear(4, 4)
        self.auxiliary = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.stem(x).mean((2, 3))
        return self.classifier(pooled * self.gate(pooled).sigmoid())


def test_the_head_is_the_last_layer_that_makes_the_logits() -> None:
    squeeze = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for model, name in ((Gated(), "classifier"), (squeeze, "2"), (network(), HEAD), (nn.Linear(3, 2), "")):
        shape = SHAPE if name else (3,)
        model.train()
        before = copy.deepcopy(model.state_dict())
        assert find_head(model, shape) == name  # type: ignore[arg-type]
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        other = replace_head(model, name, 3)
        assert other.eval()(torch.randn(2, *shape)).shape == (2, 3)


def test_only_the_head_is_replaced() -> None:
    model = network("resnet20")
    before = copy.deepcopy(model.state_dict())
    after = replace_head(model, HEAD, 3).state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {f"{HEAD}.weight", f"{HEAD}.bias"}


def test_networks_whose_head_cannot_be_replaced() -> None:
    with pytest.raises(ModelError, match="no linear layer or 1x1 convolution that gives the 12 outputs"):
        find_head(nn.Sequential(nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), SHAPE)
    with pytest.raises(ModelError, match="one tensor"):
        find_head(nn.Conv2d(3, 2, 1), SHAPE)
    with pytest.raises(ModelError, match="fails on a sample of 1x16x16"):
        find_head(network(), (1, 16, 16))
    with pytest.raises(ModelError, match="which is no linear layer"):
        replace_head(network(), "stem", 3)
