"""What lands in an environment: one package, whatever the folders of the repository are called."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_only_one_name_can_be_imported(tmp_path: Path) -> None:
    for name in ("passes", "models", "tests", "benchmarks"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode != 0, f"import {name} works"
    code = "import atpatch_onnx.passes.locate, atpatch_onnx.models.attacks"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_wheel_holds_one_package(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"atpatch_onnx", wheel.name.split("-py3")[0] + ".dist-info"}
    for needed in ("cli.py", "py.typed", "passes/locate.py", "models/victims.py"):
        assert f"atpatch_onnx/{needed}" in names


def test_a_light_import_stays_light() -> None:
    """Inspecting and patching need neither torch nor matplotlib, nor a runtime to be started."""
    code = (
        "import sys, atpatch_onnx.api, atpatch_onnx.cli;"
        "heavy = {'torch', 'matplotlib', 'sklearn', 'onnxruntime'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
