"""The distribution ``edgetrain-lite``: what its wheel holds is all that training needs besides its dependencies."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from edgetrain.train import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from train_steps import exported, small

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = ("numpy", "onnxruntime", "PIL")

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and its dependencies, and nothing else."""
    folder = tmp_path_factory.mktemp("lite")
    for name in ("edgetrain", "lite"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = sys.executable, "-m", "pip"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "lite", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    for name in DEPENDENCIES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        for part in (home, home.with_name(f"{name}.libs"), home.with_name("pillow.libs")):
            if part.exists() and not (site / part.name).exists():
                (site / part.name).symlink_to(part)
    return python.parent


def test_trains_an_epoch_of_digits_where_there_is_no_pytorch(scripts: Path, tmp_path: Path) -> None:
    digits = load_digits()
    images = np.repeat((digits.images[..., None] * 15.9).astype(np.uint8), 3, axis=3)
    np.savez(tmp_path / "digits.npz", images=images, labels=digits.target.astype(np.int64))
    recipe = Recipe(epochs=1, batch_size=16, peak_rate=0.05)
    exported(small("irevnet"), "invert", tmp_path / "step", n=16, recipe=recipe)

    absent = "import importlib.util as u; print([n for n in ('torch', 'sklearn', 'pydantic') if u.find_spec(n)])"
    assert run(scripts / "python", "-I", "-c", absent, cwd=tmp_path).strip() == "[]"
    out = run(scripts / "edgetrain-lite", "step", "--data", "digits.npz", "--plain", "--json", cwd=tmp_path)
    (record,) = json.loads(out)["history"]
    assert record["loss"] < np.log(10), "no better than chance"
    assert record["accuracy"] > 0.2
    assert (tmp_path / "step-run" / "checkpoints" / "last.safetensors").is_file()
