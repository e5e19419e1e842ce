"""What a person runs on the device where no engine can be built or run here.

``trtexec`` comes with every JetPack and takes an ONNX graph without Python; its options changed at two releases
(TensorRT 8.4: ``--memPoolSize`` for ``--workspace``, both in MiB; 11: the precision comes from the graph alone), so
the release named in the device's profile decides which are printed.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.export.engines.batch import Batch, shape_at
from edgetrain.export.engines.graph import Graph
from edgetrain.export.engines.limits import Limits, own_budget_bytes
from edgetrain.export.precision import Precision
from edgetrain.export.tensorrt_operators import parse_version
from edgetrain.units import MIB

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
"""Where JetPack puts it."""


def trtexec_command(
    graph: Graph,
    engine: Path,
    *,
    precision: Precision,
    batch: Batch | None,
    limits: Limits,
    profile: Profile | None = None,
    refit: bool = False,
    timing_cache: Path | None = None,
) -> str:
    """The command line that builds the same engine on the device.

    Args:
        engine: what to call it; only the name's last part is used, as are those of the other files.
        batch: smallest, usual and largest; None: the graph's batch is fixed.
        profile: of the device; its TensorRT decides the options, those of release 10 hold where it names none.
    """
    release = _release(profile)
    words = [TRTEXEC, f"--onnx={graph.path.name}", f"--saveEngine={engine.name}"]
    if batch is not None:
        for option, size in (("min", batch.smallest), ("opt", batch.usual), ("max", batch.largest)):
            shapes = (f"{tensor.name}:{'x'.join(map(str, shape_at(tensor, size)))}" for tensor in graph.inputs)
            words.append(f"--{option}Shapes={','.join(shapes)}")
    if limits.workspace_bytes is not None:
        mebibytes = limits.workspace_bytes // MIB
        words.append(f"--workspace={mebibytes}" if release < (8, 4) else f"--memPoolSize=workspace:{mebibytes}")
    if precision == "fp32":
        words.append("--noTF32")
    elif release < (11, 0):
        words.append(f"--{precision}")
    if refit:
        words.append("--refit")
    if timing_cache is not None:
        words.append(f"--timingCacheFile={timing_cache.name}")
    return shlex.join(words)


def build_commands(
    graph: Graph,
    engine: Path,
    *,
    profile: Profile | None,
    precision: Precision,
    batch: Batch | None,
    limits: Limits,
    refit: bool,
    timing_cache: Path | None,
) -> str:
    """One command per line: ``trtexec``, and edgetrain itself where the device has a Python that takes it."""
    lines = [
        trtexec_command(
            graph,
            engine,
            precision=precision,
            batch=batch,
            limits=limits,
            profile=profile,
            refit=refit,
            timing_cache=timing_cache,
        )
    ]
    if profile is not None and profile.training == "pytorch":
        options = [f"device={quoted(profile.name)}", f"precision={quoted(precision)}"]
        if batch is not None:
            options.append(f"batch=({batch.smallest}, {batch.usual}, {batch.largest})")
        if limits.budget_bytes != own_budget_bytes(profile):
            options.append(f"budget={limits.budget_bytes}")
        options += ["refit=True"] if refit else []
        call = f"build_engine({quoted(graph.path.name)}, {quoted(engine.name)}, {', '.join(options)})"
        lines.append(python_command(call))
    return "\n".join(lines)


def python_command(call: str) -> str:
    """The command line that makes ``call``, a call of a function of :mod:`edgetrain`."""
    return f"python -c {shlex.quote(f'import edgetrain; print(edgetrain.{call})')}"


def quoted(text: str) -> str:
    """A Python string in double quotes, which a shell's single quotes leave readable."""
    return json.dumps(text, ensure_ascii=False)


def _release(profile: Profile | None) -> tuple[int, int]:
    """Major and minor of the device's TensorRT; 10.0 where the profile names none."""
    named = None if profile is None else profile.software.tensorrt
    return (10, 0) if named is None else parse_version(named.value)
