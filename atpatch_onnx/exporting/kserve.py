"""KServe: an InferenceService over a Triton repository, and the one that rolls it back.

    DIR/inferenceservice.yaml   serves the patched model (some of the traffic with a canary share)
    DIR/rollback.yaml           the same service on the original
    DIR/repository/             what to upload to the storage URI: a Triton model repository

Source: the CRD `serving.kserve.io/v1beta1`, `InferenceService`, of kserve/kserve (config/crd).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .folder import write
from .golden import GoldenSet
from .release import Release
from .triton import write_repository

RUNTIME, TRITON = "kserve-tritonserver", "25.06-py3"
"""The serving runtime that KServe brings, and a tag of Triton's image that knows what is used."""

_SCHEMES = ("s3://", "gs://", "pvc://", "https://", "http://", "hdfs://", "webhdfs://", "hf://")

README = """# {name} on KServe

1. Upload `repository/` so that its content lies at `{uri}`.
2. `kubectl apply -f inferenceservice.yaml`: {what}
3. `kubectl wait --for=condition=Ready inferenceservice/{name} --timeout=10m`

Roll back: `kubectl apply -f rollback.yaml`. It starts Triton with `--model-config-name=original`,
so that version 1, the original, is served from the same storage; pods are replaced one by one.
A canary is taken back at once with

    kubectl patch inferenceservice {name} --type=merge \\
        -p '{{"spec": {{"predictor": {{"canaryTrafficPercent": 0}}}}}}'

The patched model has the SHA-256 `{patched}`, the annotation
`atpatch/patched-sha256` of the service. `repository/README.md` says what lies in the repository.
"""


@dataclass(frozen=True)
class Service:
    """How the service runs.

    storage_uri: where the repository will lie, as pods see it.
    canary: percent of traffic for the patched model while the earlier revision has the rest; None:
        all of it.
    gpu: GPUs for each pod. memory: Kubernetes quantity.
    """

    name: str
    storage_uri: str
    canary: int | None = None
    gpu: int = 0
    memory: str = "4Gi"

    def check(self) -> None:
        """Raises: InputError for what Kubernetes would refuse."""
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", self.name):
            raise InputError(
                f"--name {self.name}: Kubernetes wants lower-case letters, digits and '-', at "
                "most 63, beginning with a letter"
            )
        if not self.storage_uri.startswith(_SCHEMES):
            raise InputError(
                f"--storage-uri {self.storage_uri or '(missing)'}: say where the pods will find "
                f"the repository, one of {', '.join(_SCHEMES)}..."
            )
        if self.canary is not None and not 0 <= self.canary <= 100:
            raise InputError(f"--canary {self.canary}: give a percentage")
        if self.gpu < 0:
            raise InputError(f"--gpu {self.gpu}: give a number of GPUs")
        if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?", self.memory):
            raise InputError(f"--memory {self.memory}: give a Kubernetes quantity, e.g. 4Gi")

    def manifest(self, release: Release, *, original: bool) -> dict[str, Any]:
        """The InferenceService, of the patched model or of the original."""
        limits = {"cpu": "2", "memory": self.memory}
        if self.gpu:
            limits["nvidia.com/gpu"] = str(self.gpu)
        model: dict[str, Any] = {
            "modelFormat": {"name": "triton"},
            "protocolVersion": "v2",
            "runtime": RUNTIME,
            "runtimeVersion": TRITON,
            "storageUri": self.storage_uri,
            "resources": {"limits": limits, "requests": dict(limits)},
        }
        predictor: dict[str, Any] = {"minReplicas": 1, "model": model}
        if original:
            model["args"] = ["--model-config-name=original"]
        elif self.canary is not None:
            predictor["canaryTrafficPercent"] = self.canary
        served = "original" if original else "patched"
        return {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                "name": self.name,
                "annotations": {
                    "atpatch/serves": served,
                    "atpatch/original-sha256": release.base.sha256,
                    "atpatch/patched-sha256": release.patched.sha256,
                },
            },
            "spec": {"predictor": predictor},
        }


def write_service(
    folder: Path,
    release: Release,
    golden: Sequence[GoldenSet],
    service: Service,
    *,
    max_batch_size: int,
    link_weights: bool,
) -> list[Path]:
    """Fill `folder`; returns what was written, the manifest first. Raises: InputError."""
    service.check()
    write_repository(
        folder / "repository",
        release,
        golden,
        name=service.name,
        max_batch_size=max_batch_size,
        link_weights=link_weights,
    )
    manifests = {"inferenceservice.yaml": False, "rollback.yaml": True}
    for file, original in manifests.items():
        write(folder / file, _yaml(service.manifest(release, original=original)))
    percent = "all" if service.canary is None else f"{service.canary} %"
    what = f"the patched model gets {percent} of the traffic."
    text = README.format(
        name=service.name, uri=service.storage_uri, what=what, patched=release.patched.sha256
    )
    write(folder / "README.md", text)
    return [Path(file) for file in manifests]


def _yaml(document: dict[str, Any]) -> str:
    try:
        import yaml
    except ImportError:
        raise InputError(
            "KServe manifests need PyYAML: pip install 'atpatch-onnx[export]'"
        ) from None
    return str(yaml.safe_dump(document, sort_keys=False))
