"""An ONNX graph written node by node: values with static shapes, constants that are equal are one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import ModelProto

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Value:
    """What a node gives, or an input: its name, shape and element type."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class Graph:
    """Nodes in the order in which they are to run.

    Args:
        opset: of the standard operators; nothing else is used.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._nodes: list[Any] = []
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], tuple[Value, Array]] = {}
        self._inputs: list[Value] = []
        self._outputs: list[tuple[str, Value]] = []
        self._scope = ""

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What it is given."""
        return tuple(self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What it hands out."""
        return tuple(name for name, _ in self._outputs)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Inside, the names of nodes begin with ``name``."""
        before, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = before

    def input(self, name: str, shape: Sequence[int], dtype: Any) -> Value:
        """A new input."""
        value = Value(name, tuple(shape), np.dtype(dtype))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: Value) -> None:
        """``value`` is handed out as ``name``."""
        self._outputs.append((name, value))

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """``array``, kept in the file once."""
        array = np.asarray(array, dtype)
        key = array.tobytes(), array.dtype.str, array.shape
        if key not in self._constants:
            value = Value(f"constant_{len(self._constants)}", array.shape, array.dtype)
            self._constants[key] = value, array
        return self._constants[key][0]

    def node(
        self, operator: str, inputs: Sequence[Value | None], shape: Sequence[int], dtype: Any = None, **attributes: Any
    ) -> Value:
        """The only result of a new node; its type is that of the first input unless given."""
        first = next(value for value in inputs if value is not None)
        return self.nodes(operator, inputs, [(shape, first.dtype if dtype is None else dtype)], **attributes)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[Value | None],
        results: Sequence[tuple[Sequence[int], Any]],
        **attributes: Any,
    ) -> list[Value]:
        """The results of a new node, of the given shapes and types."""
        from onnx import helper

        name = f"{self._scope}{operator}_{len(self._nodes)}"
        ends = [f"{name}:{k}" for k in range(len(results))]
        names = ["" if value is None else value.name for value in inputs]
        self._nodes.append(helper.make_node(operator, names, ends, name=name, **attributes))
        return [
            Value(end, tuple(int(size) for size in shape), np.dtype(dtype))
            for end, (shape, dtype) in zip(ends, results, strict=True)
        ]

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """``value`` with another shape; the runtime copies nothing."""
        if value.shape == tuple(shape):
            return value
        return self.node("Reshape", [value, self.constant(list(shape), np.int64)], shape)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """``value`` with its dimensions in ``order``."""
        if list(order) == list(range(len(order))):
            return value
        moved = [k for k in order if value.shape[k] != 1]
        shape = [value.shape[k] for k in order]
        if moved == sorted(moved):
            return self.reshape(value, shape)
        return self.node("Transpose", [value], shape, perm=list(order))

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """``start`` to ``stop`` of ``axis``."""
        if (start, stop) == (0, value.shape[axis]):
            return value
        shape = [*value.shape[:axis], stop - start, *value.shape[axis + 1 :]]
        edges = [self.constant([edge], np.int64) for edge in (start, stop, axis)]
        return self.node("Slice", [value, *edges], shape)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """``values`` one after the other along ``axis``."""
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.node("Concat", values, shape, axis=axis)

    def cast(self, value: Value, dtype: Any) -> Value:
        """``value`` as ``dtype``."""
        from onnx import helper

        if value.dtype == np.dtype(dtype):
            return value
        return self.node("Cast", [value], value.shape, dtype, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """``value`` repeated to ``shape``."""
        if value.shape == tuple(shape):
            return value
        return self.node("Expand", [value, self.constant(list(shape), np.int64)], shape)

    def sum(self, value: Value, axes: Sequence[int], *, keepdims: bool) -> Value:
        """Sums over ``axes``."""
        kept = [1 if k in axes else size for k, size in enumerate(value.shape)]
        shape = kept if keepdims else [size for k, size in enumerate(value.shape) if k not in axes]
        places = self.constant(list(axes), np.int64)
        return self.node("ReduceSum", [value, places], shape, keepdims=int(keepdims))

    def model(self, name: str) -> ModelProto:
        """The graph as a checked model; what nothing needs is left out."""
        from onnx import checker, helper, numpy_helper

        nodes, needed = [], {value.name for _, value in self._outputs}
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                nodes.append(copy.deepcopy(node))  # they get other names below
                needed.update(node.input)
        nodes.reverse()
        renamed = self._named_outputs(nodes)
        constants = [
            numpy_helper.from_array(array, value.name)
            for value, array in self._constants.values()
            if value.name in needed
        ]
        graph = helper.make_graph(
            nodes + renamed,
            name,
            [_info(value.name, value) for value in self._inputs],
            [_info(name, value) for name, value in self._outputs],
            constants,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], producer_name="edgetrain", ir_version=8
        )
        checker.check_model(model)
        return model

    def _named_outputs(self, nodes: list[Any]) -> list[Any]:
        """Gives what is handed out its name; a copy where it has one already: an input, a constant, another output."""
        from onnx import helper

        made = {name for node in nodes for name in node.output}
        names: dict[str, str] = {}
        copies = []
        for name, value in self._outputs:
            if value.name in made and value.name not in names:
                names[value.name] = name
            else:
                copies.append(helper.make_node("Identity", [names.get(value.name, value.name)], [name], name=name))
        for node in nodes:
            for places in (node.input, node.output):
                for k, place in enumerate(places):
                    places[k] = names.get(place, place)
        return copies


def _info(name: str, value: Value) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
