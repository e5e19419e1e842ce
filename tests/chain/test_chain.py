"""Cutting models into chains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.chain import chain_of
from edgetrain.errors import ModelError


def test_nested_containers_are_opened_and_in_place_activations_joined() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(4, 2)
    )
    assert [block.name for block in chain_of(model).blocks] == ["0.0", "0.1+2", "1", "2"]


def test_a_module_that_is_no_container_is_one_block() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert [block.name for block in chain_of(Own()).blocks] == [""]


def test_a_container_with_hooks_stays_closed() -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity(), nn.Identity()))
    model[0].register_forward_hook(lambda *_: None)
    assert [block.name for block in chain_of(model).blocks] == ["0"]


def test_refusals_carry_their_reason() -> None:
    blocks = {block.name: block for block in chain_of(edgetrain.create_model("revnet18")).blocks}
    assert blocks["stem"].refusals["invert"] == "Conv2d has no inverse"
    assert blocks["stage1.0"].allows("invert")
    assert "must be held" in blocks["stage1.0"].refusals["invert_layerwise"]
    assert all(block.allows("store") and block.allows("recompute") for block in blocks.values())


def test_shapes_without_computing_or_changing_anything() -> None:
    model = edgetrain.create_model("hybrid18", width=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = chain_of(model).shapes((2**20, 3, 32, 32))
    assert shapes[0] == (2**20, 3, 32, 32)
    assert shapes[-1] == (2**20, 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.saved is None for m in model.modules() if isinstance(m, edgetrain.nn.InvertibleBatchNorm))


def test_what_cannot_be_a_chain() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(ModelError, match="gives tuple"):
        chain_of(nn.Sequential(Two())).shapes((1, 3, 4, 4))
    with pytest.raises(ModelError, match="without blocks"):
        chain_of(nn.Sequential())
