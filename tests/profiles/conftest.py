"""No test sees the profiles of the person who runs it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of user profiles."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setenv("EDGETRAIN_PROFILES", str(folder))
    return folder
