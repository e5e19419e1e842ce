"""Parameter counts against the source's table and the ResNet papers, arguments, and unknown names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.errors import UsageError
from edgetrain.models import model_names, pooling_letters, pooling_sequences


def convolution_weights(model: nn.Module) -> int:
    stem = 3 * 9 * next(p.shape[0] for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.dim() == 4) - stem


# weights per block times blocks per stage, printed total: equations recovered from the source's Table 3.1
TABLE = {
    "resnet18": (18 * sum(2 * c**2 for c in (32, 64, 128, 256)), 3.13e6),
    "revnet18": (9 * sum(2 * c**2 for c in (40, 80, 256, 320)), 3.17e6),
    "irevnet18": (9 * (2 * 32**2 + 2 * 128**2 + 2 * 512**2 + 2048**2), 42.8e6),
    "layerwise18": (9 * (4 * 32**2 + 4 * 128**2 + 4 * 512**2 + 2 * 512**2) // 2, 7.4e6),
    "hybrid18": (9 * (2 * 32**2 + 2 * 128**2 + 2 * 512**2 + 512**2) // 2, 3.7e6),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_3_1(name: str) -> None:
    recovered, printed = TABLE[name]
    model = edgetrain.create_model(name)
    assert convolution_weights(model) == recovered
    # what else there is: stem, batch norms, classifier without bias
    total = sum(p.numel() for p in model.parameters())
    last = [p for p in model.parameters() if p.dim() == 2]
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert total == recovered + 3 * 9 * model[0].weight.shape[0] + norms + last[0].numel()
    assert total == pytest.approx(printed, rel=0.012)


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269722), (32, 464154), (44, 658586), (56, 853018), (110, 1727962)]
)
def test_cifar_resnets(depth: int, parameters: int) -> None:
    assert sum(p.numel() for p in edgetrain.create_model(f"resnet{depth}").parameters()) == parameters


def test_resnet_1202() -> None:
    with torch.device("meta"):
        model = edgetrain.create_model("resnet1202")
    assert sum(p.numel() for p in model.parameters()) == 19421274


@pytest.mark.parametrize("name", [name for name in model_names() if name != "resnet1202"])
def test_logits(name: str) -> None:
    # narrow ones of the wide families; five poolings need 32 pixels
    options = {"width": 8} if name == "irevnet18" else {"width": 2} if name[-3:] in ("-10", "8-5", "-18", "-34") else {}
    model = edgetrain.create_model(name, 7, in_channels=1, **options)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_arguments_of_the_families() -> None:
    model = edgetrain.create_model(
        "hybrid18", width=8, blocks=(1, 3), pooling=("batch",), depth=3, slope=0.3, eps_i=0.2
    )
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    slopes = {m.slope for m in model.modules() if isinstance(m, edgetrain.nn.InvertibleLeakyReLU)}
    assert slopes == {0.3}
    assert {m.eps_i for m in model.modules() if isinstance(m, edgetrain.nn.InvertibleBatchNorm)} == {0.2}
    assert len(model[1]) == 1
    assert len(model[3]) == 3


def test_pooling_sequences_are_what_a_network_takes() -> None:
    sequences = pooling_sequences("layerwise18", blocks=(1, 1, 1))
    assert [pooling_letters(sequence) for sequence in sequences] == ["cc", "cb", "bc", "bb"]
    for sequence in sequences:
        model = edgetrain.create_model("layerwise18", width=8, blocks=(1, 1, 1), pooling=sequence)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
        assert model[-1].linear.in_features == 8 * 4 ** sequence.count("channel")
        assert model[-1].parts == 4 ** sequence.count("batch")
    assert len(pooling_sequences("hybrid18")) == 8
    for name in ("resnet18", "revnet18", "resnet20", "vgg16", "wrn-16-2", "diracnet-18"):
        with pytest.raises(UsageError, match="downsamples in one way alone"):
            pooling_sequences(name)
    with pytest.raises(UsageError, match="no network of the zoo"):
        pooling_sequences("alexnet")


def test_head_takes_the_maximum_over_batch_pooled_parts() -> None:
    from edgetrain.models.parts import Head

    torch.manual_seed(0)
    head = Head(6, 3, parts=4).double()
    x = torch.randn(8, 6, 2, 2, dtype=torch.double, requires_grad=True)
    logits = head(x)
    expected = head.linear(x.view(2, 4, 6, 4).amax((1, 3))) * 0.125
    torch.testing.assert_close(logits, expected)
    assert torch.autograd.gradcheck(head, (x,))
    with torch.no_grad():
        torch.testing.assert_close(head(x), expected)


def test_unknown_names_list_the_near_ones() -> None:
    with pytest.raises(UsageError, match="did you mean hybrid18"):
        edgetrain.create_model("hybird18")
    with pytest.raises(UsageError, match="use resnet20"):
        edgetrain.create_model("resnet21")
    with pytest.raises(UsageError, match="'channel' or 'batch'"):
        edgetrain.create_model("hybrid18", pooling=("max",), blocks=(1, 1))
    with pytest.raises(UsageError, match="2 block counts"):
        edgetrain.create_model("hybrid18", pooling=("batch",), blocks=(1, 1, 1))
