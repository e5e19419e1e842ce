"""Training artifacts: gradients against finite differences and torch, real steps, and the graphs that are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgetrain.cli.main import run
from edgetrain.errors import ExportError, MissingExtraError, UsageError
from edgetrain.export import export_ort_training
from edgetrain.export.ort_training import _without_its_log
from edgetrain.export.training_lint import GRADIENTS, lint_training
from edgetrain.models import cifar_resnet, create_model, hybrid, revnet
from edgetrain.ort_steps import MANIFEST, OrtSteps, training_api

try:
    api = training_api()
except MissingExtraError as error:
    pytest.skip(error.found, allow_module_level=True)

SHAPE = (3, 16, 16)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "hybrid": lambda: hybrid(4, width=8),
    "revnet": lambda: revnet(4, widths=(8, 16, 24, 32), blocks=(1, 1, 1, 1)),
    "resnet8": lambda: cifar_resnet(8, 4, width=8),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *SHAPE, generator=generator), torch.arange(count) % 4


@pytest.fixture(scope="module", params=list(NETWORKS))
def artifacts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = made(request.param)
    folder = tmp_path_factory.mktemp("artifacts") / request.param
    written = export_ort_training(model, folder, input_shape=SHAPE)
    assert written.gradient_difference < 1e-4
    return model, folder


def test_gradients_against_finite_differences(artifacts: tuple[nn.Module, Path]):
    """(L(w + h d) - L(w - h d)) / 2h of torch in float64 against <g, d>, a random direction d per parameter."""
    model, folder = artifacts
    images, labels = batch()
    steps, exact = OrtSteps(folder), copy.deepcopy(model).double().train()
    steps.gradients(images.numpy(), labels.numpy())
    generator, h = torch.Generator().manual_seed(1), 1e-6

    def loss_at(parameter: nn.Parameter, shift: torch.Tensor) -> float:
        with torch.no_grad():
            parameter += shift
            loss = F.cross_entropy(exact(images.double()), labels).item()
            parameter -= shift
        return loss

    for name, parameter in exact.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (loss_at(parameter, h * direction) - loss_at(parameter, -h * direction)) / (2 * h)
        gradient = torch.from_numpy(steps.gradient(name)).double()
        scale = float(gradient.norm() * direction.norm())
        assert abs(float((gradient * direction).sum()) - slope) < 1e-4 * scale + 1e-8, name


@pytest.mark.parametrize(("optimizer", "weight_decay"), [("adamw", 0.0), ("adamw", 0.05), ("sgd", 0.0)])
def test_steps_are_those_of_torch(optimizer: str, weight_decay: float, tmp_path: Path):
    model, (images, labels) = made("hybrid"), batch()
    before = copy.deepcopy(model.state_dict())
    export_ort_training(
        model,
        tmp_path / "a",
        input_shape=SHAPE,
        optimizer=optimizer,
        weight_decay=weight_decay,  # type: ignore[arg-type]
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    steps = OrtSteps(tmp_path / "a")
    ours = (
        torch.optim.SGD(model.parameters(), lr=0.01)
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
    )
    model.train()
    for step in range(4):
        ours.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        ours.step()
        found, logits = steps.step(images.numpy(), labels.numpy(), rate=0.01)
        assert logits.shape == (6, 4)
        assert found == pytest.approx(loss.item(), rel=1e-5 if step == 0 else 1e-3)
    # in the mean: Adam divides by the gradient's size, so where that is rounding, so is the step
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.endswith("running_var"):
            difference = np.abs(steps.value(name) - value.numpy()).mean()
            assert difference < 1e-3 * max(1.0, float(value.abs().mean())), name
    model.eval()
    assert steps.evaluate(images.numpy(), labels.numpy())[1].shape == (6, 4)


def test_state_is_saved_and_goes_on(artifacts: tuple[nn.Module, Path], tmp_path: Path):
    images, labels = (value.numpy() for value in batch())
    straight, first = OrtSteps(artifacts[1], threads=1), OrtSteps(artifacts[1], threads=1)
    for _ in range(2):
        straight.step(images, labels, rate=0.01)
        first.step(images, labels, rate=0.01)
    first.save(tmp_path / "half")
    again = OrtSteps(artifacts[1], checkpoint=tmp_path / "half", threads=1)
    for _ in range(2):
        assert straight.step(images, labels, rate=0.01)[0] == again.step(images, labels, rate=0.01)[0]
    for name in straight.names(trained=False):
        assert np.array_equal(straight.value(name), again.value(name)), name


def test_the_runner_loads_no_torch(artifacts: tuple[nn.Module, Path]):
    code = f"""
