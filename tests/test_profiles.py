"""Device profiles: those that come with the package, and what a file may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetrain.errors import UsageError
from edgetrain.profiles import load_profile, profile_names
from edgetrain.units import GIB, MIB

HEAD = 'name = "board"\ndescription = "a board"\nkind = "cuda"\nunified = true\n'


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_under_its_own_name(name: str):
    assert load_profile(name).name == name


def test_profiles_that_others_rely_on():
    assert {"cpu", "cuda", "gtx750"} <= set(profile_names())


def test_gtx750():
    """Hascoet, thesis, ch. 3.5.2: a card of 1 GB, about 400 MB of it left; GM107 is compute capability 5.0."""
    profile = load_profile("gtx750")
    assert profile.memory_bytes == GIB
    assert profile.default_budget_bytes == 400 * MIB
    assert profile.default_budget is not None
    assert profile.default_budget.assumption
    assert profile.compute_capability_pair == (5, 0)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_profiles_of_the_host_leave_numbers_to_the_host(name: str):
    profile = load_profile(name)
    assert (profile.kind, profile.memory_bytes, profile.default_budget_bytes) == (name, None, None)


def test_unknown_name_lists_near_ones():
    with pytest.raises(UsageError, match="did you mean gtx750"):
        load_profile("gtx570")


def test_own_file(tmp_path: Path):
    file = tmp_path / "board.toml"
    file.write_text(HEAD + '[memory]\nvalue = 7.4\nunit = "GiB"\nassumption = true\nnote = "read off one board"\n')
    for given in (file, str(file)):
        assert load_profile(given).memory_bytes == int(7.4 * GIB)


def test_missing_file(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_profile(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not TOML"),
        (HEAD + "memery = 1\n", "memery"),
        (HEAD.replace("cuda", "tpu"), "kind"),
        (HEAD + '[memory]\nvalue = 1\nunit = "GiB"\n', "needs source and date"),
        (HEAD + '[memory]\nvalue = 1\nunit = "GiB"\nassumption = true\n', "needs a note"),
        (HEAD + '[memory]\nvalue = 1\nunit = "Gb"\nsource = "s"\ndate = "2026-01"\n', "memory is in 'Gb'"),
        (HEAD + '[memory]\nvalue = 0\nunit = "GiB"\nsource = "s"\ndate = "2026-01"\n', "greater than 0"),
        (HEAD + '[memory]\nvalue = 1\nunit = "GiB"\nsource = "s"\ndate = "last year"\n', r"memory\.date"),
    ],
)
def test_wrong_files_say_where(tmp_path: Path, text: str, message: str):
    file = tmp_path / "board.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_profile(file)
