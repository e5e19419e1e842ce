"""The measuring tools run on small cases and print what they promise."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(TOOLS / name), "--json", *arguments], capture_output=True, text=True, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    assert {"machine", "versions", "command", "rows"} <= set(document)
    return document


def test_a_processor_is_named_with_its_family_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from environment import processor

    cpuinfo = tmp_path / "cpuinfo"
    one = "processor\t: {}\nvendor_id\t: X\ncpu family\t: 23\nmodel\t\t: 1\nmodel name\t: A Name: B\n"
    cpuinfo.write_text(one.format(0) + "\n" + one.format(1).replace(": 23", ": 24"))
    assert processor(cpuinfo) == "A Name: B, family 23 model 1"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 48.00\n")  # an ARM board
    assert processor(cpuinfo)


@pytest.mark.slow
def test_snr_depth() -> None:
    rows = run("snr_depth.py", "--seeds", "1")["rows"]
    hybrid = [row["snr"] for row in rows if row["family"] == "hybrid"]
    assert min(hybrid) > 1e8
    for slope in (0.1, 0.4):
        decays = [row["snr"] for row in rows if (row["family"], row["slope"]) == ("layerwise", slope)]
        assert all(later < earlier / 2 for earlier, later in itertools.pairwise(decays))
    assert all(0.3 < row["predicted_snr"] / row["snr"] < 2 for row in rows if row["snr"] > 10)


def write_idx(folder: Path, prefix: str, count: int) -> None:
    images, labels = (
        torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8),
        torch.arange(count, dtype=torch.uint8) % 10,
    )
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, values.dim())) + b"".join(size.to_bytes(4, "big") for size in values.shape)
        (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())


@pytest.mark.slow
def test_dirac_depth(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 40)
    write_idx(tmp_path, "t10k", 20)
    small = ("--depths", "10", "--sigmas", "0.01", "--epochs", "2", "--batch", "20", "--width", "4")
    kept = tmp_path / "kept.jsonl"
    out = ("--out", str(tmp_path / "out"), "--keep", str(kept))
    rows = run("dirac_depth.py", "--data", str(tmp_path), *small, *out)["rows"]
    assert [(row["network"], row["depth"], row["sigma"]) for row in rows] == [
        ("plain", 10, None),
        ("dirac", 10, None),
        ("I + W", 28, 0.01),
    ]
    assert all([point["epoch"] for point in row["curve"]] == [1, 2] for row in rows)
    assert len(kept.read_text().splitlines()) == 3
    assert (tmp_path / "out" / "dirac_depth.png").stat().st_size > 10_000


def test_gpu_evidence_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = subprocess.run([sys.executable, str(TOOLS / "gpu_evidence.py"), "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "no CUDA device" in done.stderr
    assert done.stdout == ""


def test_pages_agree_with_the_results() -> None:
    subprocess.run([sys.executable, str(TOOLS / "readme_tables.py"), "--check"], check=True)


@pytest.mark.slow
def test_peers_bench_without_peers_still_compares_with_torch() -> None:
    rows = run("peers_bench.py", "--channels", "16", "--depths", "4", "--repeats", "2")["rows"]
    by_name = {row["name"]: row for row in rows}
    ours, plain = by_name["edgetrain, invert"], by_name["plain autograd"]
    assert ours["peak_bytes"] < plain["peak_bytes"] / 3
    assert ours["batches_counted"] == 1
    assert ours["gradient_error"] < 10 * plain["gradient_error"]


@pytest.mark.slow
def test_memory_table() -> None:
    rows = run("memory_table.py", "--batch", "64")["rows"]
    assert len(rows) == 9
    assert all(row["allocator"] > 0 and row["process"] > 0 for row in rows)


@pytest.mark.slow
def test_engine_table() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'edgetrain[tensorrt]'")
    rows = run("engine_table.py")["rows"]
    assert {(row["model"], row["precision"]) for row in rows} == {
        (model, precision) for model in ("hybrid18", "resnet20") for precision in ("fp32", "fp16", "int8")
    }
    for row in rows:
        needed = row["weights_bytes"] + row["activation_bytes"]
        assert row["weights_bytes"] < needed < row["workspace_limit_bytes"]


@pytest.mark.slow
def test_estimate_speed() -> None:
    rows = run("estimate_speed.py", "--repeats", "1", "--batch", "8")["rows"]
    assert rows[0]["label"] == "import torch"
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[-1]["process_peak_bytes"] >= rows[-1]["imported_bytes"] > 0


@pytest.mark.slow
def test_coupling_folds() -> None:
    rows = run("coupling_folds.py", "--stages", "1", "--rounds", "3")["rows"]
    assert [row["way"] for row in rows] == ["joined", "halves", "factors", "carried", "delta"]
    assert all(row["max_difference"] < 1e-12 and row["latency_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_objectives_memory() -> None:
    """Never more than predicted, and not by 3 % less."""
    rows = run("objectives_memory.py", "--batch", "16")["rows"]
    assert len(rows) == 10
    assert all(0.97 < row["measured_over_predicted"] <= 1 for row in rows)
    live = [row for row in rows if row["teacher"] == "live"]
    assert all(row["teacher_weight_bytes"] > 0 and row["teacher_forward_bytes"] > 0 for row in live)


@pytest.mark.slow
def test_under_twenty_budgets_every_run_trains_inside_its_cap_or_is_refused_before_its_first_step() -> None:
    rows = run("budget_sweep.py")["rows"]
    assert len(rows) >= 20
    outcomes = {row["budget_bytes"]: row["outcome"] for row in rows}
    assert set(outcomes.values()) == {"trained", "refused"}
    trained = [row for row in rows if row["outcome"] == "trained"]
    assert all(row["peak_bytes"] - row["file_bytes"] <= row["budget_bytes"] for row in trained)
    least = min(row["budget_bytes"] for row in trained)
    for row in rows:
        if row["outcome"] == "refused":
            assert outcomes[row["named_bytes"]] == "trained"
            assert row["named_bytes"] <= 1.11 * least + 4 * 2**20
