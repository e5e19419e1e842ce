"""Running and refitting, call by call, against a stand-in of TensorRT 10 that answers with ONNX Runtime.

The stand-in gets addresses, as the real one does, but of CPU tensors; what only a GPU can show is in
test_engines_built.py, marked so.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from small_graphs import Tensorrt82, write_graph
from small_network import small_network

import edgetrain
from edgetrain.errors import ExportError, ModelError
from edgetrain.export import (
    Certificate,
    Export,
    ImageSet,
    engine_step,
    read_report,
    refit_engine,
    run_engine,
)
from edgetrain.export.engines import builders, loading
from edgetrain.export.engines import run as run_module
from edgetrain.files import file_sha256


class Tensorrt10(Tensorrt82):
    """An engine is here the path of its graph; its calls are those of TensorRT 10's reference."""

    __version__ = "10.3.0"

    def __init__(self, graph: Path) -> None:
        super().__init__(gives=str(graph).encode())
        trt = self
        self.DataType = SimpleNamespace(HALF="half", FLOAT="float")
        self.missing: list[str] = []
        self.batches: list[int] = []

        class Context:
            def __init__(self, session: Any) -> None:
                self.session, self.shape, self.addresses = session, (0,), {}

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
                assert name == "images"
                self.shape = shape

            def get_tensor_shape(self, name: str) -> tuple[int, int]:
                assert name == "logits"
                return self.shape[0], 10

            def set_tensor_address(self, name: str, address: int) -> None:
                self.addresses[name] = address

            def execute_async_v3(self, stream: int) -> bool:
                assert stream == 7
                trt.batches.append(self.shape[0])
                given = _at(self.addresses["images"], self.shape)
                _at(self.addresses["logits"], (self.shape[0], 10))[:] = self.session.run(None, {"images": given})[0]
                return True

        class Engine:
            def __init__(self, content: bytes) -> None:
                self.content = content

            def create_execution_context(self) -> Context:
                return Context(onnxruntime.InferenceSession(self.content.decode(), providers=["CPUExecutionProvider"]))

            def get_tensor_dtype(self, name: str) -> str:
                return "float"

            def serialize(self) -> bytes:
                return self.content

        self.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=Engine)
        self.Refitter = lambda engine, log: SimpleNamespace(
            engine=engine, get_missing_weights=lambda: trt.missing, refit_cuda_engine=lambda: True
        )

        class OnnxParserRefitter:
            def __init__(self, refitter: Any, log: Any) -> None:
                self.refitter = refitter

            def refit_from_file(self, path: str) -> bool:
                self.refitter.engine.content = path.encode()
                return not trt.missing

        self.OnnxParserRefitter = OnnxParserRefitter


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array that lies there."""
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "m.onnx")


@pytest.fixture
def trt(graph: Path, monkeypatch: pytest.MonkeyPatch) -> Tensorrt10:
    module = Tensorrt10(graph)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for place in (builders, loading):
        monkeypatch.setattr(place, "cuda_capability", lambda: (8, 7))
    monkeypatch.setattr(run_module, "_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return module


def test_a_large_batch_goes_through_in_pieces(graph: Path, trt: Tensorrt10, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    edgetrain.build_engine(graph, engine, device="orin-nano-8gb", batch=4)
    images = torch.randn(10, 3, 32, 32)
    run = run_engine(engine, images, onnx=graph)
    assert trt.batches == [4, 4, 4, 2]  # the first one loads the kernels and is not timed
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    torch.testing.assert_close(run.logits, torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    assert run.seconds > 0
    assert run.comparison is not None
    assert run.comparison.max_difference < 1e-6
    assert (run.comparison.images, run.comparison.top1_agreement) == (10, 1.0)


def test_a_difference_is_seen(graph: Path, trt: Tensorrt10, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    edgetrain.build_engine(graph, engine, device="orin-nano-8gb", batch=4)
    other = write_graph(tmp_path / "other.onnx", seed=1)
    comparison = run_engine(engine, torch.randn(4, 3, 32, 32), onnx=other).comparison
    assert comparison is not None
    assert comparison.max_difference > comparison.mean_difference > 1e-2


@pytest.mark.parametrize("shape", [(4, 3, 32, 16), (4, 1, 32, 32), (0, 3, 32, 32), (5, 3, 32, 32)])
def test_images_that_do_not_fit_are_refused(
    graph: Path, trt: Tensorrt10, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    edgetrain.build_engine(graph, tmp_path / "m.engine", device="orin-nano-8gb", batch=(2, 4, 4))
    with pytest.raises(ModelError):  # of five images, the last would be alone
        run_engine(tmp_path / "m.engine", torch.zeros(shape))


def test_a_refitted_engine_has_the_new_weights_and_says_so(graph: Path, trt: Tensorrt10, tmp_path: Path) -> None:
    engine, new = tmp_path / "m.engine", write_graph(tmp_path / "new.onnx", seed=1)
    old = edgetrain.build_engine(graph, engine, device="orin-nano-8gb", batch=4, refit=True)
    updated = refit_engine(engine, new, tmp_path / "new.engine")
    assert (updated.onnx, updated.onnx_sha256) == ("new.onnx", file_sha256(new))
    assert read_report(tmp_path / "new.engine") == updated
    assert read_report(engine) == old
    comparison = run_engine(updated.path, torch.randn(4, 3, 32, 32), onnx=new).comparison
    assert comparison is not None
    assert comparison.max_difference < 1e-6


@pytest.fixture
def exported(tmp_path: Path) -> Export:
    """A network for a device whose GPU the stand-in has."""
    model = small_network(classes=10)
    images = torch.rand((6, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return edgetrain.export_onnx(model, tmp_path / "net.onnx", input_shape=(3, 8, 8), images=images, device="xavier-nx")


def shown(labels: torch.Tensor | None = None) -> ImageSet:
    pixels = torch.rand((6, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, tuple("abcdef"), "a test", labels)


@pytest.fixture
def beside(exported: Export, trt: Tensorrt10, monkeypatch: pytest.MonkeyPatch) -> Tensorrt10:
    """The stand-in beside the GPU of that device; its engines answer as that network."""
    trt.gives = str(exported.path).encode()
    for place in (builders, loading, engine_step):
        monkeypatch.setattr(place, "cuda_capability", lambda: (7, 2))
    return trt


def test_an_engine_that_was_run_is_in_the_certificate(exported: Export, beside: Tensorrt10, tmp_path: Path) -> None:
    labels = torch.arange(6)
    report, certificate = engine_step.engine_of(
        exported, tmp_path / "net.engine", batch=4, refittable=True, images=shown(labels)
    )
    assert read_report(tmp_path / "net.engine") == report
    step = certificate.steps[-1]
    assert (step.before, step.after, step.evaluator) == ("fp32 ONNX", "engine", "tensorrt 10.3.0")
    assert (step.images, step.top1_agreement, step.accuracy_before) == (6, 1.0, step.accuracy_after)
    assert Certificate.from_json((tmp_path / "net.certificate.json").read_bytes()) == certificate
    assert certificate.engine is not None
    assert certificate.engine.name == "net.engine"


@pytest.mark.parametrize("again", [False, True])
def test_an_engine_that_disagrees_never_gets_its_name(
    again: bool, exported: Export, beside: Tensorrt10, tmp_path: Path
) -> None:
    """What stands there already, and its report, stay as they were."""
    path = tmp_path / "net.engine"
    old = engine_step.engine_of(exported, path, batch=4, refittable=True, images=shown())[0] if again else None
    other = small_network(classes=10)
    torch.nn.init.ones_(other.classifier.weight)
    wrong = edgetrain.export_onnx(other, tmp_path / "wrong.onnx", input_shape=(3, 8, 8))
    beside.gives = str(wrong.path).encode()
    with pytest.raises(ExportError, match="engine in tensorrt"):
        engine_step.engine_of(exported, path, batch=4, refittable=True, images=shown())
    assert not list(tmp_path.glob(".*"))
    assert path.exists() == again
    if old is not None:
        assert read_report(path) == old


def test_a_refitted_engine_may_have_another_name(exported: Export, beside: Tensorrt10, tmp_path: Path) -> None:
    old = engine_step.engine_of(exported, tmp_path / "net.engine", batch=4, refittable=True)[0]
    model = small_network(classes=10)
    torch.nn.init.ones_(model.classifier.weight)
    newer = edgetrain.export_onnx(model, tmp_path / "newer.onnx", input_shape=(3, 8, 8), device="xavier-nx")
    report, certificate = engine_step.refitted(newer, tmp_path / "net.engine", tmp_path / "newer.engine", shown())
    assert read_report(tmp_path / "net.engine") == old
    assert read_report(tmp_path / "newer.engine") == report
    assert report.onnx == "newer.onnx"
    assert certificate.steps[-1].max_difference < 1e-6


def test_a_weight_that_is_missing_is_named(graph: Path, trt: Tensorrt10, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    old = edgetrain.build_engine(graph, engine, device="orin-nano-8gb", batch=4, refit=True)
    trt.missing = ["head.weight"]
    with pytest.raises(ExportError, match=r"missing are head\.weight"):
        refit_engine(engine, graph)
    assert read_report(engine) == old
