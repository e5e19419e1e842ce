"""The modes on a CUDA device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import edgetrain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["selective", "recompute", "invert", "invert_selective", "invert_layerwise"])
@pytest.mark.parametrize("name", ["hybrid18", "irevnet18", "resnet20"])
def test_gradients_on_cuda(name: str, mode: Any) -> None:
    torch.manual_seed(0)
    model = edgetrain.create_model(name, width=8).double().cuda()
    plain = copy.deepcopy(model)
    x, labels = torch.randn(4, 3, 16, 16).double().cuda(), torch.tensor([1, 2, 3, 4]).cuda()
    plan = edgetrain.uniform_plan(model, mode, input_shape=(3, 16, 16), batch_size=4)
    F.cross_entropy(edgetrain.wrap(model, plan)(x), labels).backward()
    F.cross_entropy(plain(x), labels).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-10  # type: ignore[operator, union-attr]
    for b, c in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12)


def test_peak_on_cuda() -> None:
    from edgetrain.memory import measure_peak

    model = edgetrain.create_model("hybrid18").cuda()
    plan = edgetrain.uniform_plan(model, "invert_layerwise", input_shape=(3, 32, 32), batch_size=512)
    net = edgetrain.wrap(model, plan)
    x, labels = torch.randn(512, 3, 32, 32, device="cuda"), torch.zeros(512, dtype=torch.long, device="cuda")

    def step() -> None:
        F.cross_entropy(net(x), labels).backward()

    step()
    assert measure_peak(step, device="cuda").allocator_peak_bytes / (512 * 1024) <= 420
