"""What a second pass leaves out: gradients bit for bit those of one that computes everything, and what still runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgetrain.nn.invertible import Rerun
from edgetrain.nn.liveness import Course, OtherCallsError, run, took_another
from edgetrain.nn.replay import Replay


class Written(nn.Module):
    """A module around a function of its layers and its input."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, bias=False)


def norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def bottleneck(in_place: bool) -> nn.Module:
    def run(x: Tensor, c1: nn.Module, n1: nn.Module, c2: nn.Module, n2: nn.Module) -> Tensor:
        h = n2(c2(F.relu(n1(c1(x)), inplace=in_place)))
        if in_place:
            h += x
        else:
            h = h + x
        return F.relu(h, inplace=in_place)

    return Written(run, conv(), norm(), conv(), norm())


def projected(x: Tensor, c1: nn.Module, n1: nn.Module, c2: nn.Module, n2: nn.Module) -> Tensor:
    return torch.relu(n1(c1(x)) + n2(c2(x)))


def inverted_residual(x: Tensor, c1: nn.Module, n1: nn.Module, c2: nn.Module, n2: nn.Module) -> Tensor:
    return x + n2(c2(F.relu6(n1(c1(x)), inplace=True)))


def dense(x: Tensor, n1: nn.Module, c1: nn.Module, n2: nn.Module, c2: nn.Module) -> Tensor:
    return torch.cat([x, c2(F.relu(n2(c1(F.relu(n1(x)))), inplace=True))], 1)


def inception(x: Tensor, c1: nn.Module, n1: nn.Module, c2: nn.Module, n2: nn.Module) -> Tensor:
    return torch.cat([F.relu(n1(c1(x)), inplace=True), F.relu(n2(c2(x)), inplace=True), F.max_pool2d(x, 3, 1, 1)], 1)


