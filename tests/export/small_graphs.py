"""Hand-made graphs of a few nodes for the tests of engines, and the parts of TensorRT 8.2 that they touch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

WEIGHTS = ("stem.weight", "stem.bias", "head.weight", "head.bias")
WEIGHT_COUNT = 16 * 3 * 9 + 16 + 10 * 16 + 10


def write_graph(
    path: Path, *, seed: int = 0, batch: int | str = "batch", dtype: Any = np.float32, extra: str = ""
) -> Path:
    """Convolution, ReLU, global pooling, 1x1 convolution, reshape; ``extra``: an operator put before the reshape."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(seed)
    shapes = dict(zip(WEIGHTS, [(16, 3, 3, 3), (16,), (10, 16, 1, 1), (10,)], strict=True))
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(dtype), name) for name, shape in shapes.items()
    ]
    tensors.append(numpy_helper.from_array(np.array([-1, 10], np.int64), "logits.shape"))
    nodes = [
        helper.make_node("Conv", ["images", *WEIGHTS[:2]], ["a"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Conv", ["c", *WEIGHTS[2:]], ["d"], "head"),
    ]
    nodes += [helper.make_node(extra, ["d"], ["e"], "odd")] if extra else []
    nodes.append(helper.make_node("Reshape", ["e" if extra else "d", "logits.shape"], ["logits"], "flatten"))
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    given = helper.make_tensor_value_info("images", element, [batch, 3, 32, 32])
    answer = helper.make_tensor_value_info("logits", element, [batch, 10])
    graph = helper.make_graph(nodes, "small", [given], [answer], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


class Tensorrt82(ModuleType):
    """What the build path touches of TensorRT 8.2's interface, recorded: no memory pools, no strong types.

    From the reference of TensorRT 8.2.3: ``IBuilderConfig.max_workspace_size``, ``BuilderFlag`` with FP16, INT8, REFIT
    and TF32, ``NetworkDefinitionCreationFlag.EXPLICIT_BATCH`` and ``Builder.max_batch_size``.
    """

    __version__ = "8.2.3.0"

    def __init__(self, *, gives: bytes | None = b"plan") -> None:
        super().__init__("tensorrt")
        trt = self
        self.gives = gives
        self.flags: set[str] = {"TF32"}
        self.profiles: list[dict[str, Any]] = []
        self.network_flags = -1
        self.config: Any = None
        self.BuilderFlag = SimpleNamespace(FP16="FP16", INT8="INT8", REFIT="REFIT", TF32="TF32")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)

        class Config:
            max_workspace_size = 0
            kept: bytes | None = None

            def set_flag(self, flag: str) -> None:
                trt.flags.add(flag)

            def clear_flag(self, flag: str) -> None:
                trt.flags.discard(flag)

            def add_optimization_profile(self, profile: Any) -> None:
                trt.profiles.append(profile.shapes)

            def create_timing_cache(self, content: bytes) -> bytes | None:
                return None if content == b"of another release" else content

            def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
                self.kept = cache
                return not ignore_mismatch

            def get_timing_cache(self) -> Any:
                return SimpleNamespace(serialize=lambda: (self.kept or b"") + b"+timed")

        class Profile:
            def __init__(self) -> None:
                self.shapes: dict[str, Any] = {}

            def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
                self.shapes[name] = shapes

        class Builder:
            max_batch_size = 1

            def __init__(self, log: Any) -> None:
                self.log = log

            def create_network(self, flags: int) -> Any:
                trt.network_flags = flags
                return SimpleNamespace(num_layers=5)

            def create_builder_config(self) -> Config:
                trt.config = Config()
                return trt.config

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
                self.log.log(3, "Total Scratch Memory: 100")
                self.log.log(3, "Total Activation Memory: 5000")
                self.log.log(1 if trt.gives is None else 2, "said by the builder")
                return trt.gives

        class OnnxParser:
            num_errors = 0

            def __init__(self, network: Any, log: Any) -> None:
                del network, log

            def parse_from_file(self, path: str) -> bool:
                return Path(path).exists()

        class ILogger:
            pass

        self.Builder, self.OnnxParser, self.ILogger = Builder, OnnxParser, ILogger
