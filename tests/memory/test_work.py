"""Work of operators against torch's own counter and against sizes counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import edgetrain
from edgetrain.chain.fakes import fake_mode
from edgetrain.memory import measure_costs, trace_step
from edgetrain.memory.trace import Recorder
from edgetrain.memory.work import Work, work_of
from edgetrain.nn.slices import SLICE_BYTES, abridged_slices, batch_slices


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False),
        nn.Conv2d(6, 4, (1, 3), dilation=2, padding=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), torch.zeros(x.shape[0], dtype=torch.long)).backward()
    return counter.get_total_flops()


def traced(model: nn.Module, shape: tuple[int, ...]) -> int:
    trace = trace_step(model, input_shape=shape[1:], batch_size=shape[0], optimizer=None)
    return sum(work.flops * work.calls for work in work_of(trace.calls))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (convolutional, (5, 3, 12, 12)),
        (lambda: edgetrain.create_model("resnet20"), (4, 3, 32, 32)),
    ],
    ids=["convolutions", "resnet20"],
)
def test_as_many_operations_as_torch_counts(make, shape):
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    model(x)
    assert traced(model, shape) == counted(model, x)


def test_groups_and_the_mask_of_gradients():
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False)
    (work,) = (w for w in recorded(lambda: conv(torch.empty(2, 8, 6, 6)), conv) if w.flops)
    forward = 2 * 2 * 12 * 6 * 6 * (8 // 4) * 9
    assert (work.flops, work.channels) == (forward, round((2 * 3) ** 0.5))

    def backward(*mask: bool) -> list[int]:
        def run() -> None:
            dy, x, weight = torch.empty(2, 12, 6, 6), torch.empty(2, 8, 6, 6), torch.empty(12, 2, 3, 3)
            torch.ops.aten.convolution_backward(
                dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 4, [*mask, False]
            )

        return [w.flops for w in recorded(run)]

    assert backward(True, True) == [2 * forward]
    assert backward(True, False) == backward(False, True) == [forward]


def test_attention():
    shapes = (2, 4, 10, 16), (2, 4, 12, 16), (2, 4, 12, 16)

    def run() -> None:
        queries, keys, values = (torch.empty(shape).requires_grad_() for shape in shapes)
        with torch.enable_grad():
            F.scaled_dot_product_attention(queries, keys, values).sum().backward()

    forward, backward = (work.flops for work in recorded(run) if work.flops)
    # torch's counter knows the formula, but not the operator of the CPU
    assert forward == sdpa_flop_count(*shapes)
    assert backward == sdpa_backward_flop_count(shapes[0], *shapes)


def test_bytes_are_those_read_and_written():
    n, item = 1000, 4

    def run() -> None:
        x, row = torch.empty(n), torch.empty(1)
        y = x + row.expand(n)  # the row is read once
        y.view(10, 100).t()
        y.add_(x)
        y.zero_()
        torch.empty(n).copy_(y)

    moved = [work.moved_bytes for work in recorded(run) for _ in range(work.calls)]
    assert sorted(moved) == sorted([2 * n * item + item, 3 * n * item, n * item, 2 * n * item])


def test_an_optimiser_moves_what_it_changes():
    costs = measure_costs(nn.Linear(100, 50, bias=False), input_shape=(100,), batch_size=2, measured=False)
    (work,) = costs.blocks[0].effects["update", None, None].work
    # weights, gradients and momentum are read; torch says of all three that they may be written
    assert work.moved_bytes == 6 * 100 * 50 * 4


def test_a_slice_that_stands_for_many_counts_as_many():
    samples = 9

    def run() -> None:
        x = torch.empty(samples, SLICE_BYTES // 4)
        for s in batch_slices(x):
            torch.empty(x[s].shape).mul_(2)

    plain = recorded(run)
    with abridged_slices():
        abridged = recorded(run)
    assert plain == abridged == (Work(0, 2 * SLICE_BYTES, 0, samples),)


def recorded(run, model: nn.Module | None = None) -> tuple[Work, ...]:
    """Work of ``run`` under fake tensors."""
    recorder = Recorder()
    with fake_mode():
        if model is not None:
            for name, parameter in model.named_parameters():
                model._parameters[name] = nn.Parameter(torch.empty(parameter.shape))
        with recorder, torch.no_grad():
            run()
    return work_of(recorder.finish().calls)
