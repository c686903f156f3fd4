"""What lands in an environment: one package, whatever the folders of the repository are called."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_only_one_name_can_be_imported(tmp_path: Path) -> None:
    for name in ("passes", "models"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode != 0, f"import {name} works"
    code = "import atpatch_onnx.passes.locate, atpatch_onnx.models.attacks"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_wheel_holds_one_package(tmp_path: Path) -> None:
    """Built from a copy: what an earlier build left in the checkout must not get in."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("atpatch_onnx", "passes", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "-w", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "atpatch_onnx",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "atpatch_onnx").rglob("*.py")}
    for folder in ("passes", "models"):
        there = (ROOT / folder).rglob("*.py")
        modules |= {f"atpatch_onnx/{p.relative_to(ROOT).as_posix()}" for p in there}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"atpatch_onnx/py.typed", "atpatch_onnx/reporting/page.html"} <= names
    assert "atpatch_onnx/reporting/page.css" in names


def test_a_light_import_stays_light() -> None:
    """Inspecting and patching need neither torch nor matplotlib, nor a runtime to be started."""
    code = (
        "import sys, atpatch_onnx.api, atpatch_onnx.cli;"
        "heavy = {'torch', 'matplotlib', 'sklearn', 'onnxruntime'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
