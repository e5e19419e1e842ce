"""The zoo and networks of timm, folded: equal results, what is left, and plain graphs in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fold_networks import randomise
from networks import NETWORKS
from torch import nn

import edgetrain
from edgetrain.export.fold import Plain

SMALL: dict[str, dict[str, Any]] = {name: {"width": 8} for name in ("hybrid18", "layerwise18", "irevnet18")}
ZOO = ("resnet18", "revnet18", "irevnet18", "layerwise18", "hybrid18", "resnet20")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(edgetrain.create_model(name, **SMALL.get(name, {})))


@torch.no_grad()
def compare(model: nn.Module, x: torch.Tensor) -> Plain:
    """The folded model, after it was compared in float64 and in float32.

    In float32 deep networks with such statistics differ by more than 1e-6 from their own results in float64: then
    folding must not add more than that.
    """
    model = model.double().eval()
    exact = model(x.clone())
    largest = exact.abs().max()
    assert float((edgetrain.fold(model)(x.clone()) - exact).abs().max() / largest) <= 1e-12
    model = model.float()
    single = model(x.float())
    plain = edgetrain.fold(model)
    error = float((plain(x.float()) - single).abs().max() / largest)
    assert error <= max(1e-6, 2.0 * float((single - exact).abs().max() / largest))
    return plain


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    plain = compare(make(name), torch.randn(3, 3, 16, 16, dtype=torch.double))
    assert all(fold.kind == "batch norm" for fold in plain.report.skipped)
    kinds = Counter(fold.kind for fold in plain.report.done)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert left == len(plain.report.skipped)
    # convolutions in front of a batch norm: 2 for each of 8 (7) blocks with 1 or 2 modules; 9 blocks of 2 and the stem
    before, after = {
        "resnet18": (16, 0),
        "revnet18": (32, 1),
        "irevnet18": (28, 1),
        "layerwise18": (0, 14),
        "hybrid18": (0, 29),
        "resnet20": (19, 0),
    }[name]
    assert (kinds["batch norm"], left) == (before, after)
    assert kinds["scale"] == (0 if name == "resnet20" else 1)


def test_batch_norm_after_a_coupling_says_what_a_dirac_delta_would_cost() -> None:
    """k^2 c/2 more multiplications: 9 * 4 with 8 channels."""
    (fold, *_) = edgetrain.fold(make("layerwise18")).report.skipped
    assert fold.where == "stage1.0.norm"
    assert "as a Dirac delta it would take 36 more multiplications" in fold.reason


def test_reversible_blocks_hand_on_their_halves() -> None:
    """7 blocks in 4 stages: one split and one join for each stage instead of each block."""
    targets = [node.target for node in edgetrain.fold(make("irevnet18")).graph.nodes]
    assert (targets.count(torch.split), targets.count(torch.cat)) == (4, 4)


def test_nothing_of_this_package_is_left_but_batch_pooling() -> None:
    for name in ZOO:
        modules = {type(module) for module in edgetrain.fold(make(name)).modules() if type(module) is not nn.Module}
        foreign = {kind.__name__ for kind in modules if not kind.__module__.startswith("torch.nn")}
        assert foreign - {"Plain"} == ({"BatchUnshuffle"} if name in ("layerwise18", "hybrid18") else set())


def test_exact_blocks_round_as_in_training() -> None:
    torch.manual_seed(0)
    model = randomise(edgetrain.create_model("hybrid18", width=8, blocks=(1, 1), pooling=("batch",), exact=True))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.double()(x.double())
        # sums in another order may round to the next multiple of 2**-40
        torch.testing.assert_close(edgetrain.fold(model)(x.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_are_no_sequence(name: str) -> None:
    torch.manual_seed(0)
    compare(randomise(NETWORKS[name][0]()), torch.randn(3, 3, 8, 8, dtype=torch.double))


@pytest.mark.parametrize(("name", "left"), [("mobilenetv2_100", 0), ("resnet18", 0)])
def test_networks_of_timm(name: str, left: int) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    import timm_networks

    torch.manual_seed(0)
    model = randomise(timm_networks.create(name, num_classes=10, drop_rate=0.1))
    # of the logits of few images, the rounding of one of the two networks can be small by chance
    plain = compare(model, torch.randn(16, 3, 32, 32, dtype=torch.double))
    assert len(plain.report.skipped) == left
    calls = {type(plain.get_submodule(str(n.target))).__name__ for n in plain.graph.nodes if n.op == "call_module"}
    assert calls <= {"Conv2d", "ReLU", "ReLU6", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Linear"}


def exported(plain: nn.Module, path: Path, opset: int) -> Any:
    """The graph that torch's older exporter makes of ``plain``, the batch dynamic, written to ``path``."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain,
            (torch.randn(2, 3, 16, 16),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def test_a_plain_chain_is_convolutions_activations_pooling_and_the_classifier(tmp_path: Path) -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16)):
        conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    layers.insert(6, nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 10), nn.BatchNorm1d(10)]
    plain = compare(randomise(nn.Sequential(*layers, *head)), torch.randn(2, 3, 16, 16, dtype=torch.double))
    counts = Counter(node.op_type for node in exported(plain, tmp_path / "chain.onnx", 13).node)
    assert counts == {"Conv": 3, "Relu": 3, "MaxPool": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}


@pytest.mark.parametrize(
    ("name", "opset"), [("hybrid18", 13), ("hybrid18", 17), ("revnet18", 13), ("resnet20", 17), ("irevnet18", 17)]
)
def test_the_folded_graph_runs_at_any_batch_size(name: str, opset: int, tmp_path: Path) -> None:
    import onnxruntime

    model, path = make(name), tmp_path / "plain.onnx"
    graph = exported(edgetrain.fold(model), path, opset)
    counts = Counter(node.op_type for node in graph.node)
    assert counts["BatchNormalization"] == {"hybrid18": 29, "revnet18": 1, "irevnet18": 1}.get(name, 0)
    assert counts["If"] == counts["ScatterND"] == counts["Identity"] == 0
    names = {initializer.name for initializer in graph.initializer}
    assert {"hybrid18": "stage1.0.f.layer0.conv.f.weight", "resnet20": "stem.0.weight"}.get(
        name, "stem.weight"
    ) in names
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            expected = model(x)
        (logits,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_network_that_was_just_trained_by_inversion() -> None:
    """Its blocks hold records of the last step, which are no part of the folded network."""
    torch.manual_seed(0)
    model = edgetrain.create_model("revnet18", widths=(8, 16, 16, 16))
    plan = edgetrain.uniform_plan(model, "invert", input_shape=(3, 16, 16), batch_size=4)
    edgetrain.wrap(model, plan)(torch.randn(4, 3, 16, 16)).sum().backward()
    assert any(getattr(module, "saved", None) for module in model.modules())
    plain = compare(model, torch.randn(2, 3, 16, 16, dtype=torch.double))
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
