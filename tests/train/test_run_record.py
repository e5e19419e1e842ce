"""What a run directory says of its network comes back, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetrain.errors import StorageError
from edgetrain.train.run_record import RunRecord

RECORD = RunRecord(
    model="hybrid18",
    options={"width": 16},
    data="digits",
    classes=("0", "1"),
    input_shape=(1, 16, 16),
    mean=(0.3,),
    std=(0.25,),
    seed=7,
)


def test_it_comes_back(tmp_path: Path):
    RECORD.write(tmp_path / "run")
    assert RunRecord.read(tmp_path / "run") == RECORD


@pytest.mark.parametrize("content", ["{", "{}", RECORD.model_dump_json().replace('"seed"', '"sed"')])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StorageError, match=r"run\.json cannot be read"):
        RunRecord.read(tmp_path)


def test_a_folder_without_one(tmp_path: Path):
    with pytest.raises(StorageError, match=r"a run of an older version has no run\.json"):
        RunRecord.read(tmp_path)
