"""What an exported graph looks like to who opens it: names, metadata, batch, one file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_network import small_network

import edgetrain
from edgetrain.export import About, Normalisation
from edgetrain.export.graph import opset_of, unshare

NORMALISATION = Normalisation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def exported(path: Path, **options: object) -> onnx.ModelProto:
    edgetrain.export_onnx(small_network(), path / "m.onnx", input_shape=(3, 8, 8), **options)
    return onnx.load(str(path / "m.onnx"))


def test_weights_have_the_names_of_their_parameters(tmp_path: Path):
    graph = exported(tmp_path, about=About(normalisation=NORMALISATION)).graph
    held = {initialiser.name for initialiser in graph.initializer}
    assert {"stem.weight", "body.0.weight", "classifier.weight", "classifier.bias"} <= held
    assert not [name for name in held if name.startswith(("onnx::", "network")) or name.isdecimal()]


def test_nodes_are_called_after_their_modules(tmp_path: Path):
    graph = exported(tmp_path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.endswith("Conv")] == ["stem/Conv", "body/0/Conv"]
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize(("device", "opset"), [("nano-4gb", 13), ("xavier-nx", 17), ("orin-nano-8gb", 20)])
def test_the_opset_is_that_of_the_device(device: str, opset: int, tmp_path: Path):
    assert opset_of(exported(tmp_path, device=device)) == opset


def test_the_batch_is_open_or_fixed(tmp_path: Path):
    dimension = exported(tmp_path).graph.input[0].type.tensor_type.shape.dim[0]
    assert (dimension.dim_param, dimension.dim_value) == ("batch", 0)
    images = torch.rand(5, 3, 8, 8)
    dimension = exported(tmp_path, batch_size=2, images=images).graph.input[0].type.tensor_type.shape.dim[0]
    assert (dimension.dim_param, dimension.dim_value) == ("", 2)
    certificate = edgetrain.export.Certificate.from_json((tmp_path / "m.certificate.json").read_text())
    assert certificate.steps[-1].images == 5  # in three batches of two
    assert certificate.batch_size == 2


def test_the_metadata_says_what_the_file_is(tmp_path: Path):
    classes = ("ant", "bee", "cow", "dog")
    about = About(name="small", classes=classes, plan="{}", normalisation=NORMALISATION)
    model = exported(tmp_path, about=about, device="xavier-nx")
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["model"] == "small"
    assert json.loads(said["classes"]) == list(classes)
    assert json.loads(said["normalisation"]) == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    # sha256sum of the two characters {}
    assert said["plan_sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert (said["precision"], said["opset"]) == ("fp32", "17")
    assert said["version.onnx"] == onnx.__version__
    assert said["version.torch"] == torch.__version__
    assert said["version.edgetrain"] == edgetrain.__version__
    assert (model.producer_name, model.producer_version) == ("edgetrain", edgetrain.__version__)


def test_the_graph_normalises(tmp_path: Path):
    """(x - mean) / std in numpy, then the network in PyTorch, against the graph on the pixels themselves."""
    exported(tmp_path, about=About(normalisation=NORMALISATION))
    pixels = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (NORMALISATION.mean, NORMALISATION.std))
    with torch.no_grad():
        expected = small_network().double().eval()(torch.from_numpy((pixels - mean) / std)).numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels})
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_equal_weights_are_not_shared():
    """The graph writer keeps equal parameters once; a refit with others needs each."""
    two = helper.make_tensor_value_info("images", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2])
    nodes = [
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Add", ["images", "a"], ["x"]),
        helper.make_node("Add", ["x", "b"], ["logits"]),
    ]
    shared = numpy_helper.from_array(np.array([1, 2], np.float32), "a")
    model = helper.make_model(helper.make_graph(nodes, "shared", [two], [out], [shared]))
    unshare(model)
    assert [node.op_type for node in model.graph.node] == ["Add", "Add"]
    assert {value.name: numpy_helper.to_array(value).tolist() for value in model.graph.initializer} == {
        "a": [1, 2],
        "b": [1, 2],
    }
