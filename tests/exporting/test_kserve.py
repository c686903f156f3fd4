"""KServe manifests: only fields that the InferenceService CRD has, with values it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from atpatch_onnx import InputError, export

from releases import make_release, save_data

yaml = pytest.importorskip("yaml", reason="needs the [export] extra")
pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs the [export] extra")

SCHEMA: dict[str, Any] = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "predictor": {
            "minReplicas": int,
            "maxReplicas": int,
            "canaryTrafficPercent": int,
            "model": {
                "modelFormat": {"name": str, "version": str},
                "protocolVersion": str,
                "runtime": str,
                "runtimeVersion": str,
                "storageUri": str,
                "args": list,
                "env": list,
                "resources": {"limits": dict, "requests": dict},
            },
        }
    },
}
"""What is used, and could be, of `serving.kserve.io_inferenceservices.yaml` of kserve/kserve."""


def fits(document: Any, schema: Any) -> None:
    if isinstance(schema, dict):
        assert set(document) <= set(schema), set(document) - set(schema)
        for key, value in document.items():
            fits(value, schema[key])
    elif isinstance(schema, type):
        assert type(document) is schema, (document, schema)
    else:
        assert document == schema


def service(release: Path, target: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    given = {"storage_uri": "s3://bucket/digits", "inputs": release / "clean.npz", **options}
    files = release / "model.onnx", release / "model.patched.onnx"
    report = export("kserve", *files, output=target, **given)
    assert {f for f in target.rglob("*") if f.is_file()} == {target / f for f in report.files}
    loaded = [
        yaml.safe_load((target / f).read_text()) for f in ("inferenceservice.yaml", "rollback.yaml")
    ]
    return loaded[0], loaded[1]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_release(tmp_path_factory.mktemp("release") / "Digits_2")
    save_data(folder)
    return folder


def test_the_manifests_fit_the_schema(release: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"canary": 10, "gpu": 1, "memory": "16Gi"})):
        for document in service(release, tmp_path / str(number), **options):
            fits(document, SCHEMA)
            for value in document["metadata"]["annotations"].values():
                assert isinstance(value, str)
            limits = document["spec"]["predictor"]["model"]["resources"]["limits"]
            assert all(isinstance(value, str) for value in limits.values())
            assert ("nvidia.com/gpu" in limits) == bool(options)


def test_the_rollback_is_the_same_service_on_the_original(release: Path, tmp_path: Path) -> None:
    forward, back = service(release, tmp_path / "out", canary=25, name="digits")
    assert forward["spec"]["predictor"].pop("canaryTrafficPercent") == 25
    assert back["spec"]["predictor"]["model"].pop("args") == ["--model-config-name=original"]
    for document in (forward, back):
        document["metadata"]["annotations"].pop("atpatch/serves")
    assert forward == back
    assert (tmp_path / "out/repository/digits/configs/original.pbtxt").is_file()
    assert "canaryTrafficPercent" in (tmp_path / "out/README.md").read_text()


def test_names_are_made_fit(release: Path, tmp_path: Path) -> None:
    (release / "9 Big_Model.v2.onnx").write_bytes((release / "model.onnx").read_bytes())
    files = release / "9 Big_Model.v2.onnx", release / "fix.atpatch"
    report = export("kserve", *files, output=tmp_path / "out", storage_uri="pvc://models/digits")
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", report.name)
    assert report.name == "big-model-v2"


@pytest.mark.parametrize(
    "options",
    [
        {"storage_uri": ""},
        {"storage_uri": "/models/digits"},
        {"name": "Digits"},
        {"name": "a" * 64},
        {"name": "-a"},
        {"canary": 101},
        {"canary": -1},
        {"gpu": -1},
        {"memory": "lots"},
        {"memory": "0"},
    ],
    ids=str,
)
def test_what_kubernetes_would_refuse(
    release: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        service(release, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
