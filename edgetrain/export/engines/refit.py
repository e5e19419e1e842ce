"""New weights into an engine without a build: TensorRT's refit.

The engine must have been built with ``refit=True``, and the new graph may differ from the engine's in the values of
its weights alone; both are checked from the report before a GPU is asked for. TensorRT's own ONNX refitter
(TensorRT 10 and later) then reads the new graph, matches weights by their initialisers' names and says which are
missing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgetrain.errors import ExportError
from edgetrain.export.engines.command import python_command, quoted
from edgetrain.export.engines.graph import Graph, bytes_sha256, read_graph
from edgetrain.export.engines.loading import load_engine, loadable
from edgetrain.export.engines.log import build_log, last_errors
from edgetrain.export.engines.report import EngineReport, read_report, write_engine


def refit_engine(engine: str | Path, onnx: str | Path, out: str | Path | None = None) -> EngineReport:
    """Writes ``engine`` with the weights of the graph ``onnx``.

    Args:
        out: where to; None: in place of ``engine``.

    Raises:
        StorageError: engine or report is missing, or they do not belong together.
        ExportError: the engine takes no new weights, the graph differs in more than weights, this machine has not the
            engine's GPU (the message has the command for the device), or a weight is missing.
        MissingExtraError: the engine's TensorRT is not installed.
    """
    path = Path(engine)
    report, graph = read_report(path), read_graph(onnx)
    check_refit(report, graph)
    target = path if out is None else Path(out)
    call = f"export.refit_engine({quoted(path.name)}, {quoted(graph.path.name)}, {quoted(target.name)})"
    builder = loadable(report, command=python_command(call))
    trt, log = builder.module, build_log(builder.module)
    if not hasattr(trt, "OnnxParserRefitter"):
        raise ExportError(
            found=f"{builder.name} {builder.version} has no refitter that reads ONNX",
            expected="TensorRT 10 or later",
            action="build the engine again with edgetrain.build_engine",
        )
    loaded = load_engine(builder, path, log)
    refitter = trt.Refitter(loaded, log)
    reader = trt.OnnxParserRefitter(refitter, log)
    read = reader.refit_from_file(str(graph.path))
    missing = list(refitter.get_missing_weights())
    if not read or missing or not refitter.refit_cuda_engine():
        raise ExportError(
            found=f"{path.name} does not take the weights of {graph.path.name}: "
            + (f"missing are {', '.join(missing)}" if missing else last_errors(log)),
            expected="every weight of the engine in the graph",
            action="build the engine again with edgetrain.build_engine",
        )
    content = bytes(loaded.serialize())
    updated = dataclasses.replace(
        report,
        path=target,
        engine_bytes=len(content),
        onnx=graph.path.name,
        onnx_sha256=graph.sha256,
        engine_sha256=bytes_sha256(content),
        notes=(*report.notes, f"weights of {graph.path.name}"),
    )
    write_engine(content, updated)
    return updated


def check_refit(report: EngineReport, graph: Graph) -> None:
    """Whether the engine can take the weights of ``graph``, as far as that is known without a GPU.

    Raises:
        ExportError: it cannot, and why.
    """
    if not report.refittable:
        raise ExportError(
            found=f"{report.path.name} was built without refit",
            expected="an engine that takes new weights",
            action="build it once more with refit=True, or edgetrain export --refittable",
        )
    if graph.structure_sha256 != report.structure_sha256:
        raise ExportError(
            found=f"{graph.path.name} differs from {report.onnx}, of which {report.path.name} was built, in more "
            "than the values of its weights",
            expected="the same nodes, names, types and shapes",
            action="export the new weights in the same way as the old ones, or build the engine again",
        )