import sys
import numpy as np
from edgetrain.ort_steps import OrtSteps
steps = OrtSteps({str(artifacts[1])!r})
rng = np.random.default_rng(0)
images, labels = rng.standard_normal((8, *{SHAPE})).astype(np.float32), np.arange(8) % 4
losses = [steps.step(images, labels, rate=0.01)[0] for _ in range(12)]
assert "torch" not in sys.modules and "onnx" not in sys.modules
assert losses[-1] < 0.5 * losses[0], losses
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def one_operator(kind: str, inputs: list[str], opset: int = 17, **attributes: object) -> onnx.ModelProto:
    """images (2, 4, 4, 4) * w -> the operator -> mean; constants by name below."""
    constants = {
        "w": np.full((1, 4, 1, 1), 0.7, np.float32),
        "one": np.full((1, 4, 1, 1), 1.5, np.float32),
        "kernel": np.ones((4, 4, 3, 3), np.float32),
        "c": np.ones(4, np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["images", "w"], ["z"], "scale"),
        helper.make_node(kind, inputs, ["y"], "odd", **attributes),
        helper.make_node("ReduceMean", ["y"], ["logits"], "mean", keepdims=0),
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "made by hand",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 4, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def derived(model: onnx.ModelProto, folder: Path, images: np.ndarray) -> np.ndarray:
    """The gradient of ``w`` that onnxruntime-training derives."""
    from onnxruntime.training import artifacts as ort

    with _without_its_log():
        ort.generate_artifacts(model, requires_grad=["w"], artifact_directory=str(folder))
    state = api.load_checkpoint(str(folder / "checkpoint"))
    device = api.OrtDevice(api.OrtDevice.cpu(), api.OrtDevice.default_memory(), 0)
    options = api.SessionOptions()
    options.log_severity_level = 4
    module = api.Module(str(folder / "training_model.onnx"), state, None, device, options)
    feeds, fetches = api.OrtValueVector(), api.OrtValueVector()
    feeds.push_back(api.OrtValue.ortvalue_from_numpy(images, device))
    module.train_step_with_ort_values(feeds, fetches)
    return np.array(state.get_parameter("w").grad.numpy())


def loss_of(model: onnx.ModelProto, images: np.ndarray, w: np.ndarray) -> float:
    import onnxruntime

    changed = onnx.ModelProto.FromString(model.SerializeToString())
    (initialiser,) = (value for value in changed.graph.initializer if value.name == "w")
    initialiser.CopyFrom(numpy_helper.from_array(w, "w"))
    return float(onnxruntime.InferenceSession(changed.SerializeToString()).run(None, {"images": images})[0])


def differences(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """The gradient of ``w`` by central differences of the graph itself, exact as no loss here is above quadratic."""
    (w,) = (numpy_helper.to_array(value) for value in model.graph.initializer if value.name == "w")
    gradient = np.zeros_like(w)
    for place in np.ndindex(w.shape):
        shift = np.zeros_like(w)
        shift[place] = 0.5
        gradient[place] = loss_of(model, images, w + shift) - loss_of(model, images, w - shift)
    return gradient


def split_graph(*, read_all: bool) -> onnx.ModelProto:
    """Split into 1, 2 and 1 channels, of which the first is squared, and the others are or are not."""
    model = one_operator("Identity", ["z"])
    del model.graph.node[1:]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 1]), "sizes"))
    parts = ["first", "second", "third"]
    model.graph.node.append(helper.make_node("Split", ["z", "sizes"], parts, "split", axis=1))
    model.graph.node.append(helper.make_node("Concat", parts if read_all else parts[:1], ["x"], axis=1))
    model.graph.node.append(helper.make_node("Mul", ["x", "x"], ["y"]))
    model.graph.node.append(helper.make_node("ReduceMean", ["y"], ["logits"], keepdims=0))
    return model


def convolution(auto_pad: str) -> onnx.ModelProto:
    padding = {"auto_pad": auto_pad} if auto_pad else {"pads": [1, 1, 1, 1]}
    model = one_operator("Conv", ["z", "kernel"], **padding)
    (kernel,) = (value for value in model.graph.initializer if value.name == "kernel")
    weights = np.random.default_rng(2).standard_normal((4, 4, 3, 3)).astype(np.float32)
    kernel.CopyFrom(numpy_helper.from_array(weights, "kernel"))
    return model


SILENT = {"split": split_graph(read_all=False), "auto_pad": convolution("SAME_UPPER")}
RIGHT = {"split": split_graph(read_all=True), "pads": convolution("")}


