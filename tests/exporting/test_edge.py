"""Edge bundles: the runner needs ONNX Runtime and NumPy only, and sees what was altered."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpatch_onnx import CheckError, InputError, RefusedError, api, export
from atpatch_onnx.exporting.folder import sha256

from releases import WEIGHTS, make_release, save_data


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_release(tmp_path_factory.mktemp("release") / "digits")
    save_data(folder)
    return folder


def bundle(
    release: Path, target: Path, patched: str = "model.patched.onnx", **options: Any
) -> Path:
    data = {"inputs": release / "clean.npz", "bad": release / "bad.npz"}
    files = release / "model.onnx", release / patched
    report = export("edge", *files, output=target, **{**data, **options})
    assert report.golden == {"clean": False, "bad": True}
    return target


def run(folder: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run the bundle's runner, as it would be run elsewhere: in no environment of ours."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    command = [python, "-I", str(folder / "run.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=kept, cwd="/")


PATCHED = ("model.patched.onnx", "fix.atpatch")


@pytest.mark.parametrize("patched", PATCHED)
def test_the_runner_passes_and_names_no_place(release: Path, tmp_path: Path, patched: str) -> None:
    folder = bundle(release, tmp_path / "bundle", patched)
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    done = run(moved)
    assert (done.returncode, done.stderr) == (0, "")
    assert "golden answers right" in done.stdout
    assert str(release) not in (moved / "atpatch-export.json").read_text()


@pytest.mark.parametrize("patched", PATCHED)
def test_any_altered_file_stops_the_runner(release: Path, tmp_path: Path, patched: str) -> None:
    folder = bundle(release, tmp_path / "bundle", patched)
    listed = json.loads((folder / "atpatch-export.json").read_text())["files"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(listed) == there - {"atpatch-export.json"}
    for name in sorted(set(listed) - {"run.py"}):
        content = (folder / name).read_bytes()
        for altered in (content[:-1] + bytes([content[-1] ^ 1]), b""):
            (folder / name).write_bytes(altered)
            done = run(folder)
            assert (done.returncode, done.stderr) == (1, f"{name} was altered: copy it again\n")
        (folder / name).unlink()
        done = run(folder)
        assert (done.returncode, done.stderr) == (1, f"{name} is missing: copy it again\n")
        (folder / name).write_bytes(content)


def test_a_wrong_answer_stops_the_runner(release: Path, tmp_path: Path) -> None:
    """A runtime that computes something else: seen by the golden outputs, not by digests."""
    folder = bundle(release, tmp_path / "bundle")
    golden = dict(np.load(folder / "golden-bad.npz"))
    golden["output/y"] = golden["output/y"] + 0.1
    np.savez(folder / "golden-bad.npz", **golden)
    about = json.loads((folder / "atpatch-export.json").read_text())
    about["files"]["golden-bad.npz"] = sha256(folder / "golden-bad.npz")
    (folder / "atpatch-export.json").write_text(json.dumps(about))
    done = run(folder)
    assert done.returncode == 1
    assert "does not give the golden output 'y'" in done.stderr


def test_a_bundle_of_a_patch_holds_the_original_and_the_patch(
    release: Path, tmp_path: Path
) -> None:
    folder = bundle(release, tmp_path / "bundle", "fix.atpatch")
    for name in ("model.onnx", WEIGHTS, "fix.atpatch"):
        assert (folder / name).read_bytes() == (release / name).read_bytes()
    made = api.apply(folder / "model.onnx", folder / "fix.atpatch", output=folder / "applied.onnx")
    assert made.output.read_bytes() == (release / "model.patched.onnx").read_bytes()
    proof = folder / "model.patched.certificate.json"
    checks = api.verify(folder / "model.onnx", made.output, certificate=proof)
    assert all(check.passed for check in checks)


def test_the_ort_format_answers_alike(tmp_path: Path) -> None:
    release = make_release(tmp_path / "digits", external=False)
    save_data(release)
    folder = bundle(release, tmp_path / "bundle", ort=True)
    assert (folder / "model.patched.ort").read_bytes()[4:8] == b"ORTM"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "model.patched.ort" in done.stdout
    with pytest.raises(RefusedError, match=r"holds none"):
        bundle(release, tmp_path / "other", "fix.atpatch", ort=True)


def test_an_ort_file_that_answers_otherwise_is_not_shipped(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "allclose", lambda *_, **__: False)
    with pytest.raises(CheckError, match="something else"):
        bundle(release, tmp_path / "bundle", ort=True)
    assert list(tmp_path.iterdir()) == []


def test_a_signature_that_holds_comes_along(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing.signing", reason="needs the [sign] extra")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    from atpatch_onnx import require_signature, sign

    key = ec.generate_private_key(ec.SECP256R1())
    pem, public = form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    secret = key.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "key.pem").write_bytes(secret)
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(pem, public))
    source = Path(shutil.copytree(release, tmp_path / "source"))
    sign([source / "model.patched.onnx"], key=tmp_path / "key.pem")
    folder = bundle(source, tmp_path / "bundle")
    require_signature([folder / "model.patched.onnx"], tmp_path / "key.pub")
    sign([source], key=tmp_path / "key.pem", force=True)
    assert not (bundle(source, tmp_path / "less") / "model.sig").exists()
    whole = bundle(source, tmp_path / "whole", key=tmp_path / "key.pem")
    require_signature([whole], tmp_path / "key.pub")
    (whole / "run.py").write_text("print('golden answers right')")
    with pytest.raises(RefusedError):
        require_signature([whole], tmp_path / "key.pub")


def test_golden_inputs_are_made_up_where_none_are_given(release: Path, tmp_path: Path) -> None:
    files = release / "model.onnx", release / "model.patched.onnx"
    report = export("edge", *files, output=tmp_path / "bundle")
    assert list(report.golden) == ["clean"]
    assert run(tmp_path / "bundle").returncode == 0
    with pytest.raises(InputError, match="does not exist"):
        export("edge", *files, output=tmp_path / "other", inputs=tmp_path / "none.npz")
    with pytest.raises(InputError, match="choose triton, kserve, edge"):
        export("phone", *files, output=tmp_path / "other")


@pytest.mark.slow
def test_in_a_fresh_environment_with_onnxruntime_and_numpy_only(
    release: Path, tmp_path: Path
) -> None:
    try:
        wanted = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
    except PackageNotFoundError:
        pytest.skip("the versions to install are those of an environment with onnxruntime")
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", *wanted]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("onnxruntime and numpy cannot be installed here")
    code = "import importlib.util as u; assert not u.find_spec('onnx') and not u.find_spec('torch')"
    subprocess.run([python, "-I", "-c", code], check=True)
    ort = make_release(tmp_path / "inside", external=False)
    save_data(ort)
    folders = [bundle(release, tmp_path / name, name) for name in PATCHED]
    for folder in (*folders, bundle(ort, tmp_path / "ort", ort=True)):
        done = run(folder, python)
        assert done.returncode == 0, done.stderr
