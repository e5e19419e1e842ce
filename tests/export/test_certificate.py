"""The certificate: what it claims is so, it comes back from disk, and it can be completed with an engine."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_network import small_network

import edgetrain
from edgetrain.errors import StorageError
from edgetrain.export import About, Certificate, ImageSet
from edgetrain.export.certificate import File, Step, state_digest

PIXELS = torch.rand((6, 3, 8, 8), generator=torch.Generator().manual_seed(3))
NAMES = tuple(f"photo {k}.png" for k in range(6))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> edgetrain.export.Export:
    labels = torch.arange(6) % 4
    images = ImageSet(PIXELS, NAMES, "six photos", labels)
    path = tmp_path_factory.mktemp("export") / "m.onnx"
    return edgetrain.export_onnx(
        small_network(), path, input_shape=(3, 8, 8), images=images, device="xavier-nx", about=About(plan="{}")
    )


def test_it_comes_back_from_disk(export: edgetrain.export.Export):
    assert export.certificate_path.name == "m.certificate.json"
    assert Certificate.from_json(export.certificate_path.read_bytes()) == export.certificate


def test_the_digests_are_those_of_files_images_and_state(export: edgetrain.export.Export):
    certificate = export.certificate
    assert certificate.onnx == File(
        name="m.onnx",
        sha256=hashlib.sha256(export.path.read_bytes()).hexdigest(),
        size_bytes=export.path.stat().st_size,
    )
    assert [image.name for image in certificate.images] == list(NAMES)
    assert certificate.images[2].sha256 == hashlib.sha256(PIXELS[2].numpy().tobytes()).hexdigest()
    model = small_network()
    assert certificate.state_sha256 == state_digest(model)
    model[0].weight.data[0, 0, 0, 0] += 1e-6
    assert certificate.state_sha256 != state_digest(model)


def test_every_arrow_is_a_step(export: edgetrain.export.Export):
    steps = [(step.before, step.after, step.evaluator) for step in export.certificate.steps]
    assert steps == [
        ("training module", "folded module", "PyTorch"),
        ("folded module", "fp32 ONNX", "ONNX Runtime"),
        ("folded module", "fp32 ONNX", "ONNX reference evaluator"),
        ("training module", "ONNX", "ONNX Runtime"),
    ]
    assert [step.images for step in export.certificate.steps] == [6, 6, 2, 6]
    assert all(step.max_difference <= 1e-5 for step in export.certificate.steps)
    with torch.no_grad():
        classes = small_network().eval()(PIXELS).argmax(1)
    accuracy = float((classes == torch.arange(6) % 4).float().mean())
    assert export.certificate.steps[-1].accuracy_after == pytest.approx(accuracy)


def test_refitting_by_the_map_gives_the_new_network(export: edgetrain.export.Export):
    """Every weight of the graph comes from what the map names: a state of the same shapes fills the graph."""
    graph = onnx.load(str(export.path)).graph
    mapped = {entry.initialiser for entry in export.certificate.refit}
    weights = {value.name for value in graph.initializer if numpy_helper.to_array(value).dtype == np.float32}
    assert weights <= mapped
    known = set(small_network().state_dict())
    assert all(set(entry.trained) <= known for entry in export.certificate.refit)
    (classifier,) = [entry for entry in export.certificate.refit if entry.initialiser == "classifier.weight"]
    assert classifier.trained == ("classifier.weight",)


def test_an_engine_completes_it(export: edgetrain.export.Export):
    engine = File(name="m.engine", sha256="0" * 64, size_bytes=1)
    step = Step(
        before="fp32 ONNX",
        after="engine",
        evaluator="TensorRT",
        images=6,
        max_difference=0.0,
        mean_difference=0.0,
        top1_agreement=1.0,
        bound=1e-5,
    )
    full = export.certificate.with_engine(engine, steps=[step], weight_names={"classifier.weight": "W"})
    assert full.engine == engine
    assert full.steps[-1] == step
    names = {entry.initialiser: entry.engine_weight for entry in full.refit}
    assert names["classifier.weight"] == "W"
    assert names["stem.weight"] is None
    assert Certificate.from_json(full.to_json()) == full


@pytest.mark.parametrize("change", [{"version": 2}, {"steps": None}, {"unheard": 1}])
def test_what_is_no_certificate_is_refused(export: edgetrain.export.Export, change: dict):
    fields = json.loads(export.certificate.to_json()) | change
    with pytest.raises(StorageError, match="no certificate"):
        Certificate.from_json(json.dumps(fields))
    with pytest.raises(StorageError, match="no certificate"):
        Certificate.from_json("{")
