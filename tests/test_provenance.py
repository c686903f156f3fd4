"""The provenance statement: real in-toto, about these very files, and `verify` looks at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atpatch_onnx import api
from atpatch_onnx.model_file import ModelFile

from releases import make_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("release") / "digits")


def certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model.patched.certificate.json").read_text())
    return found


def test_it_says_what_the_model_was_made_from(release: Path) -> None:
    found = certificate(release)["provenance"]
    model, patched = (ModelFile.open(release / n) for n in ("model.onnx", "model.patched.onnx"))
    assert found["subject"] == [{"name": patched.path.name, "digest": {"sha256": patched.sha256}}]
    base, detector = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert base == {"name": "model.onnx", "digest": {"sha256": model.sha256}}
    assert detector["digest"]["sha256"] == ModelFile.open(release / "det.onnx").sha256
    assert detector["annotations"] == {"kind": "custom", "training": {}}
    assert "atpatch-onnx" in found["predicate"]["runDetails"]["builder"]["version"]


def test_in_toto_takes_it(release: Path) -> None:
    json_format = pytest.importorskip("google.protobuf.json_format")
    statement = pytest.importorskip(
        "in_toto_attestation.v1.statement", reason="comes with the [sign] extra"
    )
    raw = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    parsed = json_format.ParseDict(certificate(release)["provenance"], raw.Statement())
    statement.Statement.copy_from_pb(parsed).validate()


@pytest.mark.parametrize(
    "alter",
    [
        lambda found: found["subject"][0]["digest"].update(sha256="0" * 64),
        lambda found: found.update(predicateType="https://example.org"),
        lambda found: found["predicate"]["buildDefinition"]["resolvedDependencies"].pop(),
        lambda found: found["predicate"]["runDetails"]["builder"].update(id="somebody"),
        lambda found: found.clear(),
    ],
)
def test_an_altered_one_fails(release: Path, tmp_path: Path, alter: Any) -> None:
    held = certificate(release)
    alter(held["provenance"])
    (tmp_path / "c.json").write_text(json.dumps(held))
    files = release / "model.onnx", release / "model.patched.onnx"
    checks = {c.name: c for c in api.verify(*files, certificate=tmp_path / "c.json")}
    assert not checks["certificate"].passed
    assert "provenance" in checks["certificate"].detail


def test_certificates_of_before_and_renamed_files_still_pass(release: Path, tmp_path: Path) -> None:
    held = certificate(release)
    del held["provenance"]
    (tmp_path / "c.json").write_text(json.dumps(held))
    files = release / "model.onnx", release / "model.patched.onnx"
    assert all(c.passed for c in api.verify(*files, certificate=tmp_path / "c.json"))
    renamed = release / "renamed.onnx"
    renamed.write_bytes(files[1].read_bytes())
    proof = release / "model.patched.certificate.json"
    assert all(c.passed for c in api.verify(files[0], renamed, certificate=proof))
    renamed.unlink()
