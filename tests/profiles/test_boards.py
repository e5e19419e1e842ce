"""The profiles that come with the package: every number has an origin, and the figures are those of their sources."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from edgetrain.profiles import default_cublas_workspace_bytes, load_profile, profile_names
from edgetrain.units import GIB, MIB

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = resources.files("edgetrain.profiles")
FILES = {
    f"{prefix}{file.name}": file.read_text(encoding="utf-8")
    for prefix, folder in (("", PACKAGE), ("stacks/", PACKAGE / "stacks"))
    for file in folder.iterdir()
    if file.name.endswith(".toml")
}
BOARDS = {
    *("gtx750", "gtx1080ti", "nano-4gb", "tx2", "xavier-nx", "agx-xavier", "orin-nano-4gb", "orin-nano-8gb"),
    *("orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "thor", "rpi5-4gb", "rpi5-8gb"),
}


def tables(value: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
        for key, child in value.items():
            yield from tables(child, f"{path}.{key}")


def numbers_outside_a_quantity(value: object, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            if not (key == "value" and "unit" in value):
                yield from numbers_outside_a_quantity(child, f"{path}.{key}")
    elif isinstance(value, list):
        for child in value:
            yield from numbers_outside_a_quantity(child, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def origin_missing(table: dict[str, Any]) -> bool:
    if table.get("assumption"):
        return not table.get("note")
    return not (table.get("source") and table.get("date"))


@pytest.mark.parametrize("file", sorted(FILES))
def test_every_number_and_fact_has_an_origin(file: str):
    data = tomllib.loads(FILES[file])
    assert [path for path, table in tables(data) if "value" in table and origin_missing(table)] == []
    assert list(numbers_outside_a_quantity(data)) == []


def test_the_walk_finds_what_is_missing():
    data = tomllib.loads(
        'a = 1\n[memory]\nvalue = 1\nunit = "GiB"\n[rates.fp32]\nvalue = 2\nunit = "x"\nsource = "s"\n'
    )
    found = [path for path, table in tables(data) if "value" in table and origin_missing(table)]
    assert found == [".memory", ".rates.fp32"]
    assert list(numbers_outside_a_quantity(data)) == [".a"]


def test_every_stack_is_used_and_is_no_device():
    stacks = {name.removeprefix("stacks/").removesuffix(".toml") for name in FILES if name.startswith("stacks/")}
    extended = {tomllib.loads(text).get("extends") for text in FILES.values()}
    assert stacks <= extended
    assert not stacks & set(profile_names())


def test_all_boards_are_there_and_say_how_they_train():
    assert set(profile_names()) >= BOARDS
    for name in profile_names():
        assert load_profile(name).training_reason


# memory, bandwidth, fp32 rate and compute capability: cputronic.com (GTX 750), vortez.net (1080 Ti), deviceQuery on
# J1020 (Nano), Ultralytics' comparison table (Xavier, AGX Orin 64), Seeed's specification tables (Orin Nano, NX), the
# module matrix of 2026 (Super, Thor), circuitdigest (Raspberry Pi 5)
TABLE = [
    ("gtx750", 1, 80.2e9, 2 * 512 * 1020e6, (5, 0)),
    ("gtx1080ti", 11, 484e9, 2 * 3584 * 1582e6, (6, 1)),
    ("nano-4gb", 4, 25.6e9, 2 * 128 * 921e6, (5, 3)),
    ("tx2", 8, 59.7e9, 2 * 256 * 1300e6, (6, 2)),
    ("xavier-nx", 8, 59.7e9, 2 * 384 * 1100e6, (7, 2)),
    ("agx-xavier", 32, 136.5e9, 2 * 512 * 1377e6, (7, 2)),
    ("orin-nano-4gb", 4, 34e9, 2 * 512 * 625e6, (8, 7)),
    ("orin-nano-4gb-super", 4, 51e9, 2 * 512 * 1020e6, (8, 7)),
    ("orin-nano-8gb", 8, 68e9, 2 * 1024 * 625e6, (8, 7)),
    ("orin-nano-8gb-super", 8, 102e9, 2 * 1024 * 1020e6, (8, 7)),
    ("orin-nx-8gb", 8, 102.4e9, 2 * 1024 * 765e6, (8, 7)),
    ("orin-nx-16gb", 16, 102.4e9, 2 * 1024 * 918e6, (8, 7)),
    ("agx-orin-32gb", 32, 204.8e9, 2 * 1792 * 930e6, (8, 7)),
    ("agx-orin-64gb", 64, 204.8e9, 2 * 2048 * 1300e6, (8, 7)),
    ("thor", 128, 273e9, 8e12, (11, 0)),
    ("rpi5-4gb", 4, 17.1e9, 4 * 2.4e9 * 16, None),
    ("rpi5-8gb", 8, 17.1e9, 4 * 2.4e9 * 16, None),
]


@pytest.mark.parametrize(("name", "gib", "bandwidth", "fp32", "capability"), TABLE, ids=[row[0] for row in TABLE])
def test_figures(name: str, gib: int, bandwidth: float, fp32: float, capability: tuple[int, int] | None):
    """Peak rate is 2 FLOP x cores x clock, which the sources round to two or three digits."""
    profile = load_profile(name)
    assert profile.memory_bytes == gib * GIB
    assert profile.bandwidth_bytes_per_second == pytest.approx(bandwidth)
    assert profile.rate_flops("fp32") == pytest.approx(fp32, rel=0.015)
    assert profile.compute_capability_pair == capability
    assert profile.unified == (capability is not None and not name.startswith("gtx"))


@pytest.mark.parametrize(
    ("name", "tensorrt", "opset", "jetpack", "training"),
    [
        ("gtx750", "8.5.3", 17, None, "pytorch"),
        ("gtx1080ti", "8.6.1", 17, None, "pytorch"),
        ("nano-4gb", "8.2.1", 13, "4.6", "exported-step"),
        ("tx2", "8.2.1", 13, "4.6", "exported-step"),
        ("xavier-nx", "8.5.2", 17, "5.1", "exported-step"),
        ("orin-nano-8gb", "10.16", 24, "7.2", "pytorch"),
        ("thor", "10.16", 24, "7.2", "pytorch"),
        ("rpi5-4gb", None, None, None, "pytorch"),
    ],
)
def test_software(name: str, tensorrt: str | None, opset: int | None, jetpack: str | None, training: str):
    profile = load_profile(name)
    for fact, expected in ((profile.software.tensorrt, tensorrt), (profile.software.jetpack, jetpack)):
        assert (fact is None) == (expected is None)
        assert fact is None or fact.value.startswith(str(expected))
    assert (profile.onnx_opset, profile.training) == (opset, training)


def test_memory_that_programs_see():
    """deviceQuery: 3956 MiB on the Nano, 15189422080 bytes on the Orin NX 16 GB; 7.44 GiB on an Orin Nano 8 GB."""
    for name, visible in (("nano-4gb", 3956 * MIB), ("orin-nx-16gb", 15189422080), ("orin-nano-8gb", 7.44 * GIB)):
        profile = load_profile(name)
        assert profile.memory_bytes is not None
        assert profile.carve_out is not None
        carve_out = profile.carve_out.value * {"MiB": MIB, "GiB": GIB, "B": 1}[profile.carve_out.unit]
        assert profile.memory_bytes - carve_out == pytest.approx(visible, rel=1e-6)


def test_sparse_rates_count_half_and_missing_ones_are_none():
    """Orin Nano 8 GB: 40 TOPS with sparsity. No int8 on the Nano, no bf16 before Ampere: absent, never a guess."""
    assert load_profile("orin-nano-8gb").rate_flops("int8") == 20e12
    assert load_profile("nano-4gb").rate_flops("int8") is None
    assert load_profile("nano-4gb").rate_flops("fp16") == 0.472e12
    assert load_profile("gtx750").rate_flops("bf16") is None
    assert load_profile("cuda").bandwidth_bytes_per_second is None


def test_left_for_training_is_memory_without_every_overhead():
    """Orin Nano 8 GB: 0.56 GiB firmware, 800 MB desktop, 400 MB context, 1.1 GB host libraries."""
    profile = load_profile("orin-nano-8gb")
    assert profile.available_bytes == pytest.approx(7.44 * GIB - 0.8e9 - 0.4e9 - 1.1e9, abs=2)
    assert profile.unknown_overheads == ()
    card = load_profile("gtx750")
    assert card.available_bytes == GIB - 400_000_000
    assert card.unknown_overheads == ("system_reserved",)
    assert load_profile("cpu").available_bytes is None


def test_cublas_workspace():
    """``:4096:2:16:8`` is 2 x 4096 KiB + 8 x 16 KiB; 32 MiB on Hopper and Blackwell, of which Thor is not one here."""
    assert [default_cublas_workspace_bytes(major) for major in (5, 8, 11)] == [(2 * 4096 + 8 * 16) * 1024] * 3
    assert [default_cublas_workspace_bytes(major) for major in (9, 10, 12)] == [32 * MIB] * 3
    assert load_profile("orin-nx-8gb").cublas_workspace_bytes == 8_519_680
    assert load_profile("rpi5-4gb").cublas_workspace_bytes is None
    assert load_profile("cuda").cublas_workspace_bytes is None


def test_power_mode_changes_what_it_says_and_nothing_else():
    base, fast = load_profile("orin-nano-8gb"), load_profile("orin-nano-8gb-super")
    changed = {field for field in type(base).model_fields if getattr(base, field) != getattr(fast, field)}
    assert changed == {"name", "description", "extends", "power_mode", "bandwidth", "rates"}
