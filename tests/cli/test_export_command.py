"""``edgetrain export`` and ``edgetrain infer``, as a person and as a script use them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from edgetrain.cli.main import run
from edgetrain.cli.trained import load_run, run_images
from edgetrain.export import Certificate
from edgetrain.train.data import open_source
from edgetrain.train.run_record import RunRecord

MODELS = """
import torch
def net(num_classes, in_channels):
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                               torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, num_classes))
class Fourier(torch.nn.Sequential):
    def forward(self, x):
        return torch.fft.fft2(super().forward(x)).abs().mean((2, 3))
def fourier(num_classes, in_channels):
    return Fourier(torch.nn.Conv2d(in_channels, num_classes, 1))
"""
AMPERE = """
name = "ampere"
description = "a card that TensorRT-RTX builds for"
kind = "cuda"
unified = false
extends = "cuda"
[compute_capability]
value = 8.6
unit = "major.minor"
assumption = true
note = "of this test"
[memory]
value = 8
unit = "GiB"
assumption = true
note = "of this test"
"""
TRAIN = "train --data digits --model export_models:net --limit-train 128 --limit-test 32 --image-size 16 "
TRAIN += "--batch-size 32 --epochs 1 --mode keep_all --quiet --out run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run directory ``run`` and a folder of four images ``photos``, names of which say the class."""
    path = tmp_path_factory.mktemp("export_command")
    (path / "export_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert run(TRAIN.split()) == 0
    (path / "photos").mkdir()
    source = open_source("digits", split="test")
    for k in range(4):
        Image.fromarray(source.decode(k)[:, :, 0]).save(path / "photos" / f"{k} is {source.labels[k]}.png")
    return path


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    code = run(arguments)
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    return out


def test_training_records_the_network(folder: Path):
    record = RunRecord.read(folder / "run")
    assert (record.model, record.data, record.input_shape) == ("export_models:net", "digits", (1, 16, 16))
    assert record.classes == tuple("0123456789")
    trained = load_run(folder / "run")
    assert trained.about.plan == (folder / "run" / "plan.json").read_text()


def test_the_graph_gives_the_logits_of_training(capfd: pytest.CaptureFixture[str], folder: Path):
    """The loader normalises, then the network runs in PyTorch; the graph takes the pixels themselves."""
    import onnxruntime

    from edgetrain.train.data import Loader

    said(capfd, "export", "run", "--device", "xavier-nx", "--images", "16")
    record = RunRecord.read(folder / "run")
    source = open_source("digits", split="test", limit=12)
    shared = {"batch_size": 12, "image_size": record.input_shape, "seed": 0, "shuffle": False}
    rest = {"augment": False, "drop_last": False}
    ((seen, _),) = Loader(source, mean=record.mean, std=record.std, **shared, **rest)
    ((pixels, _),) = Loader(source, **shared, **rest)
    with torch.no_grad():
        expected = load_run(folder / "run").model.eval()(seen).numpy()
    session = onnxruntime.InferenceSession(str(folder / "run/export/model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels.numpy()})
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_a_person_reads_the_steps(capfd: pytest.CaptureFixture[str]):
    out = said(capfd, "export", "run", "--device", "nano-4gb", "--images", "16", "--out", "nano.onnx", "--explain")
    assert out.startswith("nano.onnx: ")
    assert "opset 13 (TensorRT 8.2.1 of nano-4gb reads up to 13)" in out
    assert "compared on 16 images: digits, test split" in out
    assert re.search(r"^folds: \d+ done, \d+ skipped$", out, re.MULTILINE)
    assert out.endswith("certificate: nano.certificate.json\n")


def test_out_may_be_a_folder(capfd: pytest.CaptureFixture[str]):
    Path("with.dot").mkdir()
    for folder in ("new", "with.dot"):
        document = json.loads(said(capfd, "export", "run", "--images", "4", "--out", folder, "--json"))
        assert document["path"] == f"{folder}/model.onnx"
        assert sorted(path.name for path in Path(folder).iterdir()) == ["model.certificate.json", "model.onnx"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_say_what_they_cost(precision: str, capfd: pytest.CaptureFixture[str], folder: Path):
    out = said(capfd, "export", "run", "--precision", precision, "--images", "40", "--json")
    document = json.loads(out)
    assert document["path"] == f"run/export/model-{precision}.onnx"
    certificate = Certificate.from_json((folder / document["certificate_path"]).read_bytes())
    assert document["certificate"] == json.loads(certificate.to_json())
    last = certificate.steps[-1]
    assert last.accuracy_before is not None
    assert last.accuracy_after is not None
    assert abs(last.accuracy_after - last.accuracy_before) <= 1 - last.top1_agreement
    assert certificate.calibration_source == ("digits, train split" if precision == "int8" else None)
    assert certificate.image_source == "digits, test split"


def test_images_that_are_out_of_reach_are_made_up_and_said_to_be(folder: Path):
    record = RunRecord.read(folder / "run")
    shown = run_images(record.model_copy(update={"data": "no/such/folder"}), split="test", count=8)
    assert shown.source.startswith("random numbers (no/such/folder does not exist")
    assert shown.labels is None
    again = run_images(record, split="test", count=8)
    assert again.names == run_images(record, split="test", count=8).names
    assert float(again.pixels.max()) == 1.0


def test_infer_names_classes(capfd: pytest.CaptureFixture[str]):
    said(capfd, "export", "run", "--images", "8", "--out", "infer.onnx")
    table = said(capfd, "infer", "infer.onnx", "photos")
    assert re.search(r"4 images; one alone takes \d+\.\d\d ms \(median of 10, ONNX Runtime, CPU\)", table)
    first = str(min(Path("photos").iterdir()))
    document = json.loads(said(capfd, "infer", "infer.onnx", first, "photos", "--json"))
    predictions = document["predictions"]
    assert len(predictions) == 5
    assert predictions[0] == predictions[1]  # the same image, alone and from its folder
    for prediction in predictions:
        assert sum(prediction["probabilities"]) == pytest.approx(1)
        assert prediction["label"] == str(int(np.argmax(prediction["probabilities"])))
        assert prediction["probability"] == max(prediction["probabilities"])


@pytest.mark.parametrize(
    ("inputs", "operator", "shape"), [("ab", "Add", ["n", 1, 8, 8]), ("a", "Relu", ["n", 1, 8, 8])], ids=["two", "map"]
)
def test_a_graph_that_classifies_no_images(
    inputs: str, operator: str, shape: list[str | int], capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in (*inputs, "answer")]
    node = onnx.helper.make_node(operator, list(inputs), ["answer"])
    graph = onnx.helper.make_graph([node], "g", values[:-1], values[-1:])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), str(tmp_path / "g.onnx"))
    assert run(["infer", str(tmp_path / "g.onnx"), "photos"]) == 8
    assert "logits (n, classes)" in capfd.readouterr().err


def test_a_device_without_a_builder_here_gets_the_graph_and_the_command(capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'edgetrain[tensorrt]'")
    command = "export run --format tensorrt --device nano-4gb --images 8 --out nano/net.engine"
    assert run(command.split()) == 8
    paragraph, trtexec = capfd.readouterr().err.splitlines()  # JetPack 4 has no Python for edgetrain
    assert paragraph.endswith("To do: build it on the device:")
    assert shlex.split(trtexec)[1:3] == ["--onnx=net.onnx", "--saveEngine=net.engine"]
    assert sorted(path.name for path in Path("nano").iterdir()) == ["net.certificate.json", "net.onnx"]


def test_an_engine_completes_the_certificate(capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'edgetrain[tensorrt]'")
    Path("ampere.toml").write_text(AMPERE)
    command = "export run --format tensorrt --device ampere.toml --images 8 --out ampere/net.engine --json"
    document = json.loads(said(capfd, *command.split()))
    certificate = Certificate.from_json(Path("ampere/net.certificate.json").read_bytes())
    assert json.loads(certificate.to_json()) == document["certificate"]
    assert certificate.engine is not None
    assert certificate.engine.sha256 == hashlib.sha256(Path("ampere/net.engine").read_bytes()).hexdigest()
    if not torch.cuda.is_available():  # then nothing was run, and nothing is claimed
        assert [step.after for step in certificate.steps if step.after == "engine"] == []
        assert run(["infer", "ampere/net.engine", "photos"]) == 8
        assert "no CUDA device" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("export", 2, "neither a run nor --model"),
        ("export run --model resnet20", 2, "both"),
        ("export run --format onx", 2, "onnx"),
        ("export run --refit old.engine", 2, "--format tensorrt"),
        ("export run --format tensorrt --refit old.engine --refittable", 2, "one of them"),
        ("export run --format tensorrt --out net.onnx", 2, "pass --out net.engine"),
        ("export run --out net.engine", 2, "pass --out net.onnx"),
        ("export run --precision fp8", 2, "fp32"),
        ("export run --device orin-nano", 2, "orin-nano-8gb"),
        ("export photos", 7, "run.json"),
        ("export --model no_such_net", 2, "zoo"),
        ("export run --format tensorrt", 2, "--device orin-nano-8gb"),
        ("export --model export_models:fourier --device nano-4gb", 8, "fft_fft2"),
        ("infer none.onnx photos", 7, "does not exist"),
        ("infer run photos", 7, "run is a folder"),
        ("infer export_models.py photos", 8, "refuses"),
        ("infer infer.onnx nowhere", 4, "nowhere"),
        ("infer infer.onnx run", 4, "no image"),
    ],
)
def test_mistakes(arguments: str, code: int, expected: str, capfd: pytest.CaptureFixture[str]):
    if "infer.onnx" in arguments and not Path("infer.onnx").exists():  # the test that makes it ran elsewhere
        said(capfd, "export", "run", "--images", "8", "--out", "infer.onnx")
    assert run(arguments.split()) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"edgetrain: Found: .+ Expected: .+ To do: .+\n", err), err
    assert expected in err
