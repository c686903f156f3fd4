"""Where a patched model comes from, as an in-toto statement with SLSA provenance.

Source: https://in-toto.io/Statement/v1 and https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "tag:atpatch-onnx,2026:patch/v1"
BUILDER = "tag:atpatch-onnx,2026:atpatch-onnx"


def statement(
    base: tuple[str, str],
    result: tuple[str, str],
    patches: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The statement about `result`.

    base, result: name and SHA-256 of the two model files.
    patches: what the result says of its patches: sites, detectors, training records.
    versions: of the tools.
    """
    detectors = [detector for patch in patches for detector in patch.get("detectors", [])]
    return {
        "_type": STATEMENT,
        "subject": [_resource(*result)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": base[0],
                    "sites": [site for patch in patches for site in patch.get("sites", [])],
                },
                "resolvedDependencies": [
                    _resource(*base),
                    *(
                        {
                            **_resource(detector.get("file", ""), detector.get("sha256", "")),
                            "annotations": {
                                "kind": detector.get("kind"),
                                "training": detector.get("training"),
                            },
                        }
                        for detector in detectors
                    ),
                ],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": dict(versions)}},
        },
    }


def _resource(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}
