"""Real engines, built by TensorRT for RTX without a GPU; what needs a GPU is marked so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from graph_variants import write_variant
from small_graphs import WEIGHTS, write_graph

import edgetrain
from edgetrain.errors import EdgetrainError, ExportError
from edgetrain.export import EngineReport, engine_weight_names, read_report
from edgetrain.export.engines.builders import cuda_capability, installed_builder
from edgetrain.export.engines.command import TRTEXEC
from edgetrain.export.engines.log import build_log
from edgetrain.export.engines.report import report_path
from edgetrain.export.precision import Precision
from edgetrain.files import file_sha256

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'edgetrain[tensorrt]'")

RESNET20_PARAMETERS = 0.27e6  # He et al. 2015, table 6
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, EngineReport]:
    """resnet20 in every precision, for 8.6 in the memory of an Orin Nano."""
    built = {}
    for precision in PRECISIONS:
        graph = write_variant("resnet20", precision, folder)
        built[precision] = edgetrain.build_engine(
            graph,
            graph.with_suffix(".engine"),
            device="orin-nano-8gb",
            compute_capability="8.6",
            precision=precision,
            batch=8,
        )
    return built


def test_an_engine_stands_beside_its_report(reports: dict[str, EngineReport]) -> None:
    for precision, report in reports.items():
        assert report.engine_bytes == report.path.stat().st_size > 0
        assert report.engine_sha256 == file_sha256(report.path)
        assert report.onnx_sha256 == file_sha256(report.path.with_suffix(".onnx"))
        assert (report.builder, report.precision, report.device) == ("tensorrt_rtx", precision, "orin-nano-8gb")
        assert json.loads(report_path(report.path).read_text())["versions"]["tensorrt_rtx"] == report.version
        assert read_report(report.path) == report
        assert "does not run there" in report.notes[0]
        assert not any("keeps its own limit" in note for note in report.notes)
    assert not list(reports["fp32"].path.parent.glob(".*"))


def test_weights_take_what_their_precision_takes(reports: dict[str, EngineReport]) -> None:
    single, half, quarter = (reports[precision].weights_bytes for precision in PRECISIONS)
    assert single is not None
    assert half is not None
    assert quarter is not None
    assert single == pytest.approx(4 * RESNET20_PARAMETERS, rel=0.05)
    assert half == pytest.approx(single / 2, rel=0.05)
    assert quarter == pytest.approx(single / 4, rel=0.15)  # biases and scales stay in fp32


def test_activations_hold_a_convolution_and_stay_within_the_device(reports: dict[str, EngineReport]) -> None:
    map_bytes = 8 * 16 * 32 * 32 * 4  # of the first stage, batch 8
    for precision, report in reports.items():
        assert report.activation_bytes is not None
        assert report.weights_bytes is not None
        assert report.workspace_limit_bytes is not None
        assert report.activation_bytes >= 2 * map_bytes / (1 if precision == "fp32" else 4)
        assert report.activation_bytes + report.weights_bytes < report.workspace_limit_bytes


def test_a_reversible_network_builds(folder: Path) -> None:
    torch.manual_seed(0)
    model = edgetrain.create_model("hybrid18", width=8, blocks=(1, 1, 1, 1))
    edgetrain.export_onnx(model, folder / "hybrid.onnx", input_shape=(3, 32, 32))
    report = edgetrain.build_engine(folder / "hybrid.onnx", folder / "hybrid.engine", compute_capability="12.0")
    assert report.engine_bytes > 0
    assert report.batch is not None
    assert report.batch.largest == 1
    assert report.device is None


def test_the_limit_of_the_workspace_holds(tmp_path: Path) -> None:
    graph, engine = write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"
    free = edgetrain.build_engine(graph, engine, compute_capability="8.6", batch=8)
    assert free.activation_bytes is not None
    (tmp_path / "m.engine").unlink()
    with pytest.raises(EdgetrainError) as refused:
        edgetrain.build_engine(graph, engine, compute_capability="8.6", batch=8, budget=free.activation_bytes // 2)
    assert "MiB" in refused.value.expected
    assert not engine.exists()
    again = edgetrain.build_engine(graph, engine, compute_capability="8.6", batch=8, budget=2 * free.activation_bytes)
    assert again.activation_bytes == free.activation_bytes


def test_a_fixed_batch_needs_no_profile(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "m.onnx", batch=4)
    assert edgetrain.build_engine(graph, tmp_path / "m.engine", compute_capability="7.5").batch is None


def test_the_precision_is_the_graphs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is an fp32 graph, and the engine is to be fp16"):
        edgetrain.build_engine(
            write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine", compute_capability="8.6", precision="fp16"
        )


def test_a_refused_node_is_named(tmp_path: Path) -> None:
    # onnx-tensorrt, docs/operators.md: Det is one of ONNX's operators that TensorRT does not have
    graph = write_graph(tmp_path / "m.onnx", extra="Det")
    with pytest.raises(ExportError, match=r"node odd \(Det\)") as refused:
        edgetrain.build_engine(graph, tmp_path / "m.engine", compute_capability="8.6")
    assert "tensorrt_rtx" in refused.value.found
    assert list(tmp_path.iterdir()) == [graph]


def test_a_layer_that_the_chip_does_not_have_is_named(tmp_path: Path) -> None:
    # TensorRT for RTX: no matrix product in fp32 for compute capability 7.5
    torch.manual_seed(0)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    edgetrain.export_onnx(classifier, tmp_path / "m.onnx", input_shape=(3, 4, 4))
    assert edgetrain.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", compute_capability="8.6").layers > 0
    with pytest.raises(ExportError, match=r"Gemm.*Turing"):
        edgetrain.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", compute_capability="7.5")


def test_a_device_that_it_does_not_know_gets_a_command(tmp_path: Path) -> None:
    if cuda_capability() is not None:
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ExportError, match=r"no engine for compute capability 8\.7") as refused:
        edgetrain.build_engine(write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine", device="orin-nano-8gb")
    assert TRTEXEC in refused.value.action


def test_weights_are_named_after_their_initialisers(tmp_path: Path) -> None:
    names = engine_weight_names(write_graph(tmp_path / "m.onnx"))
    assert names == {name: name for name in WEIGHTS}  # and not the shape that Reshape takes


def test_all_convolutions_of_a_network_have_engine_weights(folder: Path) -> None:
    import onnx

    path = write_variant("resnet20", "fp32", folder)
    graph = onnx.load(str(path)).graph
    initialisers = {tensor.name for tensor in graph.initializer}
    wanted = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]} & initialisers
    assert len(wanted) >= 19  # of the 20 layers, one is the classifier
    assert wanted <= set(engine_weight_names(path))


def test_a_timing_cache_has_no_use_here(tmp_path: Path) -> None:
    report = edgetrain.build_engine(
        write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine", compute_capability="8.6", timing_cache=tmp_path / "t"
    )
    assert any("times nothing" in note for note in report.notes)
    assert not (tmp_path / "t").exists()


def test_an_engine_that_takes_new_weights_needs_a_gpu_to_be_built(tmp_path: Path) -> None:
    if cuda_capability() is not None:
        pytest.skip("there is a CUDA device here")
    graph = write_graph(tmp_path / "m.onnx", batch=4)
    with pytest.raises(ExportError, match="only beside a CUDA device"):
        edgetrain.build_engine(graph, tmp_path / "m.engine", compute_capability="8.6", refit=True)
    # the refusal is the builder's own: it fails where it is asked all the same
    log = build_log(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(graph))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
    config.set_flag(rtx.BuilderFlag.REFIT)
    assert builder.build_serialized_network(network, config) is None
    assert any("CUDA" in error for error in log.errors)


def test_an_engine_is_not_run_without_a_gpu(reports: dict[str, EngineReport]) -> None:
    if cuda_capability() is not None:
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ExportError, match="this machine has no CUDA device"):
        edgetrain.export.run_engine(reports["fp32"].path, torch.rand(8, 3, 32, 32))


def _built_here(graph: Path, precision: Precision = "fp32", *, refit: bool = False) -> EngineReport:
    """An engine for this machine's own GPU."""
    builder, here = installed_builder("tensorrt_rtx"), cuda_capability()
    assert builder is not None
    if here not in builder.capabilities:
        pytest.skip(f"{builder.name} {builder.version} builds nothing for compute capability {here}")
    engine = graph.with_suffix(".engine")
    return edgetrain.build_engine(
        graph, engine, precision=precision, batch=(1, 4, 4), refit=refit, builder=builder.name
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_answers_as_its_graph(tmp_path: Path, precision: Precision) -> None:
    graph = write_variant("resnet20", precision, tmp_path)
    report = _built_here(graph, precision)
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(2))  # pieces of 4, 4 and 2
    run = edgetrain.export.run_engine(report.path, images, onnx=graph)
    assert run.logits.shape == (10, 10)
    assert run.seconds > 0
    assert run.comparison is not None
    # sums in another order in fp32; 2^-11 per rounding over 20 layers in fp16; a step of a 127th in INT8
    assert run.comparison.max_difference < {"fp32": 1e-5, "fp16": 2e-2, "int8": 5e-2}[precision]


@pytest.mark.gpu
def test_a_refitted_engine_answers_as_the_new_graph(tmp_path: Path) -> None:
    report = _built_here(write_graph(tmp_path / "old.onnx"), refit=True)
    new = write_graph(tmp_path / "new.onnx", seed=1)
    updated = edgetrain.export.refit_engine(report.path, new, tmp_path / "new.engine")
    assert updated.onnx_sha256 == file_sha256(new)
    run = edgetrain.export.run_engine(updated.path, torch.rand(4, 3, 32, 32), onnx=new)
    assert run.comparison is not None
    assert run.comparison.max_difference < 1e-5
