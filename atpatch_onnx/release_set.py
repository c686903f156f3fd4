"""Files that belong together: what a model needs beside it, and whether all are of one release."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .api import certificate_path
from .errors import RefusedError
from .external_data import check_layout, external_files
from .model_file import ModelFile
from .patch_file import load_patch
from .patching import base_sha256

MODEL, PATCH, CERTIFICATE = ".onnx", ".atpatch", ".certificate.json"


def companions(path: Path) -> list[Path]:
    """A file, its external weights, and the certificate beside it. Raises: InputError."""
    if path.suffix != MODEL:
        return [path]
    model = ModelFile.open(path)
    check_layout(model)
    certificate = certificate_path(path)
    return [path, *external_files(model), *([certificate] if certificate.exists() else [])]


def weights_of(path: Path) -> list[Path]:
    """The files that hold the external weights of a model; none for other files."""
    return external_files(ModelFile.open(path)) if path.suffix == MODEL else []


def check_consistent(folder: Path, files: Iterable[Path]) -> None:
    """Raises: RefusedError for a patch or certificate that is for other models than those there.

    A patch without any model beside it is for a model elsewhere, which `apply` compares.
    """
    files = list(files)
    models = {path: ModelFile.open(path) for path in files if path.suffix == MODEL}
    known = {model.sha256 for model in models.values() if not _is_detector(model)}
    known |= {base for model in models.values() if (base := base_sha256(model)) is not None}
    for path in files:
        if path.suffix == PATCH and known:
            wanted = load_patch(path).base_sha256
            if wanted not in known:
                raise RefusedError(
                    f"{path} is for a model with SHA-256 {wanted[:12]}..., and none of the models "
                    f"in {folder} is that: the patch or the model is stale, make the patch again"
                )
        if path.name.endswith(CERTIFICATE):
            _check_certificate(path, models)


def _is_detector(model: ModelFile) -> bool:
    return model.metadata("atpatch.abi") is not None


def _check_certificate(path: Path, models: dict[Path, ModelFile]) -> None:
    """Raises: RefusedError if a certificate is not that of the patched model beside it."""
    patched = path.with_name(path.name.removesuffix(CERTIFICATE) + MODEL)
    if patched not in models:
        return
    try:
        claimed = json.loads(path.read_text())
        base, result = (claimed[side]["sha256"] for side in ("base", "result"))
    except (OSError, ValueError, KeyError, TypeError):
        base = result = None
    model = models[patched]
    if result != model.sha256 or base != base_sha256(model):
        raise RefusedError(
            f"{path} is not the certificate of {patched}: patch again, or take the files of one "
            "release"
        )
