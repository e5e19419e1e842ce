"""From an ONNX graph to a TensorRT engine, inside the memory of the device it is for.

One path drives ``tensorrt`` (8.2 to 10, on the device itself) and ``tensorrt_rtx`` (for a compute capability that is
named, without a GPU). Where releases differ the part in question is asked for by name: memory pools, precision flags,
strongly typed networks, target chips, timing caches.

A release that has precision flags may compute an fp32 graph in half precision; one that has none takes every type
from the graph, so that graph and precision have to agree. INT8 always comes from a graph with quantisation nodes;
engines are never calibrated here. ``fp32`` means just that: TF32, which keeps 10 bits of the mantissa, is off.

An engine cannot be tried without a GPU. What is checked here: that the builder makes it within the limits, and that
weights and activations fit the budget together. :mod:`edgetrain.export.engines.run` runs it.
"""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.errors import ExportError
from edgetrain.export.engines.batch import batch_for
from edgetrain.export.engines.builders import Builder, Capability, choose_builder
from edgetrain.export.engines.command import build_commands
from edgetrain.export.engines.configure import Order, check_precision, configuration
from edgetrain.export.engines.device import target_for
from edgetrain.export.engines.graph import bytes_sha256, read_graph
from edgetrain.export.engines.limits import check_fits, limits_for
from edgetrain.export.engines.log import BuildLog, build_log, last_errors
from edgetrain.export.engines.parsing import is_typed, network_of, weight_names
from edgetrain.export.engines.report import EngineReport, write_engine
from edgetrain.export.engines.timing import TimingCache
from edgetrain.export.precision import Precision
from edgetrain.units import parse_size

if TYPE_CHECKING:
    from edgetrain.profiles import Profile


def build_engine(
    onnx: str | Path,
    engine: str | Path,
    *,
    device: str | Path | Profile | None = None,
    precision: Precision = "fp32",
    batch: int | tuple[int, int, int] | None = None,
    budget: str | int | None = None,
    compute_capability: str | Capability | None = None,
    refit: bool = False,
    timing_cache: str | Path | None = None,
    builder: str | None = None,
) -> EngineReport:
    """Builds ``engine`` from the graph ``onnx`` and writes it with its report, ``<engine>.json``.

    Args:
        device: profile of the device that will run it: compute capability and memory; None: this machine's GPU.
        precision: ``fp32``, ``fp16`` or ``int8``.
        batch: n: 1 to n samples, tuned for n; or smallest, usual and largest; None: one sample, or the graph's
            fixed batch.
        budget: memory that weights and activations may take together; None: what the profile says.
        compute_capability: of the chip to build for, such as ``"8.6"``, in place of the profile's: for a device that
            no profile describes, or to see on another chip that graph and memory are right.
        refit: the engine takes new weights later (:func:`edgetrain.export.refit_engine`).
        timing_cache: file that keeps what the builder measured, read and written; makes the next build faster.
        builder: ``tensorrt`` or ``tensorrt_rtx``; None: the first that can.

    Raises:
        UsageError: an argument is wrong, or no chip is named and there is none here.
        MissingExtraError: no TensorRT is installed.
        ExportError: none can build for the device (the message has the command for the device), the parser refuses
            a node, or the builder fails. No file is left under ``engine``.
        BudgetError: the engine does not fit the budget.
        StorageError: the engine cannot be written.
    """
    graph, path = read_graph(onnx), Path(engine)
    target = target_for(device, compute_capability)
    order = Order(
        graph=graph,
        engine=path,
        target=target,
        precision=precision,
        batch=batch_for(graph, batch),
        limits=limits_for(
            target.profile,
            target.capabilities,
            weight_bytes=graph.weight_bytes,
            budget_bytes=None if budget is None else parse_size(budget),
        ),
        refit=refit,
        timing=TimingCache(None if timing_cache is None else Path(timing_cache)),
    )
    commands = build_commands(
        graph,
        path,
        profile=target.profile,
        precision=precision,
        batch=order.batch,
        limits=order.limits,
        refit=refit,
        timing_cache=order.timing.path,
    )
    return _build(choose_builder(target.capability, name=builder, refit=refit, command=commands), order)


def _build(builder: Builder, order: Order) -> EngineReport:
    trt, log = builder.module, build_log(builder.module)
    check_precision(builder, order)
    began = time.perf_counter()
    trt_builder = trt.Builder(log)
    network, parser = network_of(builder, trt_builder, order.graph, log, typed=is_typed(builder))
    config, notes = configuration(builder, trt_builder, order)
    names = weight_names(builder, order.graph) if order.refit else {}
    layers = int(network.num_layers)
    content = trt_builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - began
    del parser  # what the network refers to is its own; it had to live until here
    if content is None:
        raise _failed(builder, order, log)
    check_fits(order.limits, log.memory_bytes)
    plan = bytes(content)
    report = EngineReport(
        path=order.engine,
        builder=builder.name,
        version=builder.version,
        device=order.target.name,
        compute_capability=order.target.capability,
        precision=order.precision,
        batch=order.batch,
        workspace_limit_bytes=order.limits.workspace_bytes,
        activation_bytes=log.memory_bytes.get("activation"),
        weights_bytes=log.memory_bytes.get("weights"),
        scratch_bytes=log.memory_bytes.get("scratch"),
        engine_bytes=len(plan),
        layers=layers,
        seconds=round(seconds, 3),
        refittable=order.refit,
        weight_names=names,
        inputs=order.graph.inputs,
        outputs=order.graph.outputs,
        onnx=order.graph.path.name,
        onnx_sha256=order.graph.sha256,
        structure_sha256=order.graph.structure_sha256,
        engine_sha256=bytes_sha256(plan),
        versions=_versions(builder),
        notes=(*order.target.notes, *notes, *log.warnings),
    )
    write_engine(plan, report)
    order.timing.save(config)
    return report


def _failed(builder: Builder, order: Order, log: BuildLog) -> ExportError:
    """Why the builder gave no engine, as an error."""
    return ExportError(
        found=f"{builder.name} {builder.version} builds no engine from {order.graph.path.name}: {last_errors(log)}",
        expected=f"an engine within {order.limits.text()}",
        action="raise the budget, take a smaller batch, or change the layer that it names",
    )


def _versions(builder: Builder) -> dict[str, str]:
    found = {"python": platform.python_version(), builder.name: builder.version}
    for package in ("edgetrain", "onnx"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
