"""Classes of images by an exported graph, or by an engine where a CUDA device is there.

The file says itself what it needs: its input shape, its classes and its normalisation stand in the metadata of the
graph; an engine has them in the certificate beside it. Images are brought to the input shape as in training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrain.errors import DataError, ExportError, StorageError
from edgetrain.export.certificate import Certificate, certificate_path
from edgetrain.export.verify import open_session, run_session
from edgetrain.train.data.decode import IMAGE_SUFFIXES, decode_image
from edgetrain.train.data.fit import fit_image

_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image.

    Attributes:
        image: its path.
        label: the most probable class; its number where the file names none.
        probability: of that class, 0..1.
        probabilities: of all classes, in their order.
    """

    image: str
    label: str
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Inference:
    """Predictions and what they took.

    Attributes:
        predictions: one per image, in the order given.
        latency_ms: the median time of one image alone, without reading it from disk.
        runs: how many times it was measured.
        evaluator: what ran the network.
    """

    predictions: tuple[Prediction, ...]
    latency_ms: float
    runs: int
    evaluator: str


def infer(path: str | Path, images: Sequence[str | Path], *, timing_runs: int = 10) -> Inference:
    """Classifies ``images``, files or folders of them, by the graph or engine in ``path``.

    Raises:
        DataError: a path is missing, a folder without images, or an image damaged.
        ExportError: the file does not run here; for an engine the message has the command for its device.
        StorageError: there is no such file, or an engine has no report and certificate beside it.
    """
    path = Path(path)
    if not path.is_file():
        raise StorageError(
            found=f"{path} is a folder" if path.is_dir() else f"{path} does not exist",
            expected="a graph (.onnx) or an engine (.engine) that edgetrain export wrote",
            action="check the path, or run edgetrain export RUN",
        )
    files = _image_files(images)
    network = _open_engine(path) if path.suffix == ".engine" else _open_graph(path)
    predictions: list[Prediction] = []
    for start in range(0, len(files), _BATCH):
        part = files[start : start + _BATCH]
        pixels = np.stack([_read(file, network.shape) for file in part])  # (n, c, h, w)
        rows = softmax(network.run(pixels)[0])
        predictions += [_prediction(str(file), row, network.classes) for file, row in zip(part, rows, strict=True)]
    times = [network.run(pixels[:1])[1] for _ in range(timing_runs)]
    return Inference(
        tuple(predictions),
        latency_ms=1e3 * float(np.median(times)),
        runs=timing_runs,
        evaluator=network.evaluator,
    )


@dataclass(frozen=True)
class _Network:
    """An opened file; ``run`` gives logits (n, classes) of pixels (n, c, h, w), and the seconds they took."""

    shape: tuple[int, int, int]
    classes: Sequence[str]
    evaluator: str
    run: Callable[[npt.NDArray[np.float32]], tuple[npt.NDArray[np.float32], float]]


def _open_graph(path: Path) -> _Network:
    session = open_session(path)
    metadata = session.get_modelmeta().custom_metadata_map

    def run(pixels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
        began = time.perf_counter()
        logits = run_session(session, pixels)
        return logits, time.perf_counter() - began

    given, answer = session.get_inputs(), session.get_outputs()[0]
    if len(given) != 1 or len(answer.shape) != 2:
        raise ExportError(
            found=f"{path} takes {len(given)} input(s) and gives {answer.name} of shape {answer.shape}",
            expected="one input of images, and logits (n, classes)",
            action="pass a graph that edgetrain export wrote",
        )
    shape = _input_shape(given[0].shape, path)
    return _Network(shape, json.loads(metadata.get("classes") or "[]"), "ONNX Runtime, CPU", run)


def _open_engine(path: Path) -> _Network:
    import torch

    from edgetrain.export.engines.report import read_report
    from edgetrain.export.engines.run import run_engine

    report = read_report(path)
    beside = certificate_path(path)
    classes = Certificate.from_json(beside.read_bytes()).classes if beside.is_file() else ()

    def run(pixels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
        answer = run_engine(path, torch.from_numpy(pixels))
        return answer.logits.numpy(), answer.seconds

    return _Network(_input_shape(report.inputs[0].shape, path), classes, f"{report.builder} {report.version}", run)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities (n, classes) of ``logits``."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _prediction(image: str, probabilities: npt.NDArray[np.float64], classes: Sequence[str]) -> Prediction:
    best = int(probabilities.argmax())
    label = classes[best] if best < len(classes) else str(best)
    return Prediction(image, label, float(probabilities[best]), tuple(map(float, probabilities)))


def _image_files(images: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for entry in map(Path, images):
        if entry.is_dir():
            inside = sorted(p for p in entry.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(
                    found=f"no image in {entry}",
                    expected="files such as " + ", ".join(IMAGE_SUFFIXES[:4]),
                    action="name another folder",
                )
            files += inside
        elif entry.is_file():
            files.append(entry)
        else:
            raise DataError(
                found=f"{entry} does not exist", expected="an image or a folder of images", action="check the path"
            )
    if not files:
        raise DataError(found="no images", expected="an image or a folder of images", action="name one")
    return files


def _input_shape(shape: Sequence[int | str], path: Path) -> tuple[int, int, int]:
    sizes = [size for size in shape[1:] if isinstance(size, int)]
    if len(shape) != 4 or len(sizes) != 3 or sizes[0] not in (1, 3):
        raise ExportError(
            found=f"{path} takes an input of shape {list(shape)}",
            expected="images (n, 1 or 3, height, width)",
            action="pass a graph that edgetrain export wrote",
        )
    return sizes[0], sizes[1], sizes[2]


def _read(file: Path, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    pixels = decode_image(str(file), path=str(file), channels=shape[0], size=shape[1:])
    image = fit_image(pixels, shape)  # (h, w, c)
    return image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)  # (c, h, w)
