"""The demo does what the README says of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

import atpatch_onnx
from atpatch_onnx.errors import InputError

pytest.importorskip("sklearn", reason="the [train] extra has it")


@pytest.mark.slow
def test_the_demo_heals_its_victim(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    report = atpatch_onnx.demo(folder)
    before, after = report.before, report.after
    assert before.attack_success_rate > 0.99
    assert after.attack_success_rate <= 0.01
    assert abs(before.accuracy - after.accuracy) <= 0.002
    assert after.recovered_accuracy > 0.9
    assert report.identity is True
    assert report.verified
    names = {path.name for path in report.files}
    wanted = {
        "model.onnx",
        "det.onnx",
        "model.patched.onnx",
        "fix.atpatch",
        "attention.png",
        "model.patched.certificate.json",
        "clean.npz",
        "triggered.npz",
        "report.json",
    }
    assert wanted <= names
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")
    onnx.checker.check_model(folder / "model.patched.onnx", full_check=True)
    assert json.loads((folder / "report.json").read_text())["after"]["accuracy"] == after.accuracy


def test_the_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        atpatch_onnx.demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
