"""What is shipped: an original, its patched version, and the proof of what lies between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..api import certificate_path
from ..certificate import Certificate, certify, verify
from ..errors import CheckError, InputError, reason
from ..external_data import check_layout, external_files, external_tensors
from ..model_file import ModelFile
from ..patch_file import load_patch
from ..patching import apply, check_order, record_keys
from ..runtime import Session

PATCH_SUFFIX = ".atpatch"


@dataclass(frozen=True)
class Release:
    """An original and its patched version.

    patch: the `.atpatch` file, where the patched version was made from one.
    weights: the external weight files, relative to both models.
    certificate: what was found by comparing the two now.
    proof: the certificate as the file that `verify` reads: the one beside the patched model where
        there is one.
    """

    base: ModelFile
    patched: ModelFile
    patch: Path | None
    weights: tuple[str, ...]
    certificate: Certificate
    proof: bytes

    @property
    def sources(self) -> list[Path]:
        """Every file that is read."""
        given = self.patched.path if self.patch is None else self.patch
        return [self.base.path, given, *external_files(self.base)]

    @cached_property
    def before(self) -> Session:
        """A session over the original, on the CPU with one thread: results to compare with."""
        return Session(self.base.path, "cpu", threads=1)

    @cached_property
    def after(self) -> Session:
        """The same over the patched model."""
        source = self.patched.path if self.patch is None else bytes(self.patched.buffer)
        name = str(self.patched.path)
        return Session(source, "cpu", self.base.folder, threads=1, name=name)


def load_release(model: str | Path, patched: str | Path) -> Release:
    """Load and compare the two.

    patched: a patched `.onnx` file, or an `.atpatch` file, which is applied in memory.
    Raises: InputError, RefusedError; CheckError if more than a patch lies between them.
    """
    base, path = ModelFile.open(model), Path(patched)
    check_layout(base)
    patch = path if path.suffix == PATCH_SUFFIX else None
    if patch is None:
        result = ModelFile.open(path)
        check_order(base, result)
        if not record_keys(result):
            raise InputError(
                f"{path} carries no patch: give the patched model or an .atpatch file second"
            )
        check_layout(result)
    else:
        made = apply(base, load_patch(patch)).content()
        result = ModelFile.from_bytes(made, base.path.with_suffix(".patched.onnx"))
    weights = dict.fromkeys(tensor.location for tensor in external_tensors(base))
    proof = certify(base, result)
    held = None if patch else _held(result)
    content = json.dumps(proof.as_dict(), indent=1).encode() if held is None else held
    _check(base, result, content)
    return Release(base, result, patch, tuple(weights), proof, content)


def _held(result: ModelFile) -> bytes | None:
    """The certificate beside a patched model."""
    path = certificate_path(result.path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read the certificate {path}: {reason(error)}") from None


def _check(base: ModelFile, result: ModelFile, certificate: bytes) -> None:
    """Raises: CheckError if the certificate is not that of the two, or nothing leads back."""
    try:
        claimed = json.loads(certificate)
    except ValueError:
        claimed = None
    checks = verify(base, result, claimed if isinstance(claimed, dict) else {})
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        raise CheckError(
            f"{base.path} and {result.path} with its certificate do not belong together: "
            f"{failed.detail}"
        )


def chunks(model: ModelFile, step: int = 1 << 22) -> Iterator[memoryview]:
    """The bytes of a model file as they were compared, in parts."""
    view = memoryview(model.buffer)
    return (view[start : start + step] for start in range(0, model.size, step))