@pytest.mark.parametrize("rule", SILENT)
def test_what_is_silently_wrong_is_refused(rule: str, tmp_path: Path):
    """The lint names it; and ONNX Runtime derives another gradient than finite differences, without a word."""
    model, images = SILENT[rule], np.random.default_rng(0).random((2, 4, 4, 4)).astype(np.float32)
    assert [(f.rule, f.severity) for f in lint_training(model, ["w"])] == [(rule, "error")]
    expected = differences(model, images)
    assert not np.allclose(derived(model, tmp_path, images), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_right_passes(kind: str, tmp_path: Path):
    model, images = RIGHT[kind], np.random.default_rng(0).random((2, 4, 4, 4)).astype(np.float32)
    assert lint_training(model, ["w"]) == ()
    assert np.allclose(derived(model, tmp_path, images), differences(model, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["PRelu", "Elu", "HardSwish", "InstanceNormalization", "ReduceMax", "DepthToSpace"])
def test_operators_without_a_gradient_are_named(kind: str, tmp_path: Path):
    more = {"PRelu": ["one"], "InstanceNormalization": ["c", "c"]}.get(kind, [])
    attributes = {"blocksize": 2} if kind == "DepthToSpace" else {}
    model = one_operator(kind, ["z", *more], **attributes)
    (finding,) = lint_training(model, ["w"])
    assert (finding.rule, finding.node) == ("gradient", "odd")
    assert kind in finding.reason
    with pytest.raises(Exception, match=f"has not been registered: {kind}"):
        derived(model, tmp_path, np.ones((2, 4, 4, 4), np.float32))
    assert lint_training(model, []) == ()  # below nothing that is trained it may stand


@pytest.mark.parametrize(
    "kind",
    [
        "Abs",
        "Neg",
        "Exp",
        "Log",
        "Sqrt",
        "Relu",
        "LeakyRelu",
        "Sigmoid",
        "Tanh",
        "Erf",
        "Sin",
        "Cos",
        "Reciprocal",
        "GlobalAveragePool",
        "Flatten",
    ],
)
def test_operators_with_a_gradient_have_one(kind: str, tmp_path: Path):
    assert kind in GRADIENTS
    images = np.random.default_rng(0).random((2, 4, 4, 4)).astype(np.float32) + 0.5
    assert np.abs(derived(one_operator(kind, ["z"]), tmp_path, images)).max() > 0


def test_versions_are_refused():
    model = one_operator("Relu", ["z"], opset=22)
    model.ir_version = 11
    assert [finding.rule for finding in lint_training(model, ["w"])] == ["opset", "ir"]


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(2, 1)[1]


def with_layer(layer: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    )


@pytest.mark.parametrize(
    ("layer", "channels", "said"),
    [(nn.PReLU(), 8, "PRelu"), (Half(), 4, "nobody reads"), (nn.Conv2d(8, 8, 3, padding="same"), 8, "auto_pad")],
)
def test_a_network_is_refused_before_anything_is_written(layer: nn.Module, channels: int, said: str, tmp_path: Path):
    with pytest.raises(ExportError, match=said):
        export_ort_training(with_layer(layer, channels), tmp_path / "a", input_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_and_other_folders_are_refused(tmp_path: Path):
    tied = with_layer(nn.ReLU())
    tied.insert(3, nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)))
    tied[3][1].weight = tied[3][0].weight
    with pytest.raises(ExportError, match="two names"):
        export_ort_training(tied, tmp_path / "a", input_shape=SHAPE)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="something else in it"):
        export_ort_training(with_layer(nn.ReLU()), tmp_path / "photos", input_shape=SHAPE)
    with pytest.raises(UsageError, match="weight decay"):
        export_ort_training(tied, tmp_path / "a", input_shape=SHAPE, optimizer="sgd", weight_decay=0.1)
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.jpg"]


def test_frozen_layers_stay(tmp_path: Path):
    from edgetrain.chain import freeze

    model = freeze(with_layer(nn.ReLU()), 3)
    export_ort_training(model, tmp_path / "a", input_shape=SHAPE)
    steps, (images, labels) = OrtSteps(tmp_path / "a"), batch()
    assert steps.names() == ["5.bias", "5.weight"]
    before = {name: steps.value(name) for name in steps.names(trained=False)}
    steps.step(images.numpy(), labels.numpy(), rate=0.1)
    moved = {name for name, value in before.items() if not np.array_equal(value, steps.value(name))}
    assert moved == {"5.weight", "5.bias"}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    arguments = "export --model resnet8 --input 1x16x16 --num-classes 4 --format ort-training --out a"
    for _ in range(2):  # the second time in place of the first
        assert run(arguments.split()) == 0
        out, err = capfd.readouterr()
        assert err == ""
        assert "gradients" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["input_shape"] == [1, 16, 16]
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "a").iterdir()} - {MANIFEST}
    assert run([*arguments.split(), "--device", "orin-nano-8gb"]) == 2
    assert "--device" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid18", "revnet18", "resnet20", "resnet18", "layerwise18", "wrn-16-1", "vgg16"])
def test_the_zoo(name: str, tmp_path: Path):
    torch.manual_seed(0)
    written = export_ort_training(create_model(name), tmp_path / "a", input_shape=(3, 32, 32))
    assert written.gradient_difference < 1e-4
    assert written.logits_difference < 1e-5
