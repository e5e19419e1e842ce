"""Products whose result is given, against plain autograd in float64; what is kept of a block, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.nn.products import product_of
from edgetrain.nn.selective import Products
from edgetrain.nn.slices import SLICE_BYTES

BOUND = 1e-10
Call = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], dict[str, object]]

CALLS: dict[str, Call] = {
    "conv1d": (F.conv1d, ((2, 3, 9), (4, 3, 3), (4,)), {"stride": 2, "padding": 1}),
    "conv2d": (F.conv2d, ((2, 3, 8, 7), (4, 3, 3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": 2}),
    "grouped": (F.conv2d, ((2, 4, 6, 6), (6, 2, 3, 3), (6,)), {"groups": 2, "padding": [1]}),
    "depthwise": (F.conv2d, ((2, 4, 6, 6), (4, 1, 5, 5)), {"groups": 4, "padding": 2}),
    "same": (F.conv2d, ((2, 3, 6, 5), (4, 3, 4, 3), (4,)), {"padding": "same"}),
    "same, dilated": (F.conv2d, ((2, 3, 7, 6), (4, 3, 2, 4)), {"padding": "same", "dilation": (3, 1)}),
    "valid": (F.conv2d, ((2, 3, 6, 5), (4, 3, 4, 3), (4,)), {"padding": "valid"}),
    "conv3d": (F.conv3d, ((2, 2, 4, 5, 6), (3, 2, 2, 3, 3), (3,)), {"padding": (0, 1, 1)}),
    "transposed": (
        F.conv_transpose2d,
        ((2, 4, 5, 5), (4, 3, 3, 3), (6,)),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    ),
    "linear": (F.linear, ((3, 5), (4, 5), (4,)), {}),
    "linear on tokens": (F.linear, ((2, 3, 5), (4, 5)), {}),
    "matmul": (torch.matmul, ((3, 5), (5, 4)), {}),
    "matmul, folded": (Tensor.matmul, ((2, 3, 5), (5, 4)), {}),
    "matmul, broadcast": (Tensor.__matmul__, ((2, 1, 3, 5), (4, 5, 2)), {}),
    "bmm": (torch.bmm, ((2, 3, 5), (2, 5, 4)), {}),
    "addmm": (torch.addmm, ((4,), (3, 5), (5, 4)), {"alpha": 2.0, "beta": 0.5}),
    "baddbmm": (Tensor.baddbmm, ((2, 1, 4), (2, 3, 5), (2, 5, 4)), {}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_a_given_result(name: str) -> None:
    function, shapes, options = CALLS[name]
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    expected = function(*tensors, **options)
    product = product_of(function, tuple(tensors), options)
    assert product is not None
    given = expected.detach().clone()
    actual = product.under_autograd(given)
    assert actual.data_ptr() == given.data_ptr(), "nothing is computed"
    dy = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(actual, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("name", ["conv2d", "linear", "matmul"])
def test_frozen_factors(name: str, frozen: int) -> None:
    function, shapes, options = CALLS[name]
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=k != frozen) for k, shape in enumerate(shapes)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    expected = function(*tensors, **options)
    product = product_of(function, tuple(tensors), options)
    assert product is not None
    actual = product.under_autograd(expected.detach())
    for a, b in zip(
        torch.autograd.grad(actual.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)


def test_a_convolution_of_several_slices() -> None:
    side = 64
    x = torch.randn(3 * SLICE_BYTES // (8 * 8 * side * side), 8, side, side, dtype=torch.double, requires_grad=True)
    weight = torch.randn(8, 8, 3, 3, dtype=torch.double, requires_grad=True)
    expected = F.conv2d(x, weight, padding=1)
    product = product_of(F.conv2d, (x, weight), {"padding": 1})
    assert product is not None
    dy = torch.randn_like(expected)
    found = torch.autograd.grad(product.under_autograd(expected.detach()), (x, weight), dy)
    for a, b in zip(found, torch.autograd.grad(expected, (x, weight), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=BOUND, atol=1e-8)


def test_what_is_no_product_of_this_kind() -> None:
    x, weight = torch.randn(3, 6, 6), torch.randn(4, 3, 3, 3)
    assert product_of(F.conv2d, (x, weight), {}) is None, "a sample without a batch"
    assert product_of(torch.relu, (x,), {}) is None
    assert product_of(torch.mm, (torch.ones(2, 2), torch.ones(2, 2)), {"out": torch.empty(2, 2)}) is None
    whole = torch.ones(2, 2, dtype=torch.long)
    assert product_of(torch.mm, (whole, whole), {}) is None
    assert product_of(torch.matmul, (torch.ones(2), torch.ones(2)), {}) is None


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    products = Products()
    with torch.no_grad(), products.keeping():
        y = module(x)
    products.choose()
    del y
    return sum(kept.result.untyped_storage().nbytes() for kept in products._kept if kept.result is not None)


def test_a_result_that_is_overwritten_is_not_kept() -> None:
    x, size = torch.randn(2, 8, 6, 6), 4 * 2 * 8 * 6 * 6
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    assert kept_bytes(nn.Sequential(first, nn.ReLU(), second), x) == 2 * size
    assert kept_bytes(nn.Sequential(first, nn.ReLU(inplace=True), second), x) == size
    assert kept_bytes(nn.Sequential(first, nn.Flatten(), nn.Hardswish(inplace=True)), x) == 0


def test_a_result_that_is_cheap_for_its_size_is_not_kept() -> None:
    """A bottleneck: 4w, 9w and w multiplications for each element, of w, w and 4w channels; the mean is 17w/6."""
    w, pixels = 128, 2 * 4 * 4
    bottleneck = nn.Sequential(
        nn.Conv2d(4 * w, w, 1), nn.BatchNorm2d(w), nn.Conv2d(w, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, 4 * w, 1)
    )
    assert kept_bytes(bottleneck, torch.randn(2, 4 * w, 4, 4)) == 4 * pixels * 2 * w
    narrow = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 16, 1))
    assert kept_bytes(narrow, torch.randn(2, 8, 4, 4)) == 4 * pixels * (4 + 16), "of a few channels, all take as long"


def test_another_course_of_the_second_pass_computes() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.first = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), 0

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[self.first :]:
                x = torch.tanh(layer(torch.cat([x, x]) if self.first else x))
            return x

    module, x = Changing().double(), torch.randn(2, 4, dtype=torch.double)
    products = Products()
    with torch.no_grad(), products.keeping():
        module(x)
    module.first = 1
    with products.taking():
        y = module(x)
    assert torch.equal(y, module(x))