def read_twice(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    h = n1(c1(x))
    return F.relu(h) + h * h.mean()


def in_place_without_assignment(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    h = n1(c1(x))
    F.relu(h, inplace=True)
    return h + x


def a_view_is_overwritten(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    h = n1(c1(x))
    F.relu_(h[:, :2])
    return h + x


def overwritten_after_an_activation(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    h = n1(c1(x))
    r = F.relu(h)
    h.add_(x)
    return r + h


def sum_of_scaled(x: Tensor, c1: nn.Module, c2: nn.Module) -> Tensor:
    return torch.add(c1(x), c2(x), alpha=2)


def broadcast(x: Tensor, c1: nn.Module, c2: nn.Module) -> Tensor:
    return c1(x) + c2(x)[:1]


CASES: dict[str, tuple[Callable[[], nn.Module], Counter[str], Counter[str]]] = {
    # what runs without the output, and what with it; an activation alone is not left out
    "bottleneck": (
        lambda: bottleneck(False),
        Counter(convolution=2, native_batch_norm=2, relu=2, add=1),
        Counter(convolution=2, native_batch_norm=1, relu=1),
    ),
    "bottleneck in place": (
        lambda: bottleneck(True),
        Counter(convolution=2, native_batch_norm=2, relu_=2, add_=1),
        Counter(convolution=2, native_batch_norm=1, relu_=1),
    ),
    "projected": (
        lambda: Written(projected, conv(), norm(), conv(), norm()),
        Counter(convolution=2, native_batch_norm=2, relu=1, add=1),
        Counter(convolution=2),
    ),
    "inverted residual": (
        lambda: Written(inverted_residual, conv(), norm(), conv(), norm()),
        *[Counter(convolution=2, native_batch_norm=1, hardtanh_=1)] * 2,
    ),
    "dense": (
        lambda: Written(dense, norm(), conv(), norm(), conv()),
        *[Counter(convolution=1, native_batch_norm=2, relu=1, relu_=1)] * 2,
    ),
    "inception": (
        lambda: Written(inception, conv(), norm(), conv(), norm()),
        Counter(convolution=2, native_batch_norm=2),
        Counter(convolution=2),
    ),
    "convolution": (lambda: Written(lambda x, c: c(x), conv()), Counter(), Counter()),
    "convolution, relu": (
        lambda: nn.Sequential(conv(), nn.ReLU(inplace=True)),
        Counter(convolution=1, relu_=1),
        Counter(),
    ),
    "leaky": (lambda: nn.Sequential(conv(), nn.LeakyReLU(0.1)), Counter(convolution=1), Counter()),
    "falling": (lambda: nn.Sequential(conv(), nn.LeakyReLU(-0.1)), *[Counter(convolution=1)] * 2),
    "hardtanh": (
        lambda: nn.Sequential(conv(), nn.Hardtanh(-0.2, 0.3, inplace=True)),
        Counter(convolution=1, hardtanh_=1),
        Counter(),
    ),
    "silu": (lambda: nn.Sequential(conv(), nn.SiLU()), *[Counter(convolution=1)] * 2),
    "hardswish": (lambda: nn.Sequential(conv(), nn.Hardswish(inplace=True)), *[Counter(convolution=1)] * 2),
    "gelu": (lambda: nn.Sequential(conv(), nn.GELU("tanh")), *[Counter(convolution=1)] * 2),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)), *[Counter(linear=1, relu=1)] * 2),
    "read twice": (
        lambda: Written(read_twice, conv(), norm()),
        *[Counter(convolution=1, native_batch_norm=1, mul=1, mean=1, relu=1)] * 2,
    ),
    "a view is overwritten": (
        lambda: Written(a_view_is_overwritten, conv(), norm()),
        *[Counter(convolution=1, native_batch_norm=1, relu_=1)] * 2,
    ),
    "sum of scaled": (lambda: Written(sum_of_scaled, conv(), conv()), *[Counter(convolution=2, add=1)] * 2),
    "broadcast": (lambda: Written(broadcast, conv(), conv()), *[Counter(convolution=2, add=1)] * 2),
}
COUNTED = ("convolution", "native_batch_norm", "relu", "relu_", "hardtanh_", "add", "add_", "linear", "mul", "mean")


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        name = {"addmm": "linear"}.get(name, name)
        if name in COUNTED and args[0].is_floating_point():
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def recorded(module: nn.Module, x: Tensor) -> tuple[Replay, Course, Tensor]:
    replay, courses = Replay(module, x.device), list[Course]()

    def first() -> Tensor:
        y, course = run(module, x)
        courses.append(course)
        return y

    y = replay.first(first)
    return replay, courses[0], y


def again(module: nn.Module, x: Tensor, replay: Replay, course: Course, output: Tensor | None) -> Rerun:
    return Rerun(module, x, replay=replay, skipping=course.skipping(output, replay.next_statistics, lambda: None))


def gradients(
    module: nn.Module, x: Tensor, dy: Tensor, replay: Replay, course: Course, output: Tensor | None
) -> tuple[list[Tensor], Counter[str]]:
    module.zero_grad()
    with Counting() as counting:
        rerun = again(module, x, replay, course, output)
    dx = rerun.backward(dy)
    assert dx is not None
    return [dx, *(p.grad for p in module.parameters() if p.grad is not None)], counting.names


def pair_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = CASES[name][0]().double()
    return module, torch.randn(3, 6, dtype=torch.double) if name == "linear" else torch.randn(3, 4, 6, 5).double()


@pytest.mark.parametrize("output_known", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_what_runs(name: str, output_known: bool) -> None:
    module, x = pair_of(name)
    replay, course, y = recorded(module, x)
    dy = torch.randn_like(y)
    expected, _ = gradients(module, x, dy, replay, Course(), None)
    kept = y.clone()
    found, names = gradients(module, x, dy, replay, course, y if output_known else None)
    assert names == CASES[name][1 + output_known]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(y, kept)
    assert course.gains_by_output == (CASES[name][1] != CASES[name][2])


def test_dead_products() -> None:
    for name, dead in (("dense", (False, True)), ("bottleneck", (False, False)), ("convolution, relu", (True,))):
        module, x = pair_of(name)
        assert recorded(module, x)[1].dead_products == dead


class Saving(torch.autograd.Function):
    """Saves what it has computed with an operator that is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class Gating(torch.autograd.Function):
    """Saves an input that no operator reads."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy * ctx.saved_tensors[0]


def other_when_training(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    y = n1(c1(x))
    return torch.tanh(y) if torch.is_grad_enabled() else torch.relu(y)


OTHERS: dict[str, Callable[..., Tensor]] = {
    "saves its output": lambda x, c, n: Saving.apply(n(c(x))),
    "saves its input": lambda x, c, n: Gating.apply(n(c(x)), x) + x,
    "saves its input at the end": lambda x, c, n: (Gating.apply(n(c(x)), x), n(x) + x)[1],
    "calls another operator": other_when_training,
    "calls more": lambda x, c, n: n(c(x)) + x + x if torch.is_grad_enabled() else n(c(x)) + x,
    "forgets what an operator in place gave": in_place_without_assignment,
    "overwrites what was an operand": overwritten_after_an_activation,
    "ends in place": lambda *all_: ends_in_place(*all_),
    "ends with a layer in place": lambda *all_: ends_with_a_layer_in_place(*all_),
    "concatenates in another order": lambda *all_: other_order(*all_),
    "takes other tensors": lambda x, c, n: n(c(x)) + x if torch.is_grad_enabled() else x + n(c(x)),
}


def ends_in_place(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    h = n1(c1(x))
    h.add_(x)
    return h


def ends_with_a_layer_in_place(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    h = n1(c1(x))
    F.relu(h, inplace=True)
    return h


def other_order(x: Tensor, c1: nn.Module, n1: nn.Module) -> Tensor:
    a, b = F.relu(n1(c1(x))), F.relu(x + 1)
    return torch.cat([a, b] if torch.is_grad_enabled() else [b, a], 1)


@pytest.mark.parametrize("name", OTHERS)
def test_another_second_pass_is_noticed(name: str) -> None:
    module = Written(OTHERS[name], conv(), norm())
    x = torch.randn(3, 4, 6, 5)
    replay, course, y = recorded(module, x)
    with pytest.raises(OtherCallsError):
        again(module, x, replay, course, y)


def test_what_is_called_in_another_form_is_computed() -> None:
    """A result of an operator that is not known here, overwritten after ReLU has read it."""

    def pooled(x: Tensor) -> Tensor:
        h = F.avg_pool2d(x, 3, 1, 1)
        r = F.relu(h)
        h.mul_(2)
        return torch.cat([r, h], 1)

    module, x = Written(pooled), torch.randn(3, 4, 6, 5).double()
    replay, course, y = recorded(module, x)
    expected, found = (again(module, x, replay, c, None).backward(torch.ones_like(y)) for c in (Course(), course))
    assert torch.equal(expected, found)


def test_limits_that_a_type_cannot_hold() -> None:
    layer, x = nn.Hardtanh(-0.1, 0.1), torch.randn(3, 4, 6, 5).bfloat16()
    replay, course, y = recorded(layer, x)
    expected, found = (again(layer, x, replay, c, y).backward(torch.ones_like(y)) for c in (Course(), course))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_common_blocks_are_no_others(pre_norm: bool) -> None:
    """Properties are read in passing (``is_nested``, ``mT``)."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=pre_norm, dropout=0.0)
    around = Written(lambda x, inner: inner(x) + (x @ x.mT) @ x, layer)
    for module in (layer, around):
        x = torch.randn(2, 5, 16)
        replay, course, y = recorded(module, x)
        assert again(module, x, replay, course, y).backward(torch.ones_like(y)) is not None


def test_modules_with_hooks_compute_everything() -> None:
    module, x = pair_of("dense")
    module.layers[0].register_forward_hook(lambda *_: None)
    assert recorded(module, x)[1] == Course()


def test_after_two_failures_nothing_is_skipped() -> None:
    module, x = Written(ends_in_place, conv(), norm()), torch.randn(3, 4, 6, 5)
    for _ in range(2):
        course = recorded(module, x)[1]
        assert course != Course()
        assert recorded(module, x)[1] is course, "a pass is watched once"
        took_another(module, course)
    assert recorded(module, x)[1] == Course()
