"""What is hostile is refused with an error made for people: no code of it runs, and it takes no memory.

:mod:`malicious_inputs` has the list. One child process with a memory cap opens all of them; a bomb that goes off hits
the cap or shows in the growth of the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from malicious_inputs import CASES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap needs Linux"),
]

ERRORS = {
    "checkpoint": {"StorageError"},
    "plan": {"ModelError", "UsageError"},
    "image": {"BrokenImage"},
    "data": {"DataError"},
    "run": {"StorageError", "UsageError"},
}
MOST_MIB = {"data: Parquet that repeats 48 MB": 192}
"""Its one real image of 48 MB is read, in the library's buffers and in Python."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str, float]]]:
    folder = tmp_path_factory.mktemp("malicious")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("malicious_inputs.py"), folder],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_at_no_cost(name: str, report: tuple[Path, dict[str, tuple[str, str, float]]]):
    kind, text, grown_mib = report[1][name]
    assert kind in ERRORS[name.split(":")[0]], text
    assert grown_mib < MOST_MIB.get(name, 32)


def test_no_code_of_it_ran(report: tuple[Path, dict[str, tuple[str, str, float]]]):
    assert list(report[0].rglob("ran")) == []


def test_what_would_show_that_code_ran(tmp_path: Path):
    """The mark that the pickles leave is one that unpickling leaves."""
    import pickle

    from malicious_inputs import Pickle

    pickle.loads(pickle.dumps(Pickle(tmp_path))).close()
    assert (tmp_path / "ran").exists()
