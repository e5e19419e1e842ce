"""The order of the elements under the two poolings, (3.29), written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgetrain.nn import BatchPool, ChannelPool


def test_channel_pool_order() -> None:
    x = torch.randn(2, 3, 4, 6)
    y = ChannelPool()(x)
    assert y.shape == (2, 12, 2, 3)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert torch.equal(y[:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])


def test_batch_pool_order() -> None:
    x = torch.randn(2, 3, 4, 6)
    y = BatchPool()(x)
    assert y.shape == (8, 3, 2, 3)
    for n in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(y[4 * n + 2 * i + j], x[n, :, i::2, j::2])


def test_a_convolution_of_batch_pooled_parts_is_a_dilated_one() -> None:
    x, weight = (torch.randn(*shape, dtype=torch.double) for shape in ((2, 3, 8, 12), (5, 3, 3, 3)))
    y = F.conv2d(BatchPool()(x), weight, padding=1)
    torch.testing.assert_close(y, BatchPool()(F.conv2d(x, weight, padding=2, dilation=2)))


@pytest.mark.parametrize("pool", [ChannelPool(), BatchPool()])
@pytest.mark.parametrize("size", [(2, 2), (2, 4), (4, 2), (4, 4)])
def test_in_place_equals_out_of_place_down_to_a_single_pixel(
    pool: ChannelPool | BatchPool, size: tuple[int, int]
) -> None:
    x = torch.randn(3, 2, *size)
    y = pool.forward_(x.clone())
    assert torch.equal(y, pool(x))
    assert torch.equal(pool.inverse_(y.clone()), x)
