"""What an engine is built from and for, as far as no TensorRT has to be installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import WEIGHT_COUNT, WEIGHTS, Tensorrt82, write_graph

import edgetrain
from edgetrain.errors import BudgetError, EdgetrainError, ExportError, MissingExtraError, StorageError, UsageError
from edgetrain.export.engines import builders, command, loading
from edgetrain.export.engines.batch import Batch, batch_for
from edgetrain.export.engines.device import target_for
from edgetrain.export.engines.graph import read_graph
from edgetrain.export.engines.limits import Limits, check_fits, limits_for, set_limits
from edgetrain.export.engines.refit import check_refit
from edgetrain.export.engines.report import read_report, report_path
from edgetrain.profiles import load_profile, profile_names
from edgetrain.units import GIB, KIB, MIB


@pytest.fixture
def graph_path(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "m.onnx")


@pytest.fixture
def classic(monkeypatch: pytest.MonkeyPatch) -> Tensorrt82:
    """TensorRT 8.2 beside a GPU of compute capability 5.3, and nothing else."""
    module = Tensorrt82()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(builders, "cuda_capability", lambda: (5, 3))
    return module


def test_a_graph_says_its_precision_and_weights(tmp_path: Path) -> None:
    single = read_graph(write_graph(tmp_path / "single.onnx"))
    half = read_graph(write_graph(tmp_path / "half.onnx", dtype=np.float16))
    assert (single.precision, half.precision) == ("fp32", "fp16")
    assert single.weight_bytes == 4 * WEIGHT_COUNT + 2 * 8
    assert half.weight_bytes == 2 * WEIGHT_COUNT + 2 * 8
    assert [(tensor.name, tensor.shape) for tensor in single.inputs] == [("images", ("batch", 3, 32, 32))]
    assert [node.operator for node in single.nodes] == ["Conv", "Relu", "GlobalAveragePool", "Conv", "Reshape"]


def test_the_structure_is_all_but_the_values_of_the_weights(tmp_path: Path) -> None:
    first, second = (read_graph(write_graph(tmp_path / f"{seed}.onnx", seed=seed)) for seed in (0, 1))
    assert first.sha256 != second.sha256
    assert first.structure_sha256 == second.structure_sha256
    others = [{"batch": 4}, {"dtype": np.float16}, {"extra": "Relu"}]
    digests = {read_graph(write_graph(tmp_path / "o.onnx", **other)).structure_sha256 for other in others}
    assert len(digests | {first.structure_sha256}) == 4


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no graph at all")
    for name in ("m.onnx", "missing.onnx"):
        with pytest.raises(ExportError, match="cannot be read as an ONNX graph"):
            read_graph(tmp_path / name)


def test_weights_in_other_files_are_refused(graph_path: Path) -> None:
    import onnx

    model = onnx.load(str(graph_path))
    onnx.save(model, str(graph_path), save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(ExportError, match="keeps its weights in other files"):
        read_graph(graph_path)


def test_batches(tmp_path: Path) -> None:
    free = read_graph(write_graph(tmp_path / "free.onnx"))
    fixed = read_graph(write_graph(tmp_path / "fixed.onnx", batch=4))
    assert batch_for(free, None) == Batch(1, 1, 1)
    assert batch_for(free, 8) == Batch(1, 8, 8)
    assert batch_for(free, (2, 8, 32)) == Batch(2, 8, 32)
    assert batch_for(fixed, None) is None
    assert batch_for(fixed, 4) is None
    with pytest.raises(ExportError, match="fixed to a batch of 4"):
        batch_for(fixed, 8)
    for wrong in (0, -1, (4, 2, 8), (0, 1, 1)):
        with pytest.raises(UsageError, match="above zero"):
            batch_for(free, wrong)


def test_limits_come_from_the_profile() -> None:
    orin, gtx750 = load_profile("orin-nano-8gb"), load_profile("gtx750")
    assert orin.available_bytes is not None
    assert limits_for(orin, ((8, 7),), weight_bytes=MIB).workspace_bytes == orin.available_bytes - MIB
    assert limits_for(gtx750, ((5, 0),), weight_bytes=MIB).workspace_bytes == 399 * MIB  # its default budget: 400 MiB
    assert limits_for(gtx750, ((5, 0),), weight_bytes=MIB, budget_bytes=GIB).budget_bytes == GIB
    assert limits_for(None, ((9, 9),), weight_bytes=MIB) == Limits(None, None, None)
    with pytest.raises(BudgetError, match="weights take 400"):
        limits_for(gtx750, ((5, 0),), weight_bytes=400 * MIB)


def test_a_chip_that_stands_in_gives_no_more_shared_memory_than_either_has() -> None:
    # CUDA C++ programming guide: a block has 99 KiB on 8.6 and 163 KiB on 8.7
    assert limits_for(None, ((8, 6), (8, 7)), weight_bytes=0).shared_bytes == 99 * KIB
    assert limits_for(None, ((8, 7),), weight_bytes=0).shared_bytes == 163 * KIB


def test_pools_of_later_releases() -> None:
    given: dict[str, int] = {}
    pools = SimpleNamespace(WORKSPACE="w", TACTIC_DRAM="d", TACTIC_SHARED_MEMORY="s")
    trt: Any = SimpleNamespace(MemoryPoolType=pools)
    config = SimpleNamespace(set_memory_pool_limit=given.__setitem__, get_memory_pool_limit=given.__getitem__)
    assert set_limits(trt, config, Limits(1000, 700, 300)) == ()
    assert given == {"w": 700, "d": 512, "s": 300}  # the largest power of two in 1000
    config.get_memory_pool_limit = lambda pool: 700
    notes = set_limits(trt, config, Limits(1000, 700, 300))
    assert ["TACTIC_DRAM" in notes[0], "TACTIC_SHARED_MEMORY" in notes[1], len(notes)] == [True, True, 2]


def test_an_engine_that_does_not_fit_is_refused() -> None:
    limits = Limits(10 * MIB, 9 * MIB, None)
    check_fits(limits, {"weights": MIB, "activation": 9 * MIB, "scratch": 8 * MIB})
    with pytest.raises(BudgetError, match=r"needs 10\.5 MiB"):
        check_fits(limits, {"weights": MIB, "activation": int(9.5 * MIB), "scratch": 8 * MIB})
    check_fits(Limits(None, None, None), {"activation": GIB})


@pytest.mark.parametrize("name", [name for name in profile_names() if name not in ("cpu", "cuda")])
def test_every_device_with_a_gpu_is_a_target(name: str) -> None:
    profile = load_profile(name)
    if profile.kind == "cpu":
        with pytest.raises(UsageError, match="no CUDA device"):
            target_for(name, None)
        return
    assert target_for(name, None).capability == profile.compute_capability_pair
    assert target_for(name, None).notes == ()


def test_a_stand_in_says_so() -> None:
    target = target_for("orin-nano-8gb", "8.6")
    assert target.capabilities == ((8, 6), (8, 7))
    assert "does not run there" in target.notes[0]
    assert target_for(None, "12.0").capability == (12, 0)
    for wrong in ("86", "8.61", "sm_86"):
        with pytest.raises(UsageError, match=r"major\.minor"):
            target_for(None, wrong)


def test_without_a_gpu_and_a_name_there_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (None, "cuda"):
        with pytest.raises(UsageError, match="no CUDA device to ask"):
            target_for(device, None)


@pytest.mark.parametrize(
    ("device", "precision", "options"),
    [
        # TensorRT 8.2.1 on JetPack 4, sample trtexec: --workspace in MiB; 8.4 and later: --memPoolSize
        ("nano-4gb", "fp16", {"--fp16", "--workspace="}),
        ("orin-nano-8gb", "fp16", {"--fp16", "--memPoolSize=workspace:"}),
        ("orin-nano-8gb", "int8", {"--int8", "--memPoolSize=workspace:"}),
        ("xavier-nx", "fp32", {"--noTF32", "--memPoolSize=workspace:"}),
    ],
)
def test_the_command_for_the_device(graph_path: Path, device: str, precision: Any, options: set[str]) -> None:
    graph, profile = read_graph(graph_path), load_profile(device)
    limits = limits_for(profile, ((8, 7),), weight_bytes=graph.weight_bytes)
    line = command.trtexec_command(
        graph, Path("out/m.engine"), precision=precision, batch=Batch(1, 8, 16), limits=limits, profile=profile
    )
    words = line.split()
    assert words[:3] == [command.TRTEXEC, "--onnx=m.onnx", "--saveEngine=m.engine"]
    assert "--maxShapes=images:16x3x32x32" in words
    assert limits.workspace_bytes is not None
    expected = {option + (str(limits.workspace_bytes // MIB) if option[-1] in "=:" else "") for option in options}
    assert set(words[6:]) == expected


def test_no_builder_that_fits_gives_the_command(graph_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "cuda_capability", lambda: None)
    for name in builders.NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"edgetrain\[tensorrt\]") as missing:
        edgetrain.build_engine(graph_path, graph_path.with_suffix(".engine"), device="orin-nano-8gb")
    assert command.TRTEXEC in missing.value.action
    rtx = ModuleType("tensorrt_rtx")
    rtx.__version__ = "1.7"  # type: ignore[attr-defined]
    rtx.ComputeCapability = SimpleNamespace(__members__={"SM86": 1, "SM120": 2, "CURRENT": 3})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    with pytest.raises(ExportError, match=r"builds for compute capability 8\.6, 12\.0") as refused:
        edgetrain.build_engine(graph_path, graph_path.with_suffix(".engine"), device="orin-nano-8gb")
    assert command.TRTEXEC in refused.value.action
    assert 'build_engine("m.onnx", "m.engine", device="orin-nano-8gb"' in refused.value.action
    assert "budget" not in refused.value.action
    with pytest.raises(ExportError, match=r"budget=1073741824"):
        edgetrain.build_engine(graph_path, graph_path.with_suffix(".engine"), device="orin-nano-8gb", budget="1GiB")
    with pytest.raises(ExportError, match="beside a CUDA device"):
        edgetrain.build_engine(graph_path, graph_path.with_suffix(".engine"), compute_capability="8.6", refit=True)
    assert not graph_path.with_suffix(".engine").exists()
    with pytest.raises(UsageError, match="tensorrt or tensorrt_rtx"):
        edgetrain.build_engine(graph_path, graph_path.with_suffix(".engine"), compute_capability="8.6", builder="nvcc")
    with pytest.raises(UsageError, match="tensorrt or tensorrt_rtx"):
        edgetrain.export.engine_weight_names(graph_path, builder="nvcc")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"edgetrain\[tensorrt\]"):
        edgetrain.export.engine_weight_names(graph_path)


def test_the_device_itself_is_built_for_by_its_own_tensorrt(
    graph_path: Path, classic: Tensorrt82, tmp_path: Path
) -> None:
    cache = tmp_path / "times"
    report = edgetrain.build_engine(
        graph_path,
        tmp_path / "m.engine",
        device="nano-4gb",
        precision="fp16",
        batch=(1, 4, 8),
        budget="1GiB",
        timing_cache=cache,
    )
    assert classic.flags == {"FP16", "TF32"}
    assert classic.network_flags == 1  # 1 << EXPLICIT_BATCH
    assert classic.config.max_workspace_size == GIB - 4 * WEIGHT_COUNT - 16
    assert classic.profiles == [{"images": ((1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))}]
    assert (report.builder, report.version, report.compute_capability) == ("tensorrt", "8.2.3.0", (5, 3))
    assert (report.activation_bytes, report.scratch_bytes, report.weights_bytes) == (5000, 100, None)
    assert "said by the builder" in report.notes
    assert cache.read_bytes() == b"+timed"
    assert (tmp_path / "m.engine").read_bytes() == b"plan"
    assert read_report(tmp_path / "m.engine") == report


def test_fp32_is_exact_and_a_foreign_timing_cache_is_left_alone(graph_path: Path, classic: Tensorrt82) -> None:
    cache = graph_path.with_name("times")
    cache.write_bytes(b"of another release")
    report = edgetrain.build_engine(
        graph_path, graph_path.with_suffix(".engine"), device="nano-4gb", refit=True, timing_cache=cache
    )
    assert classic.flags == {"REFIT"}
    assert any("another release" in note for note in report.notes)
    assert cache.read_bytes() == b"+timed"
    assert report.refittable
    assert report.weight_names == {}  # 8.2 cannot be asked


def test_int8_comes_from_a_graph_that_quantises(graph_path: Path, classic: Tensorrt82) -> None:
    with pytest.raises(ExportError, match="fp32 graph, and the engine is to be int8"):
        edgetrain.build_engine(graph_path, graph_path.with_suffix(".engine"), device="nano-4gb", precision="int8")
    assert classic.config is None


def test_a_failed_build_leaves_the_old_engine(graph_path: Path, classic: Tensorrt82) -> None:
    engine = graph_path.with_suffix(".engine")
    edgetrain.build_engine(graph_path, engine, device="nano-4gb")
    classic.gives = None
    with pytest.raises(ExportError, match=r"builds no engine from m\.onnx: said by the builder"):
        edgetrain.build_engine(graph_path, engine, device="nano-4gb")
    assert read_report(engine).engine_bytes == len(b"plan")


def test_engine_and_report_belong_together(graph_path: Path, classic: Tensorrt82) -> None:
    engine = graph_path.with_suffix(".engine")
    edgetrain.build_engine(graph_path, engine, device="nano-4gb")
    engine.write_bytes(b"another")
    with pytest.raises(StorageError, match="is not the file that"):
        read_report(engine)
    report_path(engine).write_text("{}")
    with pytest.raises(StorageError, match="cannot be read"):
        read_report(engine)
    report_path(engine).unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        read_report(engine)


def test_refit_is_refused_before_a_gpu_is_asked_for(graph_path: Path, classic: Tensorrt82, tmp_path: Path) -> None:
    engine, new = tmp_path / "m.engine", write_graph(tmp_path / "new.onnx", seed=1)
    edgetrain.build_engine(graph_path, engine, device="nano-4gb")
    with pytest.raises(ExportError, match="built without refit"):
        edgetrain.export.refit_engine(engine, new)
    edgetrain.build_engine(graph_path, engine, device="nano-4gb", refit=True)
    with pytest.raises(ExportError, match="in more than the values of its weights"):
        edgetrain.export.refit_engine(engine, write_graph(tmp_path / "other.onnx", extra="Relu"))
    check_refit(read_report(engine), read_graph(new))


@pytest.mark.parametrize("here", [None, (8, 7)])
def test_an_engine_is_not_loaded_where_it_cannot_run(
    graph_path: Path, classic: Tensorrt82, monkeypatch: pytest.MonkeyPatch, here: tuple[int, int] | None
) -> None:
    engine = graph_path.with_suffix(".engine")
    edgetrain.build_engine(graph_path, engine, device="nano-4gb", refit=True)
    monkeypatch.setattr(loading, "cuda_capability", lambda: here)
    for call, text in (
        (lambda: edgetrain.export.run_engine(engine, torch.rand(2, 3, 32, 32)), "run_engine"),
        (lambda: edgetrain.export.refit_engine(engine, graph_path), "refit_engine"),
    ):
        with pytest.raises(EdgetrainError, match=r"one of compute capability 5\.3") as refused:
            call()
        assert f"edgetrain.export.{text}(" in refused.value.action
    # the stand-in has no Runtime at all: that it was not asked for one is why this ends in the message above
    assert not hasattr(classic, "Runtime")


def test_another_release_does_not_load_it(
    graph_path: Path, classic: Tensorrt82, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = graph_path.with_suffix(".engine")
    edgetrain.build_engine(graph_path, engine, device="nano-4gb")
    monkeypatch.setattr(loading, "cuda_capability", lambda: (5, 3))
    monkeypatch.setattr(Tensorrt82, "__version__", "8.6.1")
    with pytest.raises(ExportError, match=r"built by tensorrt 8\.2\.3\.0, here is 8\.6\.1"):
        edgetrain.export.run_engine(engine, torch.rand(2, 3, 32, 32))


def test_initialisers_are_named_as_written(graph_path: Path) -> None:
    assert read_graph(graph_path).weight_names == (*WEIGHTS, "logits.shape")
