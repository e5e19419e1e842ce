"""``edgetrain devices`` and ``edgetrain calibrate``, as a person and as a script read them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgetrain.cli.calibrate import _slug
from edgetrain.cli.main import run
from edgetrain.errors import StorageError
from edgetrain.profiles import load_profile, profile_names
from edgetrain.targets import calibrate as measuring
from edgetrain.targets.measured import Measured
from edgetrain.targets.overheads import Overheads
from edgetrain.units import GIB, MIB


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of user profiles, and a terminal of 80 columns."""
    monkeypatch.setenv("EDGETRAIN_PROFILES", str(tmp_path / "user"))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def test_table_has_every_profile_and_fits_80_columns(capsys: pytest.CaptureFixture[str]):
    lines = output(capsys, "devices").splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert set(profile_names()) <= set(rows)
    assert max(map(len, lines)) <= 80
    assert rows["orin-nano-8gb"].split() == ["orin-nano-8gb", "8", "5.3", "68", "1.28", "8.7", "pytorch"]
    assert rows["nano-4gb"].split() == ["nano-4gb", "4", "≤", "3.1", "25.6", "0.236", "5.3", "exported", "step"]
    assert rows["cpu"].split() == ["cpu", "-", "-", "-", "-", "-", "pytorch"]


def test_table_as_json(capsys: pytest.CaptureFixture[str]):
    rows = {row["name"]: row for row in json.loads(output(capsys, "devices", "--json"))["profiles"]}
    assert set(rows) == set(profile_names())
    assert rows["gtx750"]["memory_bytes"] == GIB
    assert rows["gtx750"]["default_budget_bytes"] == 400 * MIB
    assert rows["gtx750"]["rates_flops"] == {"fp32": 1.044e12, "fp16": None, "bf16": None, "int8": None}
    assert rows["tx2"]["training"] == "exported-step"


def test_one_device_with_the_origin_of_every_field(capsys: pytest.CaptureFixture[str]):
    text = output(capsys, "devices", "gtx750")
    for path, _ in load_profile("gtx750").sourced():
        assert path in text
    words = " ".join(text.split())
    for said in ("GM107", "80.2 GB/s", "(2026-11)", "ASSUMED", "8.5.3", "left for training 642.5 MiB"):
        assert said in words


def test_one_device_as_json(capsys: pytest.CaptureFixture[str]):
    fields = json.loads(output(capsys, "devices", "orin-nx-16gb", "--json"))
    assert fields["memory"]["unit"] == "GiB"
    assert fields["memory"]["source"]
    assert fields["derived"]["compute_capability"] == [8, 7]
    assert fields["derived"]["rates_flops"]["int8"] == 50e12


def test_own_profiles_are_listed_and_a_broken_one_is_named(user_folder: Path, capsys: pytest.CaptureFixture[str]):
    (user_folder / "mine.toml").write_text('name = "mine"\ndescription = "d"\nextends = "tx2"\n')
    (user_folder / "broken.toml").write_text("name = ")
    assert run(["devices"]) == 0
    out, err = capsys.readouterr()
    assert "mine" in out
    assert f"your own, from {user_folder}"[:20] in out
    assert "broken.toml is not TOML" in err
    assert err.count("\n") == 1


def test_probe_of_this_host(capsys: pytest.CaptureFixture[str]):
    host = json.loads(output(capsys, "devices", "--probe", "--json"))
    assert host["memory"]["total_bytes"] == psutil.virtual_memory().total
    text = output(capsys, "devices", "--probe")
    for row in ("machine", "memory", "Tegra", "NVML", "CUDA"):
        assert row in text


