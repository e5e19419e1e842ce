"""Runs an engine on the GPU it was built for, and compares it with its graph in ONNX Runtime.

Device memory is PyTorch's: the engine gets the addresses of tensors and PyTorch's current stream. A batch above the
engine's largest goes through in pieces. A first batch is not timed: it loads kernels, and TensorRT for RTX compiles
them then. Needs TensorRT 8.5 or later, which addresses tensors by name.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain.errors import ExportError, ModelError
from edgetrain.export.engines.builders import Builder
from edgetrain.export.engines.command import TRTEXEC, python_command, quoted
from edgetrain.export.engines.loading import load_engine, loadable
from edgetrain.export.engines.log import build_log
from edgetrain.export.engines.report import EngineReport, read_report
from edgetrain.export.images import ImageSet, as_image_set
from edgetrain.export.proof import GRAPH
from edgetrain.export.verify import BOUNDS, Comparison, compare, open_session, run_session

if TYPE_CHECKING:
    from torch import Tensor

_DEVICE = "cuda"
ENGINE_BOUNDS = BOUNDS | {"fp32": 1e-3}
"""Largest accepted difference by precision: an engine's kernels may transform a convolution (Winograd), which rounds
more than another order of the sums."""


@dataclass(frozen=True)
class EngineRun:
    """What an engine answered.

    Attributes:
        logits: (n, classes), float32, on the CPU.
        seconds: of one pass over all images, copies to and from the GPU included.
        comparison: with ONNX Runtime; None: no graph was given.
    """

    logits: Tensor
    seconds: float
    comparison: Comparison | None


def run_engine(path: str | Path, images: Tensor, *, onnx: str | Path | None = None) -> EngineRun:
    """Logits of ``images`` from the engine in ``path``.

    Args:
        images: (n, c, h, w), float32, as the graph takes them.
        onnx: the graph that the engine was built from, to compare with.

    Raises:
        StorageError: engine or report is missing, or they do not belong together.
        ExportError: this machine cannot run it; the message has the command for the device.
        ModelError: the images are not what the engine takes.
        MissingExtraError: the engine's TensorRT, or onnxruntime, is not installed.
    """
    path = Path(path)
    report = read_report(path)
    shape = ", ".join(map(str, images.shape))
    call = f'export.run_engine({quoted(path.name)}, __import__("torch").rand({shape}))'
    builder = loadable(report, command=python_command(call))
    _check_images(report, images)
    logits, seconds = _passes(builder, report, images)
    if onnx is None:
        return EngineRun(logits, seconds, None)
    shown = as_image_set(images, (images.shape[1], images.shape[2], images.shape[3]))
    return EngineRun(logits, seconds, compare_engine(report, logits, shown, onnx=onnx))


def _check_images(report: EngineReport, images: Tensor) -> None:
    fits = len(report.inputs) == 1 and len(report.outputs) == 1 and len(images) > 0
    if not fits or tuple(images.shape[1:]) != report.inputs[0].shape[1:]:
        raise ModelError(
            found=f"images of shape {tuple(images.shape)}",
            expected=f"inputs {[(tensor.name, tensor.shape) for tensor in report.inputs]} and one output",
            action="resize the images to the network's input",
        )


def _passes(builder: Builder, report: EngineReport, images: Tensor) -> tuple[Tensor, float]:
    """Logits of all images, (n, classes), and the seconds that they took after a first batch."""
    import torch

    log = build_log(builder.module)
    engine = load_engine(builder, report.path, log)
    context = engine.create_execution_context()
    if not hasattr(context, "execute_async_v3"):
        raise ExportError(
            found=f"{builder.name} {builder.version} does not address tensors by name",
            expected="TensorRT 8.5 or later",
            action=f"run it with {TRTEXEC} --loadEngine={report.path.name}",
        )
    fixed = report.inputs[0].shape[0]
    largest = report.batch.largest if report.batch is not None else int(fixed)
    smallest = report.batch.smallest if report.batch is not None else int(fixed)
    pieces = images.float().split(largest)
    if len(pieces[-1]) < smallest:
        raise ModelError(
            found=f"{len(images)} images, the last {len(pieces[-1])} of them together",
            expected=f"{smallest} to {largest} at once, as {report.path.name} was built for",
            action="pass another number of images, or build with batch=(1, n, n)",
        )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _pass(builder, engine, context, report, pieces[0], stream)
        began = time.perf_counter()
        answers = [_pass(builder, engine, context, report, piece, stream) for piece in pieces]
        seconds = time.perf_counter() - began
    return torch.cat(answers), seconds


def _pass(builder: Builder, engine: Any, context: Any, report: EngineReport, images: Tensor, stream: Any) -> Tensor:
    """Logits of at most the largest batch, (n, classes), on the CPU."""
    import torch

    given, answer = report.inputs[0].name, report.outputs[0].name
    taken = images.to(_DEVICE, dtype=_torch_type(builder, engine, given)).contiguous()
    context.set_input_shape(given, tuple(taken.shape))
    logits = torch.empty(
        tuple(context.get_tensor_shape(answer)), dtype=_torch_type(builder, engine, answer), device=_DEVICE
    )
    context.set_tensor_address(given, taken.data_ptr())
    context.set_tensor_address(answer, logits.data_ptr())
    if not context.execute_async_v3(stream.cuda_stream):
        raise ExportError(
            found=f"{report.path.name} failed on {len(images)} images",
            expected="a pass through the engine",
            action="build it again on this machine with edgetrain.build_engine",
        )
    return logits.float().cpu()  # waits for the stream


def _torch_type(builder: Builder, engine: Any, name: str) -> Any:
    """PyTorch's type of a tensor of the engine."""
    import torch

    return torch.float16 if engine.get_tensor_dtype(name) == builder.module.DataType.HALF else torch.float32


def compare_engine(report: EngineReport, logits: Tensor, images: ImageSet, *, onnx: str | Path) -> Comparison:
    """An engine's ``logits`` of ``images`` against those of its graph in ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    return compare(
        run_session(open_session(onnx), images.pixels.numpy()),
        logits.numpy(),
        before=f"{report.precision} {GRAPH}",
        after="engine",
        evaluator=f"{report.builder} {report.version}",
        bound=ENGINE_BOUNDS[report.precision],
        labels=None if images.labels is None else images.labels.numpy(),
    )
