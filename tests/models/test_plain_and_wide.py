"""DiracNet, plain chains, VGG and wide residual networks: the source's tables of parameters, arguments, names."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.errors import UsageError
from edgetrain.models import imagenet_diracnet
from edgetrain.nn import DiracParametrization, DiracProjection


def parameters(name: str, num_classes: int = 10, **options: Any) -> int:
    with torch.device("meta"):
        model = edgetrain.create_model(name, num_classes, **options)
    return sum(p.numel() for p in model.parameters())


# Zagoruyko, thesis: Tables 5.4 and 5.5 (wrn), 5.10 (diracnet, vgg), 5.11 (ImageNet), Table 6.1's wrn-16-1, 16-2, 40-1;
# in millions, as printed
PRINTED = [
    ("wrn-16-1", 10, "0.2"),
    ("wrn-16-2", 10, "0.7"),
    ("wrn-40-1", 10, "0.6"),
    ("wrn-40-2", 10, "2.2"),
    ("wrn-16-4", 10, "2.7"),
    ("wrn-40-4", 10, "8.9"),
    ("wrn-40-8", 10, "35.7"),
    ("wrn-28-10", 10, "36.5"),
    ("wrn-28-12", 10, "52.5"),
    ("wrn-22-8", 10, "17.2"),
    ("wrn-22-10", 10, "26.8"),
    ("wrn-16-8", 10, "11.0"),
    ("wrn-16-10", 10, "17.1"),
    ("diracnet-28-5", 10, "9.1"),
    ("diracnet-28-10", 10, "36.5"),
    ("diracnet-18", 1000, "11.7"),
    ("diracnet-34", 1000, "21.8"),
    ("vgg16", 10, "20"),
]


@pytest.mark.parametrize(("name", "classes", "millions"), PRINTED)
def test_parameters_as_printed(name: str, classes: int, millions: str) -> None:
    digits = len(millions.partition(".")[2])
    assert f"{parameters(name, classes) / 1e6:.{digits}f}" == millions


def test_vgg_of_imagenet_as_printed() -> None:
    count = parameters("vgg16", 1000, layers=(2, 2, 3, 3, 3), hidden=(4096, 4096))
    assert f"{count / 1e6:.1f}" == "138.4"


def wide_resnet_count(n: int, k: int) -> int:
    """Convolutions of 16 -> 16k -> 32k -> 64k, shortcuts of size 1, two numbers per channel that is normalised."""
    blocks, widths = (n - 4) // 6, [16, 16 * k, 32 * k, 64 * k]
    convolutions, norms = 3 * 16 * 9, 2 * widths[-1]
    for a, b in itertools.pairwise(widths):
        convolutions += 9 * (a * b + (2 * blocks - 1) * b * b) + (a * b if a != b or b > 16 * k else 0)
        norms += 2 * (a + (2 * blocks - 1) * b)
    return convolutions + norms + 64 * k * 10 + 10


def chain_count(n: int, k: int, *, dirac: bool) -> int:
    """Likewise; a and b per channel, P in the place of a where the width changes."""
    layers, widths = (n - 4) // 3, [16, 16 * k, 32 * k, 64 * k]
    count = 3 * 16 * 9 + 2 * 16 + 64 * k * 10 + 10
    for a, b in itertools.pairwise(widths):
        count += 9 * (a * b + (layers - 1) * b * b) + 2 * layers * b
        count += (layers * b + (layers - 1) * b + (a * b if a != b else b)) * dirac
    return count


@pytest.mark.parametrize(("n", "k"), [(10, 1), (16, 2), (28, 5), (28, 10)])
def test_parameters_by_the_formula(n: int, k: int) -> None:
    assert parameters(f"wrn-{n}-{k}") == wide_resnet_count(n, k)
    assert parameters(f"diracnet-{n}-{k}") == chain_count(n, k, dirac=True)
    assert parameters(f"plain-{n}-{k}") == chain_count(n, k, dirac=False)
    assert parameters(f"plain-{n}") == chain_count(n, 1, dirac=False)


def test_weights_of_a_diracnet() -> None:
    """Every convolution but the first one, the three that change the width with a projection."""
    model = edgetrain.create_model("diracnet-16-2", width=4)
    kinds = [type(m.parametrizations.weight[0]) for m in model.modules() if hasattr(m, "parametrizations")]
    assert kinds.count(DiracProjection) == 3
    assert kinds.count(DiracParametrization) == 12 - 3
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13
    assert not hasattr(convolutions[0], "parametrizations")


def test_imagenet_forms_downsample_by_32() -> None:
    model = imagenet_diracnet(18, 5, in_channels=1, width=4)
    assert model[:-1](torch.randn(1, 1, 64, 64)).shape == (1, 32, 2, 2)
    layers = [sum(isinstance(m, nn.Conv2d) for m in imagenet_diracnet(n, width=4).modules()) for n in (18, 34)]
    assert layers == [17, 33]  # and the linear one


def test_dropout_of_a_wide_resnet() -> None:
    torch.manual_seed(0)
    model = edgetrain.create_model("wrn-10-1", width=4, dropout=0.5)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_hidden_layers_of_a_vgg() -> None:
    model = edgetrain.create_model("vgg16", 7, layers=(1, 1, 1, 1, 1), hidden=(8, 9))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [8, 9, 7]
    with pytest.raises(UsageError, match="5 block counts"):
        edgetrain.create_model("vgg16", layers=(2, 2, 3, 3))


@pytest.mark.parametrize("name", ["wrn-17-2", "diracnet-29-5", "plain-35", "wrn-4-1"])
def test_depths_that_are_not_6n_plus_4(name: str) -> None:
    with pytest.raises(UsageError, match=r"6N \+ 4.*use (wrn|diracnet|plain)-(10|16|28|34)-"):
        edgetrain.create_model(name)


def test_no_width_at_all() -> None:
    with pytest.raises(UsageError, match="use wrn-16-1"):
        edgetrain.create_model("wrn-16-0")


def test_other_imagenet_depths() -> None:
    with pytest.raises(UsageError, match="18 or 34"):
        imagenet_diracnet(50)