def test_reasons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Square brackets are markup to the library that prints tables."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'edgetrain[gpu]'" in " ".join(output(capsys, "devices", "--probe").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("devices gtx75", "did you mean gtx750"),
        ("devices nowhere.toml", "nowhere.toml cannot be read"),
        ("devices gtx750 --probe", "leave out one of the two"),
        ("calibrate --device gpu", "cpu or cuda"),
        ("calibrate --out profile", "--out profile.toml"),
    ],
)
def test_wrong_usage(arguments: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert run(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgetrain: Found: ")
    assert err.count("\n") == 1
    assert said in err


def test_listing_loads_no_torch():
    code = "import sys; from edgetrain.cli.main import run; run(['devices']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def measured(value: float) -> Measured:
    return Measured(value, 0.9 * value, 1.1 * value, 7)


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> measuring.Calibration:
    """What ``calibrate`` finds here, instead of measuring for 12 s."""
    found = measuring.Calibration(
        convolution={"fp32": {16: measured(40e9), 128: measured(200e9)}},
        elementwise={"fp32": measured(30e9)},
        copy=measured(35e9),
        overheads=Overheads(measured(200 * MIB), None),
        total_bytes=8 * GIB,
        system_bytes=512 * MIB,
        threads=2,
    )
    monkeypatch.setattr(measuring, "calibrate", lambda device: found)
    return found


def test_calibration_is_a_profile(
    calibration: measuring.Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "deep" / "My Board.toml"
    text = output(capsys, "calibrate", "--out", str(file))
    assert "200.0" in text
    profile = load_profile(file)
    assert (profile.name, profile.kind) == ("my-board", "cpu")
    assert profile.memory_bytes == 8 * GIB
    assert profile.available_bytes == 8 * GIB - 512 * MIB - 200 * MIB
    assert profile.unknown_overheads == ()
    assert profile.rate_flops("fp32") == 200e9
    assert profile.convolution["fp32"][16].value == 40
    assert profile.bandwidth_bytes_per_second == 35e9
    for path, sourced in profile.sourced():
        assert (sourced.source or "").startswith("measured by edgetrain calibrate 0."), path
        assert sourced.date
    assert "quartiles 180 and 220 GFLOP/s" in (profile.rates.fp32.note or "" if profile.rates.fp32 else "")
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("integrated", [False, True])
def test_calibration_of_a_gpu_extends_the_generic_profile(
    integrated: bool, calibration: measuring.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Properties:
        name, major, minor, is_integrated = "Orin", 8, 7, integrated

    found = dataclasses.replace(calibration, overheads=Overheads(measured(200 * MIB), measured(300 * MIB)))
    monkeypatch.setattr(measuring, "calibrate", lambda device: found)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: Properties)
    assert run(["calibrate", "--device", "cuda", "--out", str(tmp_path / "b.toml")]) == 0
    profile = load_profile(tmp_path / "b.toml")
    assert (profile.kind, profile.unified, profile.extends) == ("cuda", integrated, "cuda")
    assert profile.compute_capability_pair == (8, 7)
    assert profile.cudnn_workspace == load_profile("cuda").cudnn_workspace
    assert profile.available_bytes == 8 * GIB - (512 + 300 + 200 * integrated) * MIB
    assert "Orin" in profile.description


def test_calibration_goes_to_the_folder_of_own_profiles(
    calibration: measuring.Calibration, user_folder: Path, capsys: pytest.CaptureFixture[str]
):
    result = json.loads(output(capsys, "calibrate", "--json"))
    assert Path(result["profile"]).parent == user_folder
    assert result["convolution"]["fp32"]["128"]["median"] == 200e9
    assert load_profile(result["name"]).memory_bytes == 8 * GIB


def test_calibration_that_cannot_be_written_leaves_the_old_file(
    calibration: measuring.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "board.toml"
    file.write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert run(["calibrate", "--out", str(file)]) == StorageError.exit_code
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if "board" in entry.name] == ["board.toml"]


def test_values_stand_before_their_origin(calibration: measuring.Calibration, tmp_path: Path):
    assert run(["calibrate", "--out", str(tmp_path / "b.toml")]) == 0
    table = (tmp_path / "b.toml").read_text().partition("[memory]\n")[2].splitlines()
    assert [line.split()[0] for line in table[:3]] == ["value", "unit", "source"]


@pytest.mark.parametrize(
    ("text", "name"), [("My_Board.local", "my-board-local"), ("---", "host"), ("Größe 7", "gr-e-7")]
)
def test_names(text: str, name: str):
    assert _slug(text) == name
