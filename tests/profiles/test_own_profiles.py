"""Profiles that a user writes: where they are found, what they inherit, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetrain.errors import UsageError
from edgetrain.profiles import load_profile, profile_names, to_toml, user_profile_folder, user_profile_names
from edgetrain.units import GIB, MIB

ORIGIN = 'source = "s"\ndate = "2026-01"\n'


def quantity(field: str, value: object, unit: str) -> str:
    return f'[{field}]\nvalue = {value}\nunit = "{unit}"\n{ORIGIN}'


def write(folder: Path, name: str, *lines: str, **keys: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"name": name, "description": "mine", **keys}
    file = folder / f"{name}.toml"
    file.write_text("".join(f'{key} = "{value}"\n' for key, value in fields.items()) + "".join(lines))
    return file


def board(folder: Path, *lines: str, kind: str = "cuda", unified: bool = True) -> Path:
    return write(folder, "board", f"unified = {str(unified).lower()}\n", *lines, kind=kind)


def test_folder_of_own_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert user_profile_folder() == tmp_path / "user"
    monkeypatch.delenv("EDGETRAIN_PROFILES")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert user_profile_folder() == tmp_path / "xdg/edgetrain/profiles"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_profile_folder() == tmp_path / ".config/edgetrain/profiles"
    assert user_profile_names() == []


def test_own_name_extends_a_built_in_one(user_folder: Path):
    write(user_folder, "my-nano", quantity("system_reserved", 300, "MiB"), extends="orin-nano-8gb")
    mine, theirs = load_profile("my-nano"), load_profile("orin-nano-8gb")
    assert "my-nano" not in profile_names()
    assert user_profile_names() == ["my-nano"]
    assert mine.memory == theirs.memory
    assert mine.software == theirs.software
    assert mine.available_bytes is not None
    assert theirs.available_bytes is not None
    assert mine.available_bytes - theirs.available_bytes == 800_000_000 - 300 * MIB


def test_file_anywhere_extends_own_and_built_in_names(user_folder: Path, tmp_path: Path):
    write(user_folder, "my-nano", quantity("bandwidth", 50, "GB/s"), extends="orin-nano-8gb")
    profile = load_profile(write(tmp_path, "other", quantity("rates.fp16", 2, "TFLOP/s"), extends="my-nano"))
    assert profile.bandwidth_bytes_per_second == 50e9
    assert profile.rate_flops("fp16") == 2e12
    assert profile.rate_flops("fp32") == 1.28e12  # groups are merged entry by entry


def test_number_never_keeps_the_source_of_another(user_folder: Path):
    write(user_folder, "half", "[memory]\nvalue = 2\n", extends="gtx750")
    with pytest.raises(UsageError, match=r"memory"):
        load_profile("half")


def test_own_file_hides_the_built_in_one_and_may_extend_it(user_folder: Path):
    write(user_folder, "gtx750", quantity("default_budget", 500, "MiB"), extends="gtx750")
    assert load_profile("gtx750").default_budget_bytes == 500 * MIB
    assert load_profile("gtx750").memory_bytes == GIB


def test_circle(user_folder: Path):
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        write(user_folder, name, extends=parent)
    with pytest.raises(UsageError, match=r"circle: .*a\.toml -> .*b\.toml -> .*c\.toml -> .*a\.toml"):
        load_profile("a")
    write(user_folder, "itself", extends="itself")
    with pytest.raises(UsageError, match="extends 'itself', which does not exist"):
        load_profile("itself")


def test_unknown_parent_lists_near_ones(user_folder: Path):
    write(user_folder, "mine", extends="orin-nano-8g")
    with pytest.raises(UsageError, match=r"extends 'orin-nano-8g', which does not exist.*orin-nano-8gb"):
        load_profile("mine")


def test_file_in_the_folder_bears_its_name(user_folder: Path):
    write(user_folder, "right", extends="gtx750").rename(user_folder / "wrong.toml")
    with pytest.raises(UsageError, match=r"wrong at name: 'right' in a file called wrong\.toml"):
        load_profile("wrong")


def test_stacks_are_not_devices():
    with pytest.raises(UsageError, match="no profile is called 'jetpack7'"):
        load_profile("jetpack7")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (quantity("rates.fp32", 1, "GHz"), r"rates\.fp32 is in 'GHz', expected one of FLOP/s"),
        (quantity("rates.int8", 1, "TFLOP/s"), r"rates\.int8 is in 'TFLOP/s'.*TOP/s sparse"),
        (quantity("rates.fp8", 1, "TFLOP/s"), r"rates\.fp8"),
        (quantity("bandwidth", 1, "GB"), "bandwidth is in 'GB', expected one of B/s"),
        (quantity("memory", "inf", "GiB"), "memory"),
        (quantity("memory", 0.1, "B"), "memory is less than one byte"),
        (quantity("compute_capability", 7.25, "major.minor"), "compute_capability is 7.25"),
        (quantity("software.onnx_opset", 13.5, "opset"), r"software\.onnx_opset is 13\.5"),
        ('[software.cuda]\nvalue = "12"\n', r"software\.cuda: it needs source and date"),
        (f"[software.cuda]\nvalue = 12\n{ORIGIN}", r"software\.cuda\.value"),
        (f'[software.cuda]\nvalue = ""\n{ORIGIN}', r"software\.cuda\.value"),
        ('training = "exported-step"\n', "training is 'exported-step', which needs a training_reason"),
        ('training = "sometimes"\n', "training"),
        (quantity("memory", 1, "GiB") + quantity("system_reserved", 1, "GiB"), "system_reserved and .* 1024.0 MiB"),
        (quantity("memory", 1, "GiB") + quantity("context", 2, "GiB"), "the other overheads take 2048.0 MiB"),
        (
            quantity("memory", 1, "GiB") + quantity("context", 600, "MiB") + quantity("default_budget", 500, "MiB"),
            r"default_budget is 500\.0 MiB, above the 424\.0 MiB of memory that context leave",
        ),
        (
            quantity("compute_capability", 7.2, "major.minor") + quantity("rates.bf16", 1, "TFLOP/s"),
            r"rates\.bf16 is given, but compute_capability is 7\.2",
        ),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, lines: str, message: str):
    with pytest.raises(UsageError, match=message):
        load_profile(board(tmp_path, lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (quantity("compute_capability", 8.7, "major.minor"), "compute_capability belongs to a GPU, but kind is 'cpu'"),
        (quantity("context", 300, "MB"), "context belongs to a GPU"),
        (quantity("cublas_workspace", 8, "MiB"), "cublas_workspace belongs to a GPU"),
        (f"[cudnn_workspace]\nbenchmark = false\n{ORIGIN}", "cudnn_workspace belongs to a GPU"),
        (f'[software.cuda]\nvalue = "12"\n{ORIGIN}', "software.cuda"),
    ],
)
def test_parts_of_a_gpu_on_a_cpu(tmp_path: Path, lines: str, message: str):
    with pytest.raises(UsageError, match=message):
        load_profile(board(tmp_path, lines, kind="cpu", unified=False))


def test_cpu_shares_its_memory_with_no_gpu(tmp_path: Path):
    with pytest.raises(UsageError, match="unified is true, but kind is 'cpu'"):
        load_profile(board(tmp_path, kind="cpu"))


def test_cards_have_no_carve_out(tmp_path: Path):
    with pytest.raises(UsageError, match="carve_out"):
        load_profile(board(tmp_path, quantity("carve_out", 1, "MiB"), unified=False))


def test_file_that_is_no_text(tmp_path: Path):
    file = tmp_path / "board.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not TOML"):
        load_profile(file)


@pytest.mark.parametrize("name", profile_names())
def test_written_profiles_read_the_same(name: str, tmp_path: Path):
    profile = load_profile(name)
    file = tmp_path / "copy.toml"
    file.write_text(to_toml(profile), encoding="utf-8")
    assert load_profile(file) == profile


def test_example_of_the_documentation(user_folder: Path):
    text = (Path(__file__).resolve().parents[2] / "docs/devices.md").read_text(encoding="utf-8")
    (user_folder / "my-orin.toml").write_text(text.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    profile = load_profile("my-orin")
    assert profile.default_budget_bytes == 5 * GIB
    assert profile.system_reserved is not None
    assert profile.system_reserved.value == 310
