"""What has to be known of an ONNX graph before an engine is built from it, read without its weights' values.

The precision of a graph is read off its tensors: ``int8`` where it quantises (QuantizeLinear, DequantizeLinear),
``fp16`` where more bytes of its floating-point weights are half than single precision, else ``fp32``.
The digest of the structure covers all but the values of the weights: two graphs with equal digests differ in nothing
else, so an engine of one can be refitted with the weights of the other.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrain.errors import ExportError
from edgetrain.export.graph import missing
from edgetrain.export.precision import Precision
from edgetrain.files import file_sha256

_QUANTISING = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class TensorInfo:
    """An input or output.

    Attributes:
        dtype: ONNX's name of the element type, such as ``FLOAT``.
        shape: a number, or the name of a dimension that is left open.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """A node's name (its first output where it has none) and operator."""

    name: str
    operator: str


@dataclass(frozen=True)
class Graph:
    """An ONNX graph as :func:`read_graph` found it.

    Attributes:
        weight_names: of its initialisers, in file order.
        weight_bytes: of all initialisers.
        sha256: of the file.
        structure_sha256: of the graph without the values of its initialisers.
    """

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: tuple[Node, ...]
    precision: Precision
    weight_names: tuple[str, ...]
    weight_bytes: int
    sha256: str
    structure_sha256: str


def read_graph(path: str | Path) -> Graph:
    """The graph in ``path``.

    Raises:
        ExportError: the file is missing or no ONNX graph.
        MissingExtraError: onnx is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise missing("onnx") from error
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(
            found=f"{path} cannot be read as an ONNX graph ({error})",
            expected="a file that edgetrain export or edgetrain.export_onnx wrote",
            action="check the path, or export the model again",
        ) from error
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in weights.values()):
        raise ExportError(
            found=f"{path} keeps its weights in other files",
            expected="one file, so that its digest covers them",
            action="export it again with edgetrain, or join it with onnx.save",
        )
    item_bytes = {name: _item_bytes(tensor.data_type) for name, tensor in weights.items()}
    return Graph(
        path=path,
        inputs=tuple(_tensor(value) for value in graph.input if value.name not in weights),
        outputs=tuple(_tensor(value) for value in graph.output),
        nodes=tuple(Node(node.name or node.output[0], node.op_type) for node in graph.node),
        precision=_precision(graph),
        weight_names=tuple(weights),
        weight_bytes=sum(math.prod(tensor.dims) * item_bytes[name] for name, tensor in weights.items()),
        sha256=file_sha256(path),
        structure_sha256=_structure(model),
    )


def bytes_sha256(content: bytes) -> str:
    """Digest of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def _precision(graph: Any) -> Precision:
    from onnx import TensorProto

    if any(node.op_type in _QUANTISING for node in graph.node):
        return "int8"
    sizes = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 0}
    for tensor in graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += math.prod(tensor.dims) * _item_bytes(tensor.data_type)
    return "fp16" if sizes[TensorProto.FLOAT16] > sizes[TensorProto.FLOAT] else "fp32"


def _structure(model: Any) -> str:
    import onnx

    bare = onnx.ModelProto()
    bare.opset_import.extend(model.opset_import)
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    for node in bare.graph.node:
        node.doc_string = ""
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def _tensor(value: Any) -> TensorInfo:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim)
    return TensorInfo(value.name, TensorProto.DataType.Name(tensor.elem_type), shape)


def _item_bytes(data_type: int) -> int:
    from onnx import helper

    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
