"""House rules that a machine can check: a light import, and a wheel that holds everything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "sklearn", "pyarrow", "matplotlib")
LIST_HEAVY = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"


def python(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=900)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def seconds(code: str) -> float:
    """The fastest of three runs: the others waited for something else."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        python("-c", code)
        taken.append(time.perf_counter() - began)
    return min(taken)


@pytest.mark.parametrize("module", ["edgetrain", "edgetrain.targets", "edgetrain.profiles"])
def test_light_import(module: str):
    assert json.loads(python("-c", f"import {module}; {LIST_HEAVY}")) == []


def test_layers_and_training_load_torch_alone_and_no_cuda():
    code = f"import edgetrain, torch; edgetrain.nn, edgetrain.models, edgetrain.runtime; {LIST_HEAVY}"
    assert json.loads(python("-c", code)) == ["torch"]
    assert python("-c", "import edgetrain, torch; edgetrain.nn; print(torch.cuda.is_initialized())").strip() == "False"


def test_import_takes_less_than_half_a_second():
    assert seconds("import edgetrain") - seconds("pass") < 0.5


def test_every_package_folder_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {"edgetrain": ROOT / "edgetrain", "edgetrain.targets": ROOT / "targets"}
    folders["edgetrain.profiles"] = ROOT / "profiles"
    found = {
        ".".join([name, *file.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for file in folder.rglob("*.py")
    }
    assert found == set(listed)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files in its tree."""
    source = tmp_path_factory.mktemp("source") / "edgetrain"
    skipped = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=skipped)
    out = tmp_path_factory.mktemp("wheel")
    # the licence expression needs setuptools 77; where the environment has less, pip fetches it for the build
    isolation = ["--no-build-isolation"] if _setuptools_major() >= 77 else []
    python("-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


def _setuptools_major() -> int:
    try:
        return int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        return 0


def test_wheel_carries_targets_and_profiles(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, {str(site)!r})
import edgetrain, edgetrain.profiles, edgetrain.targets, json
files = [m.__file__ for m in (edgetrain, edgetrain.profiles, edgetrain.targets)]
names = edgetrain.profiles.profile_names()
print(json.dumps([files, [edgetrain.profiles.load_profile(n).name for n in names]]))
"""
    files, names = json.loads(python("-I", "-c", code, cwd=tmp_path))
    assert all(Path(file).is_relative_to(site) for file in files), files
    assert names == sorted(file.stem for file in (ROOT / "profiles").glob("*.toml"))
    assert (site / "edgetrain" / "py.typed").is_file()
    assert all((site / "edgetrain" / "report" / name).is_file() for name in ("page.html.jinja", "page.js"))


@pytest.mark.slow
def test_wheel_with_its_dependencies_runs_the_demo(wheel: Path, tmp_path: Path):
    python("-m", "venv", str(tmp_path / "venv"))
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    for command in ([scripts / "python", "-m", "pip", "install", "--quiet", wheel], [scripts / "edgetrain", "demo"]):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
